//! What helps where a device fails: the options, in the words that users have for them.

use crate::{
    Error,
    model::{is_cache, is_experts, layer_and_part},
};
use backend_api::DeviceError;
use graph::{Devices, LoadError, RunError};

impl Error {
    /// What a device said, if it is that.
    fn of_device(&self) -> Option<&DeviceError> {
        match self {
            Error::Load(LoadError::Device { error, .. }) | Error::Run(RunError::Device { error, .. }) => {
                Some(error)
            }
            Error::Advised { error, .. } => error.of_device(),
            _ => None,
        }
    }

    /// The device whose loss this error tells of.
    pub fn lost_device(&self) -> Option<&str> {
        match self.of_device()? {
            DeviceError::Lost { device, .. } => Some(device),
            _ => None,
        }
    }

    /// With the options that need less of an accelerator that has no room: by what the room was for.
    pub(crate) fn advised(self, devices: &Devices) -> Error {
        let Some(DeviceError::OutOfMemory { device, .. }) = self.of_device() else { return self };
        if *device == devices[devices.host()].info().name {
            return self;
        }
        let less = match &self {
            Error::Load(LoadError::Device { name, .. }) if is_cache(name) => {
                "--no-kv-offload keeps caches on the host, a smaller --ctx or --cache-type makes them smaller"
            }
            Error::Load(LoadError::Device { name, .. })
                if layer_and_part(name).is_some_and(|(_, part)| is_experts(part)) =>
            {
                "--cpu-moe or --n-cpu-moe keeps experts on the host, a smaller --n-gpu-layers whole layers"
            }
            Error::Load(_) => "a smaller --n-gpu-layers or an --override-tensor keeps weights on the host",
            _ => {
                "a smaller --batch or --ctx makes steps smaller, a smaller --n-gpu-layers leaves room for them"
            }
        };
        let advice = format!("{less}, --fit {device}=BYTES puts no more there than that");
        Error::Advised { error: self.into(), advice }
    }
}
