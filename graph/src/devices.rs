//! The devices a graph is spread over.

use backend_api::Device;
use std::{fmt, ops::Index, sync::Arc};

/// Index into [`Devices`].
pub type DeviceIndex = usize;

/// Devices in order of priority; the last is the host, where inputs come from.
#[derive(Clone)]
pub struct Devices(Vec<Arc<dyn Device>>);

impl Devices {
    /// The most devices a plan can have.
    pub const MAX: usize = 64;

    /// These devices; the last is the host.
    ///
    /// # Panics
    /// If there is none, or more than [`Devices::MAX`].
    pub fn new(devices: Vec<Arc<dyn Device>>) -> Self {
        assert!((1..=Self::MAX).contains(&devices.len()), "1 to 64 devices, found {}", devices.len());
        Devices(devices)
    }

    /// The host's index.
    pub fn host(&self) -> DeviceIndex {
        self.0.len() - 1
    }

    /// How many.
    #[allow(clippy::len_without_is_empty, reason = "there is always a host")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// In order of priority.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Device>> {
        self.0.iter()
    }

    /// The name of each; where devices share a name, the second is called `name#2`.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::with_capacity(self.len());
        for device in &self.0 {
            let name = &device.info().name;
            let mut unique = name.clone();
            let mut count = 1;
            while names.contains(&unique) {
                count += 1;
                unique = format!("{name}#{count}");
            }
            names.push(unique);
        }
        names
    }
}

impl Index<DeviceIndex> for Devices {
    type Output = Arc<dyn Device>;

    fn index(&self, index: DeviceIndex) -> &Arc<dyn Device> {
        &self.0[index]
    }
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
