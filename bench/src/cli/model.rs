//! Opening a model, and loading it with progress.

use super::{Failure, OpenDevices, Progress};
use clap::Args;
use model_deepseek::{Engine, Model, Options, Placed, Plans};
use std::{path::PathBuf, sync::Arc};

/// Which model.
#[derive(Args, Clone, Debug)]
pub struct ModelOption {
    /// A GGUF file (of a split set, any of its files) or a Hugging Face directory
    #[arg(long, value_name = "FILE|DIR")]
    pub model: PathBuf,
}

impl ModelOption {
    /// Reads the model's header; notices go to standard error.
    ///
    /// # Errors
    /// What is wrong with the checkpoint.
    pub fn open(&self) -> Result<Arc<Model>, Failure> {
        Ok(opened(Model::open(&self.model)?))
    }
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

/// Plans, and loads the weights with a bar.
///
/// # Errors
/// Options that do not fit the model, weights that cannot be had, devices without room.
pub fn loaded(model: &Arc<Model>, devices: &OpenDevices, options: &Options) -> Result<Engine, Failure> {
    let plans = placed(model, devices, options)?;
    let progress = Progress::bytes("loading", 0);
    let engine = Engine::load(model, &devices.devices, plans, &mut |at| progress.at(at.done, at.total))?;
    Ok(engine)
}
