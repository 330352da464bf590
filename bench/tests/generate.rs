//! From a prompt to a text.
#![cfg(feature = "cpu")]

mod common;
use common::{Said, austen, keys, run, run_with};
use std::fs;
#[cfg(unix)]
use std::{
    fs::File,
    io::Write,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const GENERATE: &str = env!("CARGO_BIN_EXE_generate");

#[test]
fn without_any_option_a_paragraph_is_written() {
    let said = run(GENERATE, &[]);
    let rates = said.err.clone();
    let text = said.ok();
    assert!(text.starts_with("It was a truth") && text.ends_with('\n'), "{text}");
    assert!(text.split_whitespace().count() > 60, "{text}");
    assert!(rates.contains("prefill: ") && rates.contains(" tokens/s)"), "{rates}");
    assert!(rates.contains("seed "), "a seed from the clock is told: {rates}");
}

#[test]
fn a_seed_gives_the_same_text_with_any_threads_and_pieces_of_the_prompt() {
    let prompt = "Mr. Knightley, who had been walking about the room for some time, at last said";
    let write = |more: &[&str]| {
        let arguments = ["--seed", "7", "--predict", "30", "--prompt", prompt];
        run(GENERATE, &[&arguments, more].concat()).ok()
    };
    let text = write(&[]);
    for more in [["--threads", "1"], ["--threads", "3"], ["--batch", "1"], ["--batch", "7"]] {
        assert_eq!(write(&more), text, "{more:?}");
    }
    assert_ne!(run(GENERATE, &["--seed", "8", "--predict", "30", "--prompt", prompt]).ok(), text);
}

#[test]
fn the_embedded_model_is_that_of_the_file() {
    let arguments = ["--seed", "3", "--predict", "20"];
    let model = austen();
    let embedded = run(GENERATE, &arguments).ok();
    assert_eq!(run(GENERATE, &[&arguments[..], &["--model", &model]].concat()).ok(), embedded);
}

#[test]
fn json_has_the_text_its_tokens_and_the_rates() {
    let arguments = ["--prompt", "Emma", "--predict", "12", "--temperature", "0"];
    let json = run(GENERATE, &[&arguments[..], &["--json"]].concat()).json();
    assert_eq!(keys(&json), ["decode_tok_s", "prefill_tok_s", "text", "tokens"]);
    assert_eq!(json["tokens"].as_array().unwrap().len(), 12);
    assert!(json["prefill_tok_s"].as_f64().unwrap() > 0.0 && json["decode_tok_s"].as_f64().unwrap() > 0.0);
    let plain = run(GENERATE, &arguments).ok();
    assert_eq!(plain, format!("{}\n", json["text"].as_str().unwrap()));
}

#[test]
fn a_prompt_may_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    fs::write(&file, "Emma").unwrap();
    let more = ["--predict", "8", "--temperature", "0"];
    let from_file = run(GENERATE, &[&["--prompt-file", file.to_str().unwrap()], &more[..]].concat()).ok();
    assert_eq!(run(GENERATE, &[&["--prompt", "Emma"], &more[..]].concat()).ok(), from_file);
    let error = run(GENERATE, &["--prompt-file", "no/such/prompt"]).error();
    assert!(error.contains("no/such/prompt: cannot be read"), "{error}");
}

#[test]
fn an_empty_prompt_is_an_error() {
    assert_eq!(run(GENERATE, &["--prompt", ""]).error(), "error: the prompt is empty");
}

#[test]
fn a_prompt_longer_than_the_context_is_an_error() {
    let prompt = "word ".repeat(100);
    let error = run(GENERATE, &["--ctx", "16", "--prompt", &prompt]).error();
    assert!(error.contains("the context 16: give --ctx more"), "{error}");
}

#[test]
fn a_full_context_ends_the_text() {
    let arguments = ["--ctx", "16", "--predict", "100", "--prompt", "Emma", "--temperature", "0", "--json"];
    let said = run(GENERATE, &arguments);
    assert!(said.err.contains("notice: the context of 16 tokens is full"), "{said:?}");
    assert!(
        said.err.contains("prefill: 2 tokens"),
        "a token that begins texts, and one of the name: {said:?}"
    );
    assert_eq!(said.json()["tokens"].as_array().unwrap().len(), 14);
}

#[test]
fn a_text_cut_within_a_character_ends_with_a_replacement() {
    // So hot that this seed draws the first byte of a character of three.
    let arguments =
        ["--prompt", "Emma", "--temperature", "6", "--top-k", "0", "--seed", "95", "--predict", "1"];
    let json = run(GENERATE, &[&arguments[..], &["--json"]].concat()).json();
    assert_eq!((json["text"].as_str(), json["tokens"].as_array().map(Vec::len)), (Some("\u{fffd}"), Some(1)));
    assert_eq!(run(GENERATE, &arguments).ok(), "\u{fffd}\n");
}

#[cfg(unix)]
#[test]
fn a_prompt_may_come_from_a_named_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let writer = thread::spawn({
        let pipe = pipe.clone();
        // opening waits for the reader
        move || fs::write(pipe, "Emma")
    });
    let more = ["--predict", "8", "--temperature", "0"];
    let piped = run(GENERATE, &[&["--prompt-file", pipe.to_str().unwrap()], &more[..]].concat()).ok();
    writer.join().unwrap().unwrap();
    assert_eq!(run(GENERATE, &[&["--prompt", "Emma"], &more[..]].concat()).ok(), piped);
}

#[test]
fn every_cache_type_writes_text() {
    for cache in ["f16", "f32", "q8_0"] {
        let text = run(GENERATE, &["--seed", "1", "--predict", "10", "--cache-type", cache]).ok();
        assert!(text.split_whitespace().count() > 4, "{cache}: {text}");
    }
}

/// Best tokens only, so that a conversation can be compared with prompts.
const BEST: [&str; 4] = ["--predict", "10", "--temperature", "0"];

fn converse(more: &[&str], input: impl AsRef<[u8]>) -> Said {
    run_with(GENERATE, &[&["--chat"], &BEST[..], more].concat(), input)
}

/// What follows this text, as a line.
fn follows(prompt: &str) -> String {
    run(GENERATE, &[&["--prompt", prompt], &BEST[..]].concat()).ok()
}

#[test]
fn a_conversation_answers_every_line_and_remembers() {
    let said = converse(&[], "How do you do?\n\nAnd your mother?\r\n");
    let rates = said.err.lines().filter(|line| line.starts_with("prefill: ")).count();
    assert_eq!(rates, 2, "an empty line asks nothing");
    assert_eq!(said.err.matches("notice: the answer was cut after 10 tokens").count(), 2, "{said:?}");
    let answers = said.ok();
    let (first, second) = answers.split_once('\n').unwrap();
    let asked = "<｜User｜>How do you do?<｜Assistant｜>";
    assert_eq!(follows(asked), format!("{first}\n"));
    let again = "<｜User｜>And your mother?<｜Assistant｜>";
    assert_eq!(follows(&format!("{asked}{first}<｜end▁of▁sentence｜>{again}")), second);
    assert_ne!(follows(again), second, "the first turn matters");
}

#[test]
fn a_conversation_that_outgrows_the_context_goes_on_with_the_last_message() {
    let said = converse(&["--ctx", "24"], "How do you do?\nAnd your mother?\n");
    assert!(
        said.err.contains("tokens, too many for the context of 24: only your last message is kept"),
        "{said:?}"
    );
    let answers = said.ok();
    let (_, second) = answers.split_once('\n').unwrap();
    assert_eq!(follows("<｜User｜>And your mother?<｜Assistant｜>"), second);
}

#[test]
fn an_answer_cut_by_the_context_says_so() {
    let said = converse(&["--ctx", "12"], "How do you do?\n");
    assert!(said.err.contains("notice: the answer was cut: the context of 12 tokens is full"), "{said:?}");
    assert!(said.err.contains("prefill: 8 tokens") && said.err.contains("decode: 4 tokens"), "{said:?}");
}

#[test]
fn a_message_longer_than_the_context_ends_a_piped_conversation() {
    let message = "How do you do? ".repeat(10);
    let error = converse(&["--ctx", "16"], &message).error();
    let least = error.strip_prefix("error: the message has ").unwrap();
    let (found, rest) = least.split_once(" tokens, too many for the context of 16: give --ctx ").unwrap();
    let least = rest.strip_suffix(" or more").unwrap();
    let number = |text: &str| text.parse::<usize>().unwrap();
    assert_eq!(number(found) + 1, number(least));
    converse(&["--ctx", least], &message).ok();

    let said = converse(&["--ctx", "16"], format!("How do you do?\n{message}\nnever read\n"));
    assert_eq!((said.code, said.out.lines().count()), (Some(1), 1), "{said:?}");
}

#[test]
fn a_line_that_is_not_utf_8_is_read_as_far_as_it_is() {
    let said = converse(&[], b"How do you do?\nAnd your m\xffther?\n");
    assert!(said.err.contains("notice: line 2 is not UTF-8"), "{said:?}");
    assert_eq!(said.ok(), converse(&[], "How do you do?\nAnd your m\u{fffd}ther?\n").ok());
}

/// A program that ends with the test, whatever becomes of that.
#[cfg(unix)]
struct Running(Child);

#[cfg(unix)]
impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_an_answer_and_between_answers_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let (out, err) = (folder.path().join("out"), folder.path().join("err"));
    // Seconds of text: each answer is stopped long before its end.
    let mut program = Command::new(GENERATE)
        .args(["--chat", "--seed", "3", "--ctx", "20000", "--predict", "1000000", "--threads", "1"])
        .stdin(Stdio::piped())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .map(Running)
        .unwrap();
    let mut input = program.0.stdin.take().unwrap();
    let process = program.0.id().to_string();
    let interrupt = || assert!(Command::new("kill").args(["-INT", &process]).status().unwrap().success());
    let wait_for = |what: &str, happened: &mut dyn FnMut() -> bool| {
        let begin = Instant::now();
        while !happened() {
            assert!(begin.elapsed() < Duration::from_secs(60), "{what}: {:?}", fs::read_to_string(&err));
            thread::sleep(Duration::from_millis(2));
        }
    };
    let mut written = 0;
    for turn in 1..=2 {
        writeln!(input, "How do you do?").unwrap();
        wait_for("an answer", &mut || fs::metadata(&out).unwrap().len() > written);
        interrupt();
        // The rates end a turn.
        wait_for("its end", &mut || fs::read_to_string(&err).unwrap().matches("prefill: ").count() == turn);
        assert_eq!(fs::read_to_string(&err).unwrap().matches("(stopped)").count(), turn);
        written = fs::metadata(&out).unwrap().len();
    }
    // The first may still be the answer's.
    let mut status = None;
    wait_for("the end of the program", &mut || {
        if status.is_none() {
            interrupt();
            status = program.0.try_wait().unwrap();
        }
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(130));
}
