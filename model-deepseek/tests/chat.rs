//! Chat templates against what jinja2 renders in Hugging Face's environment.

use model_deepseek::chat::{ChatError, ChatTemplate, Message};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Golden {
    template: String,
    bos_token: String,
    eos_token: String,
    conversations: Vec<Conversation>,
}

#[derive(Deserialize)]
struct Conversation {
    name: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    #[serde(default)]
    extra: Value,
    rendered: String,
}

/// Renders every conversation of every `.json` in a folder and answers how many there were.
fn check(folder: &Path) -> usize {
    let mut count = 0;
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.into_iter().filter(|file| file.extension().is_some_and(|e| e == "json")) {
        let golden: Golden = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        let source = std::fs::read_to_string(folder.join(&golden.template)).unwrap();
        let template = ChatTemplate::new(&source, &golden.bos_token, &golden.eos_token).unwrap();
        for Conversation { name, messages, add_generation_prompt, extra, rendered } in &golden.conversations {
            let text = template.render(messages, *add_generation_prompt, extra);
            let text = text.unwrap_or_else(|error| panic!("{}: {name}: {error}", golden.template));
            assert_eq!(&text, rendered, "{}: {name}, {extra}", golden.template);
            count += 1;
        }
        println!("{}: {} conversations", golden.template, golden.conversations.len());
    }
    count
}

#[test]
fn published_templates() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models/tokenizers/templates");
    if !folder.exists() {
        println!("skipped: ../shared is not there");
        return;
    }
    assert_eq!(check(&folder), 57);
}

#[test]
fn templates_of_this_repository() {
    assert_eq!(check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/templates")), 36);
}

fn render(source: &str, extra: Value) -> Result<String, ChatError> {
    ChatTemplate::new(source, "<s>", "</s>")?.render(&[Message::new("user", "hi")], false, &extra)
}

#[test]
fn values_are_written_as_python_does() {
    let value =
        json!({"b": [1, 2.0, 1e20, null, true], "a": {"é\n\u{1f600}\u{1}": "<'\">"}, "c": [], "d": {}});
    let plain = r#"{"b": [1, 2.0, 1e+20, null, true], "a": {"é\n😀\u0001": "<'\">"}, "c": [], "d": {}}"#;
    let ascii = r#"{"a": {"\u00e9\n\ud83d\ude00\u0001": "<'\">"}, "b": [1, 2.0, 1e+20, null, true], "c": [], "d": {}}"#;
    for (source, expected) in [
        ("{{ none }} {{ true }} {{ false }} {{ nothing }}|", "None True False |"),
        ("{{ 'a b'.split(' ')[-1] }}{{ ' x '.strip() }}{{ {'k': 1}.items() | list | length }}", "bx1"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
        ("{{ v | tojson }}", plain),
        ("{{ v | tojson(ensure_ascii=True, sort_keys=true) }}", ascii),
        ("{{ [1, {'a': []}] | tojson(indent=2) }}", "[\n  1,\n  {\n    \"a\": []\n  }\n]"),
        ("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", "[1,{\"a\":2}]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        // Steps that jump, also where measures are between them.
        ("{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{% macro m(a, b=[0]) %}{{ a + b }}{% endmacro %}{{ m([1]) }}{{ m([1], b=[2]) }}", "[1, 0][1, 2]"),
        ("{% set n = namespace(a=1) %}{% set n.a = [n.a] if false else {'b': n.a} %}{{ n.a }}", "{'b': 1}"),
        (
            "{% set n = namespace(a=1, b=2) %}{% set n.a = n.b %}{{ n.a }}{{ n.b }}{{ [1] and [2] or [3] }}",
            "22[2]",
        ),
    ] {
        assert_eq!(render(source, json!({"v": value})).unwrap(), expected, "{source}");
    }
}

#[test]
fn own_variables_win_over_further_ones() {
    let extra = json!({"bos_token": "no", "add_generation_prompt": true, "more": 1});
    assert_eq!(render("{{ bos_token }}{{ add_generation_prompt }}{{ more }}", extra).unwrap(), "<s>False1");
}

#[test]
fn errors_say_what_is_wrong() {
    let long = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}";
    let shared =
        "{% set ns = namespace(x=[]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    let larger = "expected a value of at most 10";
    for (source, expected) in [
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses: roles must alternate"),
        ("a\n{% if %}", "chat template, line 2: syntax error"),
        ("a\n\n{{ 1 + none }}", "chat template, line 3: "),
        ("{{ 1 | tojson(nonsense=1) }}", "nonsense"),
        ("{{ messages[0].content.nonsense() }}", "nonsense"),
        ("{{ nothing | tojson }}", "undefined"),
        (long, "fuel"),
        (deep, "nested at most 160 deep"),
        (shared, larger),
        ("{{ range(99999) | list | length }}", larger),
        ("{% set ns = namespace() %}\n{% set ns.x = ns %}", "chat template, line 2: "),
        ("{% set ns = namespace() %}{% set ns.x = ns %}", "a namespace to be named"),
        ("{% set ns = namespace() %}{{ [ns] }}", "a namespace to be named"),
        ("{% for i in [1] %}{{ [loop] }}{% endfor %}", "a namespace or loop by itself"),
        ("{{ '{:>99999999}'.format(1) }}", "fuel: it takes more steps"),
        ("{{ [1] | tojson(indent='x' * 500000) | length }}", "fuel: it takes more steps"),
    ] {
        let message = render(source, Value::Null).unwrap_err().to_string();
        assert!(message.contains(expected), "{source}: {message}");
    }
    // What the template engine itself does not survive on a thread of usual size, or at all.
    let longest = format!("{{{{ {}1 }}}}", "1 + ".repeat(30_000));
    assert_eq!(render(&longest, Value::Null).unwrap(), "30001");
    let too_long = format!("{{# {} #}}", "x".repeat(128 << 10));
    let doubled = "{% set ns = namespace(x='12345678') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    for (source, expected) in [
        (
            "{% for x in [1] %}{{ loop.cycle() }}{% endfor %}",
            "chat template: the template engine gave up on it",
        ),
        (too_long.as_str(), "chat template: expected at most 131072 bytes, found 131"),
        (doubled, "fuel"),
    ] {
        let message = render(source, Value::Null).unwrap_err().to_string();
        assert!(message.contains(expected), "{source}: {message}");
    }
    let message = render("", json!([1])).unwrap_err().to_string();
    assert_eq!(message, "chat template variables: expected a JSON object or null, found [1]");
}

#[test]
fn long_conversations_have_steps_enough() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/templates");
    for name in ["deepseek-r1", "deepseek-v3.1", "glm-4.7-flash"] {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let template = ChatTemplate::new(&source, "<s>", "</s>").unwrap();
        for (turns, length) in [(2_000, 3), (50, 100_000)] {
            let call = json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]);
            let mut messages = Vec::new();
            for turn in 0..turns {
                let role = ["user", "assistant", "user", "assistant"][turn % 4];
                messages.push(Message::new(role, "x ".repeat(length)));
                if name.starts_with("glm") && turn % 4 == 3 {
                    messages[turn].more.insert("tool_calls".into(), call.clone());
                }
            }
            let text = template.render(&messages, true, &Value::Null);
            assert!(text.unwrap_or_else(|error| panic!("{name}: {error}")).len() > turns * length * 2);
        }
    }
}
