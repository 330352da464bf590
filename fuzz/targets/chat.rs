//! A chat template and, after a NUL, what the user says: compiled, then rendered for a conversation of three turns.
#![no_main]

use model_deepseek::chat::{ChatTemplate, Message};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let (template, said) = text.split_once('\0').unwrap_or((text, "Hello!"));
    let Ok(template) = ChatTemplate::new(template, "<s>", "</s>") else { return };
    let messages = [("system", "Be brief."), ("user", said), ("assistant", said)];
    let messages = messages.map(|(role, content)| Message::new(role, content));
    let _ = template.render(&messages, true, &serde_json::json!({ "tools": [said] }));
});
