//! How work is cut for a class of devices. Results differ between classes only in the order of sums.

use crate::capabilities::Capabilities;
use backend_api::Capacity;

/// Kinds of devices that want work cut alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceClass {
    /// Shaders run on the CPU: few, large work groups, and few dispatches.
    Software,
    /// Thousands of invocations at once.
    Gpu,
}

/// The numbers that follow from the class.
#[derive(Clone, Debug)]
pub(crate) struct Tuning {
    pub class: DeviceClass,
    pub subgroup: u32,
    /// Invocations that work on a row together.
    pub row_threads: u32,
    /// Multiply-accumulates in a second, about; to cut long programs.
    pub macs_per_second: f64,
    /// A load costs the same whatever its width.
    pub wide_loads: bool,
    /// Cached rows below which a cache is not cut into chunks.
    chunk: u32,
    /// Work groups that fill the device.
    groups: u32,
}

/// How a matrix product is cut: rows of weights of each lane, and columns of activations, worked on at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProductShape {
    pub vectors: u32,
    pub columns: u32,
}

/// How attention is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub threads: u32,
    pub heads: u32,
    pub vectors: u32,
    /// Latent elements of each invocation.
    pub elements: u32,
    /// Cached rows of each work group.
    pub chunk: u32,
}

impl Tuning {
    pub(crate) fn new(class: Option<DeviceClass>, capabilities: &Capabilities) -> Self {
        let own = if capabilities.software { DeviceClass::Software } else { DeviceClass::Gpu };
        let class = class.unwrap_or(own);
        let subgroup = capabilities.subgroup;
        match class {
            DeviceClass::Software => Tuning {
                class,
                subgroup,
                row_threads: 32.max(subgroup),
                macs_per_second: 4e9,
                wide_loads: true,
                chunk: 1024,
                groups: 2,
            },
            DeviceClass::Gpu => Tuning {
                class,
                subgroup,
                row_threads: 256,
                macs_per_second: 1e12,
                wide_loads: false,
                chunk: 128,
                groups: 256,
            },
        }
    }

    /// For so many columns, and rows of weights in all.
    pub(crate) fn product(&self, columns: usize, rows: usize) -> ProductShape {
        let columns = match columns {
            0..=1 => 1,
            2 => 2,
            3..=7 => 4,
            _ => 8,
        };
        let lanes = rows as u32 / self.subgroup;
        let most = if columns > 4 { 2 } else { 4 };
        let vectors = (lanes / (4 * self.groups)).clamp(1, most).next_power_of_two().min(most);
        ProductShape { vectors, columns }
    }

    pub(crate) fn attention(&self, heads: u32, latent: u32, capacity: &Capacity) -> AttentionShape {
        let (threads, vectors) = match self.class {
            // Subgroups that wait for none other, where sums fit.
            DeviceClass::Software => (latent.div_ceil(8).next_power_of_two().clamp(8, 64), 4),
            DeviceClass::Gpu => (128, 1),
        };
        let threads = threads.max(self.subgroup);
        let elements = latent.div_ceil(threads).next_multiple_of(4);
        // Sums are registers.
        let most = (64 / elements).clamp(1, 8);
        let tile_heads = heads.next_power_of_two().min(1 << most.ilog2());
        let groups = (heads.div_ceil(tile_heads) as usize).saturating_mul(capacity.rows) as u32;
        let tile = threads * vectors;
        let chunk = if groups >= self.groups {
            u32::MAX
        } else {
            // At most 32 chunks, whose results have to be kept.
            let least = (capacity.kv_len as u64).div_ceil(32) as u32;
            self.chunk.max(least).next_multiple_of(tile)
        };
        AttentionShape { threads, heads: tile_heads, vectors, elements, chunk }
    }
}
