//! Encoding and decoding English: `cargo bench -p bench --bench tokenizer`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use model_deepseek::{
    source::{Checkpoint, Keys},
    tokenizer::{Special, Tokenizer},
};
use std::{hint::black_box, path::Path};

fn tokenizer(criterion: &mut Criterion) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/austen-q4_k_m.gguf");
    let checkpoint = Checkpoint::open(&file).unwrap();
    let Keys::Gguf(metadata) = checkpoint.keys() else { panic!("{} is a GGUF file", file.display()) };
    let open = || Tokenizer::from_gguf(metadata).unwrap();
    let tokenizer = open();
    let sentence =
        "Emma was not required, by any subsequent discovery, to retract her ill opinion of Mrs. Elton. ";
    let text = sentence.repeat(100);
    let ids = tokenizer.encode(&text, Special::Literal);

    let mut group = criterion.benchmark_group("tokenizer, 2048 tokens");
    group.bench_function("open", |bencher| bencher.iter(open));
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("encode", |bencher| {
        bencher.iter(|| tokenizer.encode(black_box(&text), Special::Literal));
    });
    group.bench_function("decode", |bencher| bencher.iter(|| tokenizer.decode(black_box(&ids)).unwrap()));
    group.finish();
}

criterion_group!(benches, tokenizer);
criterion_main!(benches);
