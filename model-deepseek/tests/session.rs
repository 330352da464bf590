//! Sessions: that however tokens get in, the answer is the same bits; and that mistakes are told.

mod common;

use backend_api::{Discard, Precision};
use backend_cpu::{CpuOptions, Level};
use common::{argmax, embedded, engine, open, testdata};
use model_deepseek::{
    CacheType, Engine, Error, Model, Options, Sampler, Sampling, Session, SessionError, Stop, Wanted,
    source::Checkpoint,
};
use std::{
    ops::ControlFlow,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

/// Small enough for steps to be cut in many ways.
fn options(cache: CacheType) -> Options {
    Options { context: Some(128), batch: 32, logit_rows: Some(5), cache, ..Options::default() }
}

fn embedded_engine(cache: CacheType) -> Engine {
    engine(&open(&embedded()), &options(cache))
}

fn tokens(n: usize) -> Vec<u32> {
    common::Reference::read(&testdata().join("austen-q4_k_m.json")).tokens[..n].to_vec()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Logits of all rows, fed in pieces of `piece` tokens.
fn feed_in(session: &mut Session, tokens: &[u32], piece: usize) -> Vec<Vec<u32>> {
    let mut rows = Vec::new();
    for piece in tokens.chunks(piece) {
        let mut each = |_, logits: &[f32]| rows.push(bits(logits));
        session.feed_with(piece, Wanted::All, &mut each, &mut Discard).unwrap();
    }
    rows
}

#[test]
fn pieces_make_no_difference() {
    for cache in [CacheType::F16, CacheType::F32, CacheType::Q8_0] {
        let engine = embedded_engine(cache);
        let tokens = tokens(70);
        let whole = feed_in(&mut engine.session().unwrap(), &tokens, 70);
        assert_eq!(whole.len(), 70);
        for piece in [1, 7, 32, 33] {
            let found = feed_in(&mut engine.session().unwrap(), &tokens, piece);
            assert!(found == whole, "{cache}: pieces of {piece}");
        }
    }
}

#[test]
fn threads_make_no_difference() {
    let model = open(&embedded());
    let tokens = tokens(70);
    for isa in Level::ALL {
        let cpu = |threads| CpuOptions {
            threads: Some(threads),
            isa: Some(isa),
            ..CpuOptions::from_env().unwrap()
        };
        if !isa.is_available() {
            println!("skipped: this processor has no {isa}");
            continue;
        }
        let run = |threads, piece| {
            let devices = common::cpu_with(cpu(threads));
            let engine =
                Engine::new(&model, &devices, &Default::default(), &options(CacheType::F16)).unwrap();
            feed_in(&mut engine.session().unwrap(), &tokens, piece)
        };
        let whole = run(1, 70);
        for (threads, piece) in [(2, 70), (3, 70), (1, 7), (2, 7), (3, 1)] {
            assert!(run(threads, piece) == whole, "{isa}: {threads} threads, pieces of {piece}");
        }
    }
}

/// Which rows are wanted changes neither the rows nor how often the head runs per row.
#[test]
fn wanted_rows_are_the_rows_of_all() {
    let engine = embedded_engine(CacheType::F16);
    let tokens = tokens(70);
    let all = feed_in(&mut engine.session().unwrap(), &tokens, 70);
    let sets: [&[usize]; 6] =
        [&[], &[0], &[69], &[3, 4, 5, 6, 7, 8, 9, 40], &[0, 31, 32, 63, 64], &(0..70).collect::<Vec<_>>()];
    for set in sets {
        let mut session = engine.session().unwrap();
        let mut seen = Vec::new();
        let mut each = |row: usize, logits: &[f32]| {
            assert!(bits(logits) == all[row], "row {row} of {set:?}");
            seen.push(row);
        };
        session.feed_with(&tokens, Wanted::Rows(set), &mut each, &mut Discard).unwrap();
        assert_eq!(seen, set);
        assert_eq!(session.logits().is_some(), set.last() == Some(&69), "{set:?}");
    }
    let mut session = engine.session().unwrap();
    session
        .feed_with(&tokens, Wanted::Nothing, &mut |_, _| panic!("nothing is wanted"), &mut Discard)
        .unwrap();
    assert!(session.logits().is_none());
    assert_eq!(session.tokens(), tokens);
    assert!(bits(engine.session().unwrap().feed(&tokens).unwrap()) == all[69]);
}

#[test]
fn repeating_is_repeating() {
    let engine = embedded_engine(CacheType::F16);
    let tokens = tokens(40);
    let run = || feed_in(&mut engine.session().unwrap(), &tokens, 40);
    assert!(run() == run());
}

#[test]
fn forks_truncations_and_restorations_go_on_as_a_straight_run() {
    for cache in [CacheType::F16, CacheType::F32, CacheType::Q8_0] {
        let engine = embedded_engine(cache);
        let tokens = tokens(60);
        let straight = feed_in(&mut engine.session().unwrap(), &tokens, 60);
        for cut in [1, 31, 32, 33, 59] {
            let (past, future) = tokens.split_at(cut);
            let check = |mut session: Session, what: &str| {
                assert_eq!(session.tokens(), past, "{what}");
                assert!(feed_in(&mut session, future, 60) == straight[cut..], "{cache}: {what} at {cut}");
            };
            let mut session = engine.session().unwrap();
            session.feed(past).unwrap();
            let saved = session.save().unwrap();
            check(session.fork().unwrap(), "fork");
            let restored = engine.restore(&saved).unwrap();
            assert!(bits(restored.logits().unwrap()) == straight[cut - 1]);
            check(restored, "restored");
            // The original is as it was, and forgets another future.
            session.feed(&[5, 6, 7]).unwrap();
            session.truncate(cut).unwrap();
            check(session, "truncated");
        }
    }
}

#[test]
fn an_empty_session_can_be_saved_and_forked() {
    let engine = embedded_engine(CacheType::F16);
    let session = engine.session().unwrap();
    let restored = engine.restore(&session.save().unwrap()).unwrap();
    assert!(restored.tokens().is_empty() && restored.logits().is_none());
    assert!(session.fork().unwrap().tokens().is_empty());
}

#[test]
fn greedy_text_is_the_best_tokens_one_by_one() {
    let engine = embedded_engine(CacheType::F16);
    let prompt = tokens(20);
    let mut session = engine.session().unwrap();
    session.feed(&prompt).unwrap();
    let mut text = String::new();
    let generated = session
        .generate(&mut Sampler::greedy(), 30, |_, piece| {
            text.push_str(piece);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((generated.stop, generated.tokens.len()), (Stop::Limit, 30));
    assert_eq!(session.tokens(), [&prompt[..], &generated.tokens].concat());

    let mut by_hand = engine.session().unwrap();
    let mut best = argmax(by_hand.feed(&prompt).unwrap()) as u32;
    for token in &generated.tokens {
        assert_eq!(*token, best);
        best = argmax(by_hand.feed(&[best]).unwrap()) as u32;
    }
    let tokenizer = engine.model().tokenizer().unwrap();
    assert_eq!(text.as_bytes(), tokenizer.decode(&generated.tokens).unwrap());

    // After a cut the last token's logits are found again.
    session.truncate(25).unwrap();
    let again = session.generate(&mut Sampler::greedy(), 5, |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(again.tokens, generated.tokens[5..10]);
}

#[test]
fn generating_ends_where_it_should() {
    let engine = embedded_engine(CacheType::F16);
    let mut session = engine.session().unwrap();
    session.feed(&tokens(120)).unwrap();
    let mut sampler = Sampler::new(Sampling { temperature: 0.7, top_k: 40, ..Sampling::default() }).unwrap();
    let full = session.fork().unwrap().generate(&mut sampler, 100, |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((full.stop, full.tokens.len()), (Stop::Context, 8));

    let broken = session.fork().unwrap().generate(&mut sampler, 100, |_, _| ControlFlow::Break(())).unwrap();
    assert_eq!((broken.stop, broken.tokens.len()), (Stop::Cancelled, 1));

    let flag = session.cancel_flag();
    let mut count = 0;
    let cancelled = session
        .generate(&mut sampler, 100, |_, _| {
            count += 1;
            flag.store(count == 3, Ordering::Relaxed);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((cancelled.stop, cancelled.tokens.len()), (Stop::Cancelled, 3));
    assert!(!flag.load(Ordering::Relaxed), "the flag falls when it was obeyed");
    assert_eq!(session.tokens()[120..], cancelled.tokens, "what was seen is in the session");
    let both = session.generate(&mut sampler, 100, |_, _| {
        flag.store(true, Ordering::Relaxed);
        ControlFlow::Break(())
    });
    assert_eq!(both.unwrap().tokens.len(), 1);
    assert!(!flag.load(Ordering::Relaxed), "the flag falls with the break");
    // Also before the first, when the logits have to be found again.
    session.truncate(121).unwrap();
    flag.store(true, Ordering::Relaxed);
    let none = session.generate(&mut sampler, 100, |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((none.stop, none.tokens.len(), session.tokens().len()), (Stop::Cancelled, 0, 121));
}

#[test]
fn a_flag_ends_a_feed_between_steps() {
    let engine = embedded_engine(CacheType::F16);
    let mut session = engine.session().unwrap();
    let flag = session.cancel_flag();
    let tokens = tokens(70);
    let mut each = |row, _: &[f32]| flag.store(row == 3, Ordering::Relaxed);
    let error = session.feed_with(&tokens, Wanted::Rows(&[3]), &mut each, &mut Discard).unwrap_err();
    let Error::Session(error) = error else { panic!("{error}") };
    assert_eq!(error, SessionError::Cancelled { fed: 32, tokens: 70 });
    assert_eq!(session.tokens(), &tokens[..32]);
    let rest = session.feed(&tokens[32..]).map(bits).unwrap();
    assert!(rest == bits(engine.session().unwrap().feed(&tokens).unwrap()));
}

#[test]
fn mistakes_are_told() {
    let engine = embedded_engine(CacheType::F16);
    let mut session = engine.session().unwrap();
    let told = |result: Result<(), Error>, words: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    told(session.feed(&[]).map(|_| ()), &["empty"]);
    told(
        session.generate(&mut Sampler::greedy(), 1, |_, _| ControlFlow::Continue(())).map(|_| ()),
        &["empty"],
    );
    told(session.feed(&[5; 129]).map(|_| ()), &["129", "128"]);
    told(session.feed(&[5, 2048]).map(|_| ()), &["2048"]);
    told(session.truncate(1), &["keep 1", "of 0"]);
    for rows in [&[1usize, 1][..], &[2, 1], &[3]] {
        told(
            session.feed_with(&[5; 3], Wanted::Rows(rows), &mut |_, _| (), &mut Discard),
            &["rising", "below 3"],
        );
    }
    assert!(session.tokens().is_empty(), "nothing was fed");
    session.feed(&[5; 120]).unwrap();
    told(session.feed(&[5; 9]).map(|_| ()), &["9 tokens after 120", "128"]);
    session.feed(&[5; 8]).unwrap();
    assert_eq!(session.room(), 0);
}

#[test]
fn what_was_not_saved_here_is_not_restored() {
    let model = open(&embedded());
    let engine = engine(&model, &options(CacheType::F16));
    let mut session = engine.session().unwrap();
    session.feed(&tokens(40)).unwrap();
    let saved = session.save().unwrap();
    let told = |engine: &Engine, bytes: &[u8], words: &[&str]| {
        let error = engine.restore(bytes).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let other = |options| common::engine(&model, &options);
    told(&other(options(CacheType::F32)), &saved, &["cache type", "f32", "f16"]);
    let precise = Options { precision: Precision::F32, ..options(CacheType::F16) };
    told(&other(precise), &saved, &["precision", "F32", "Default"]);
    let short = Options { context: Some(39), ..options(CacheType::F16) };
    told(&other(short), &saved, &["tokens", "39", "40"]);
    let longer = Options { context: Some(256), ..options(CacheType::F16) };
    assert_eq!(other(longer).restore(&saved).unwrap().tokens(), session.tokens());

    // The same shapes and norms with another weight, and the same tensors under another hyperparameter.
    let embedded = std::fs::read(embedded()).unwrap();
    let other_file = |file: Vec<u8>| {
        let checkpoint = Checkpoint::from_bytes(Path::new("other.gguf"), Arc::new(file)).unwrap();
        common::engine(&Arc::new(Model::new(checkpoint).unwrap()), &options(CacheType::F16))
    };
    let mut file = embedded.clone();
    let down = engine.model().checkpoint().load("blk.1.ffn_down_exps.weight").unwrap().range;
    file[down.start + 4] ^= 1;
    told(&other_file(file), &saved, &["model"]);
    let mut file = embedded;
    let key = b"deepseek2.attention.layer_norm_rms_epsilon";
    let epsilon = file.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    file[epsilon..epsilon + 4].copy_from_slice(&2e-6f32.to_le_bytes());
    told(&other_file(file), &saved, &["model"]);

    told(&engine, &[], &["size"]);
    told(&engine, b"a text file that is none of ours, of fifty bytes..", &["header"]);
    for cut in [0, 7, 39, 40, 47, 48, 100, saved.len() / 2, saved.len() - 1] {
        assert!(engine.restore(&saved[..cut]).is_err(), "cut at {cut}");
    }
    for at in [0, 8, 16, 20, 24, 31, 32, 40, 200, saved.len() / 2, saved.len() - 1] {
        let mut broken = saved.clone();
        broken[at] ^= 0x40;
        assert!(engine.restore(&broken).is_err(), "a bit of byte {at}");
    }
}

#[test]
fn options_are_checked() {
    let model = open(&embedded());
    for (options, words) in [
        (Options { context: Some(0), ..Options::default() }, "context"),
        (Options { context: Some(1 << 40), ..Options::default() }, "context"),
        (Options { batch: 0, ..Options::default() }, "batch"),
        (Options { logit_rows: Some(0), ..Options::default() }, "logit rows"),
    ] {
        let error =
            Engine::new(&model, &common::cpu(), &Default::default(), &options).unwrap_err().to_string();
        assert!(error.contains(words), "{options:?}: {error}");
    }
    for cache in [CacheType::F16, CacheType::F32, CacheType::Q8_0] {
        assert_eq!(cache.to_string().parse::<CacheType>().unwrap(), cache);
    }
    assert!("q4_0".parse::<CacheType>().unwrap_err().to_string().contains("`q4_0`"));
}
