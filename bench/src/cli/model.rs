//! Opening a model, and loading it with progress.

use super::{DeviceOptions, Failure, OpenDevices, Progress};
use backend_api::{DeviceKind, Step};
use clap::Args;
use graph::{Needs, Plan, Report, report::summary};
use model_deepseek::{
    Engine, Model, Options, Placed, Plans, Session, source::Checkpoint, tokenizer::Tokenizer,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Which model.
#[derive(Args, Clone, Debug)]
pub struct ModelOption {
    /// A GGUF file (of a split set, any of its files) or a Hugging Face directory
    // Who lists devices needs none.
    #[arg(long, value_name = "FILE|DIR", required_unless_present = "list_devices")]
    pub model: Option<PathBuf>,
}

impl ModelOption {
    /// Reads the model's header; notices go to standard error. What its weights need to be made takes as many
    /// threads as the devices may have.
    ///
    /// # Errors
    /// What is wrong with the checkpoint.
    pub fn open(&self, devices: &DeviceOptions) -> Result<Arc<Model>, Failure> {
        open(self.path()?, devices)
    }

    /// Where the model is.
    ///
    /// # Errors
    /// If it was not said.
    pub fn path(&self) -> Result<&Path, Failure> {
        self.model.as_deref().ok_or_else(|| "--model: expected a file or directory, found none".into())
    }
}

/// As [`ModelOption::open`], for a path from elsewhere.
///
/// # Errors
/// What is wrong with the checkpoint.
pub fn open(path: &Path, devices: &DeviceOptions) -> Result<Arc<Model>, Failure> {
    let checkpoint = Checkpoint::open(path)?.with_threads(devices.threads());
    Ok(opened(Model::new(checkpoint)?))
}

/// Tells what there is to tell about a model.
pub fn opened(model: Model) -> Arc<Model> {
    for notice in model.notices() {
        eprintln!("notice: {notice}");
    }
    Arc::new(model)
}

/// Plans a model as the user said; notices go to standard error.
///
/// # Errors
/// Options that do not fit the model, or the devices.
pub fn placed(model: &Model, devices: &OpenDevices, options: &Options) -> Result<Plans, Failure> {
    let Placed { plans, notices } = devices.placement.place(model, &devices.devices, options)?;
    for notice in notices {
        eprintln!("notice: {notice}");
    }
    Ok(plans)
}

/// Tells the plans on standard error: each in a line, or (`verbose`) with every node and its reason.
pub fn tell(plans: &Plans, verbose: bool) {
    let needs = plans.needs();
    for (what, plan) in [("decode", &plans.decode), ("prefill", &plans.prefill)] {
        let step = plan.capacity.full_step();
        eprintln!("{what} on {}", summary(plan, &step));
        if verbose {
            eprint!("{}", report(plan, &step, &needs));
        }
    }
}

/// The report of one plan of a model, with the memory that running takes: both plans' together.
pub fn report(plan: &Plan, step: &Step, needs: &[Needs]) -> Report {
    let memory = plan.devices.iter().cloned().zip(needs.iter().copied()).collect();
    Report { memory, ..Report::new(plan, step) }
}

/// Reads the tokenizer of a model whose texts are wanted, and tells what there is to tell about it.
///
/// # Errors
/// A tokenizer that cannot be used: better known before the weights are loaded.
pub fn tokenizer(model: &Model) -> Result<&Tokenizer, Failure> {
    if let Some(notice) = model.vocabulary_notice()? {
        eprintln!("notice: {notice}");
    }
    Ok(model.tokenizer()?)
}

/// Lets a session go on without devices that are lost, where it can, and tells.
pub fn outliving(mut session: Session) -> Session {
    session.go_on_without_lost_devices(|error| {
        eprintln!("notice: {error}; its work goes on on the host, more slowly");
    });
    session
}

/// Plans, and loads the weights with a bar; tells if the model was not trained for as long a context.
///
/// # Errors
/// Options that do not fit the model, weights that cannot be had, devices without room.
pub fn loaded(model: &Arc<Model>, devices: &OpenDevices, options: &Options) -> Result<Engine, Failure> {
    if let Some(null) =
        devices.devices.iter().map(|device| device.info()).find(|info| info.kind == DeviceKind::Null)
    {
        return Err(format!(
            "--device {}: a hypothetical device only plans, see the program placement",
            null.name
        )
        .into());
    }
    let trained = model.config().context_length;
    if let Some(context) = options.context.filter(|context| *context > trained) {
        eprintln!("notice: a context of {context} tokens, but the model was trained for {trained}");
    }
    let plans = placed(model, devices, options)?;
    let progress = Progress::bytes("loading", 0);
    let engine = Engine::load(model, &devices.devices, plans, &mut |at| progress.at(at.done, at.total))?;
    Ok(engine)
}
