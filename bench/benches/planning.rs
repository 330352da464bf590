//! From a header to a plan, for the largest published shape: `cargo bench -p bench --bench planning`.
//!
//! None of this happens between two tokens; it is what a start costs, and what trying placements costs.

use backend_api::{Device, NullDevice, OpKind, Precision};
use bench::synth::{file::SynthFile, shapes::ModelShape, types::FileFormat};
use clap::ValueEnum;
use criterion::{Criterion, criterion_group, criterion_main};
use graph::{Devices, Placement};
use model_deepseek::{CacheType, Model, Options, PlacementOptions, Plans};
use std::{hint::black_box, sync::Arc};

fn planning(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("v3.gguf");
    let shape = ModelShape::from_str("v3", false).unwrap();
    SynthFile::new(&shape, None, FileFormat::Q4_K_M, 0).unwrap().write_header_only(&file).unwrap();
    let model = Model::open(&file).unwrap();
    let null = |name: &str| -> Arc<dyn Device> { Arc::new(NullDevice::new(name, 1 << 40)) };
    let host = Devices::new(vec![null("cpu")]);
    let mut group = criterion.benchmark_group("DeepSeek-V3, 61 layers");
    group.sample_size(20);
    group.bench_function("open", |bencher| bencher.iter(|| Model::open(black_box(&file)).unwrap()));
    group.bench_function("graph", |bencher| {
        bencher.iter(|| model.graph(4096, CacheType::F16, Precision::Default).unwrap());
    });
    group.bench_function("two plans, one device", |bencher| {
        bencher.iter(|| Plans::new(&model, &host, &Placement::default(), &Options::default()).unwrap());
    });
    let both = Devices::new(vec![null("gpu"), null("cpu")]);
    let apart = PlacementOptions { cpu_moe: true, host_caches: true, ..PlacementOptions::default() };
    group.bench_function("graph and two plans, experts and caches apart", |bencher| {
        bencher.iter(|| apart.place(&model, &both, &Options::default()).unwrap());
    });
    let lacking = NullDevice::new("gpu", 1 << 40).without(&[OpKind::Add, OpKind::ExpertMatMul]);
    let lacking = Devices::new(vec![Arc::new(lacking), null("cpu")]);
    let most = PlacementOptions { host_caches: true, ..PlacementOptions::default() };
    group.bench_function("graph and two plans, caches apart, two operations fall back", |bencher| {
        bencher.iter(|| most.place(&model, &lacking, &Options::default()).unwrap());
    });
    group.finish();
}

criterion_group!(benches, planning);
criterion_main!(benches);
