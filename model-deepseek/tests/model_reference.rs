//! Logits against float64 references computed in the unabsorbed form, for every model there is.

mod common;

use common::{Difference, Reference, embedded, engine, exact, open, shared_models, testdata};
use model_deepseek::{CacheType, Options};
use std::path::Path;

fn difference(model: &Path, reference: &Path, options: &Options) -> (Difference, Reference) {
    let reference = Reference::read(reference);
    let mut session = engine(&open(model), options).session().unwrap();
    (reference.compare(&mut session), reference)
}

/// With nothing rounded below f32: NMSE at most `bound`, and the same best token in every row.
fn check_exact(model: &Path, reference: &Path, bound: f64) {
    let (found, _) = difference(model, reference, &exact());
    println!("{}: {found:?}", model.display());
    assert!(found.nmse <= bound, "{}: {found:?}", model.display());
    assert_eq!(found.agreeing, found.rows, "{}: {found:?}", model.display());
}

/// Default arithmetic is held to the median of the rows' errors, which single flipped experts do not move.
fn check_default(model: &Path, reference: &Path) {
    let options = Options { cache: CacheType::F32, ..Options::default() };
    let (found, reference) = difference(model, reference, &options);
    println!("{}: {found:?}", model.display());
    let bound = 1.2 * reference.llama_median.expect("the reference has llama.cpp's figures");
    assert!(found.median_row_nmse <= bound, "{}: {found:?}, bound {bound}", model.display());
    assert!(found.agreeing + 2 >= found.rows, "{}: {found:?}", model.display());
}

#[test]
fn the_embedded_model() {
    let reference = testdata().join("austen-q4_k_m.json");
    check_exact(&embedded(), &reference, 1e-6);
    check_default(&embedded(), &reference);
}

#[test]
fn every_gguf_file() {
    let Some(models) = shared_models() else { return };
    for (name, bound) in [
        ("austen-f16", 1e-9),
        ("austen-q8_0", 1e-6),
        ("austen-q5_1", 1e-6),
        ("austen-q4_k_m", 1e-6),
        ("austen-q2_k", 1e-6),
        ("austen-iq4_xs", 1e-6),
        ("shapes/v2lite-like-f16", 1e-9),
        ("shapes/v3-like-f16", 1e-9),
    ] {
        let (model, reference) = (models.join(format!("{name}.gguf")), models.join(format!("{name}.json")));
        check_exact(&model, &reference, bound);
        check_default(&model, &reference);
    }
}

#[test]
fn hugging_face_directories() {
    let Some(models) = shared_models() else { return };
    let shapes = models.join("shapes");
    let (model, reference) = (shapes.join("v3-like-hf"), shapes.join("v3-like-f16.json"));
    check_exact(&model, &reference, 1e-9);
    check_default(&model, &reference);
    // llama.cpp has no figures for FP8, which it does not run.
    let fp8 = shapes.join("v3-like-hf-fp8");
    let reference = fp8.join("reference.json");
    check_exact(&fp8, &reference, 1e-6);
    assert_eq!(Reference::read(&reference).llama_median, None);
}
