//! Shaders as pipelines: made when first wanted, kept, and remembered on disk by the driver.

use crate::{VulkanError, VulkanOptions, capabilities::Capabilities, context::lock, instance::Instance};
use ash::vk;
use std::{
    collections::HashMap,
    env, fs,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

macro_rules! spirv {
    ($($name:literal)*) => {
        /// All shaders by name, as they are checked in.
        const SPIRV: &[(&str, &[u8])] = &[$(($name, include_bytes!(concat!("../spirv/", $name, ".spv")))),*];
    };
}

spirv! {
    "rows" "group" "attention_merge"
    "attention_f32" "attention_f16" "attention_q8_0"
    "attention_reduce_f32" "attention_reduce_f16" "attention_reduce_q8_0"
    "embed_f32" "embed_f16" "embed_bf16" "embed_q4_0" "embed_q4_1" "embed_q5_0" "embed_q5_1" "embed_q8_0"
    "embed_q2_k" "embed_q3_k" "embed_q4_k" "embed_q5_k" "embed_q6_k" "embed_iq4_nl" "embed_iq4_xs"
    "product_lanes_f32" "product_lanes_f16" "product_lanes_bf16" "product_lanes_q4_0" "product_lanes_q4_1"
    "product_lanes_q5_0" "product_lanes_q5_1" "product_lanes_q8_0" "product_lanes_q2_k" "product_lanes_q3_k"
    "product_lanes_q4_k" "product_lanes_q5_k" "product_lanes_q6_k" "product_lanes_iq4_nl"
    "product_lanes_iq4_xs"
    "product_reduce_f32" "product_reduce_f16" "product_reduce_bf16" "product_reduce_q4_0"
    "product_reduce_q4_1" "product_reduce_q5_0" "product_reduce_q5_1" "product_reduce_q8_0"
    "product_reduce_q2_k" "product_reduce_q3_k" "product_reduce_q4_k" "product_reduce_q5_k"
    "product_reduce_q6_k" "product_reduce_iq4_nl" "product_reduce_iq4_xs"
    "product_tiled_f32" "product_tiled_f16" "product_tiled_bf16" "product_tiled_q4_0" "product_tiled_q4_1"
    "product_tiled_q5_0" "product_tiled_q5_1" "product_tiled_q8_0" "product_tiled_q2_k" "product_tiled_q3_k"
    "product_tiled_q4_k" "product_tiled_q5_k" "product_tiled_q6_k" "product_tiled_iq4_nl"
    "product_tiled_iq4_xs"
    "product_dots_q4_0" "product_dots_q4_1" "product_dots_q5_0" "product_dots_q5_1" "product_dots_q8_0"
    "product_dots_q2_k" "product_dots_q3_k" "product_dots_q4_k" "product_dots_q5_k" "product_dots_q6_k"
    "product_dots_iq4_nl" "product_dots_iq4_xs"
    "product_matrix_q4_0" "product_matrix_q4_1" "product_matrix_q5_0" "product_matrix_q5_1"
    "product_matrix_q8_0" "product_matrix_q2_k" "product_matrix_q3_k" "product_matrix_q4_k"
    "product_matrix_q5_k" "product_matrix_q6_k" "product_matrix_iq4_nl" "product_matrix_iq4_xs"
}

/// Bytes of push constants that every device has.
pub(crate) const PUSH_BYTES: u32 = 128;

/// A shader with the numbers it is specialised by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shader {
    pub name: String,
    /// Values from `constant_id` 0 on; the first is the size of its work groups.
    pub constants: Vec<u32>,
    /// Whether weights are loaded eight bytes at a time.
    pub wide: bool,
    /// Its logic counts on subgroups of the device's size, all full.
    pub whole_subgroups: bool,
}

impl Shader {
    /// One that needs nothing but the size of its work groups.
    pub(crate) fn simple(name: &str, threads: u32) -> Self {
        Shader { name: name.to_owned(), constants: vec![threads], wide: false, whole_subgroups: false }
    }
}

/// `constant_id` of [`Shader::wide`].
const WIDE: u32 = 10;

/// The pipelines of a device.
pub(crate) struct Pipelines {
    pub layout: vk::PipelineLayout,
    cache: vk::PipelineCache,
    made: Mutex<HashMap<Shader, vk::Pipeline>>,
    /// How many were made when the cache was written.
    kept: AtomicUsize,
    file: Option<PathBuf>,
    notice: Option<String>,
    subgroup: u32,
    /// Told from those of other devices of this process that write the same file.
    id: u64,
}

impl Pipelines {
    pub(crate) fn new(
        instance: &Instance,
        physical: vk::PhysicalDevice,
        device: &ash::Device,
        capabilities: &Capabilities,
        options: &VulkanOptions,
    ) -> Result<Self, VulkanError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let call = |call| move |result: vk::Result| VulkanError::Call { call, result: result.to_string() };
        let push = [vk::PushConstantRange {
            stage_flags: vk::ShaderStageFlags::COMPUTE,
            offset: 0,
            size: PUSH_BYTES,
        }];
        let create = vk::PipelineLayoutCreateInfo::default().push_constant_ranges(&push);
        // SAFETY: `create` lives through the call.
        let layout = unsafe { device.create_pipeline_layout(&create, None) }
            .map_err(call("vkCreatePipelineLayout"))?;
        let file = cache_folder(options).map(|folder| folder.join(cache_name(instance, physical)));
        let (known, notice) = match file.as_ref().map(fs::read) {
            Some(Ok(bytes)) => match unseal(&bytes) {
                Some(data) => (data.to_vec(), None),
                None => {
                    let path = file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
                    (Vec::new(), Some(format!("ignoring the pipeline cache {path}, which is damaged")))
                }
            },
            Some(Err(error)) if error.kind() != std::io::ErrorKind::NotFound => {
                let path = file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
                (Vec::new(), Some(format!("ignoring the pipeline cache {path}: {error}")))
            }
            _ => (Vec::new(), None),
        };
        let make = |data: &[u8]| {
            let create = vk::PipelineCacheCreateInfo::default().initial_data(data);
            // SAFETY: `create` lives through the call. Data was written whole by us, for this driver.
            unsafe { device.create_pipeline_cache(&create, None) }
        };
        // What the driver refuses is done without.
        let cache = make(&known).or_else(|_| make(&[])).map_err(|result| {
            // SAFETY: nothing uses it.
            unsafe { device.destroy_pipeline_layout(layout, None) };
            call("vkCreatePipelineCache")(result)
        })?;
        let subgroup = capabilities.subgroup;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Pipelines {
            layout,
            cache,
            made: Mutex::default(),
            kept: AtomicUsize::new(0),
            file,
            notice,
            subgroup,
            id,
        })
    }

    /// What the user should know of the cache on disk.
    pub(crate) fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// `name` is called for one that is new.
    pub(crate) fn get(
        &self,
        device: &ash::Device,
        shader: &Shader,
        name: impl Fn(vk::Pipeline),
    ) -> Result<vk::Pipeline, vk::Result> {
        let mut made = lock(&self.made);
        if let Some(pipeline) = made.get(shader) {
            return Ok(*pipeline);
        }
        let pipeline = self.make(device, shader)?;
        name(pipeline);
        made.insert(shader.clone(), pipeline);
        Ok(pipeline)
    }

    fn make(&self, device: &ash::Device, shader: &Shader) -> Result<vk::Pipeline, vk::Result> {
        let found = SPIRV.iter().find(|(name, _)| *name == shader.name);
        let (_, bytes) = found.ok_or(vk::Result::ERROR_INITIALIZATION_FAILED)?;
        let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let create = vk::ShaderModuleCreateInfo::default().code(&words);
        // SAFETY: the words are SPIR-V that our compiler wrote.
        let module = unsafe { device.create_shader_module(&create, None) }?;
        let ids = (0..shader.constants.len() as u32).chain([WIDE]);
        let values: Vec<u32> = shader.constants.iter().copied().chain([u32::from(shader.wide)]).collect();
        let entries: Vec<_> = (0..)
            .zip(ids)
            .map(|(index, id)| vk::SpecializationMapEntry { constant_id: id, offset: 4 * index, size: 4 })
            .collect();
        let special =
            vk::SpecializationInfo::default().map_entries(&entries).data(bytemuck::cast_slice(&values));
        let mut stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main")
            .specialization_info(&special);
        let mut size = vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default();
        if shader.whole_subgroups {
            size = size.required_subgroup_size(self.subgroup);
            stage =
                stage.flags(vk::PipelineShaderStageCreateFlags::REQUIRE_FULL_SUBGROUPS).push_next(&mut size);
        }
        let create = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(self.layout)];
        // SAFETY: everything that `create` points to lives through the call.
        let made = unsafe { device.create_compute_pipelines(self.cache, &create, None) };
        // SAFETY: a module may go once its pipelines are made.
        unsafe { device.destroy_shader_module(module, None) };
        made.map(|pipelines| pipelines[0]).map_err(|(_, result)| result)
    }

    /// Writes the cache, if pipelines have come since it was written last: now, as nobody knows how the process ends.
    pub(crate) fn keep(&self, device: &ash::Device) {
        let made = lock(&self.made);
        if self.kept.swap(made.len(), Ordering::Relaxed) == made.len() {
            return;
        }
        let Some(file) = &self.file else { return };
        // What others have written since is kept, too.
        if let Some(other) = fs::read(file).ok().as_deref().and_then(unseal) {
            let create = vk::PipelineCacheCreateInfo::default().initial_data(other);
            // SAFETY: `create` lives through the call; both caches are of this device, and nobody makes pipelines with ours
            // while `made` is locked.
            unsafe {
                if let Ok(other) = device.create_pipeline_cache(&create, None) {
                    let _ = device.merge_pipeline_caches(self.cache, &[other]);
                    device.destroy_pipeline_cache(other, None);
                }
            }
        }
        // SAFETY: the cache is of this device.
        if let Ok(data) = unsafe { device.get_pipeline_cache_data(self.cache) } {
            // A cache that cannot be written costs time, nothing else.
            let _ = write_whole(file, self.id, &seal(&data));
        }
    }

    /// Destroys everything.
    ///
    /// # Safety
    /// `device` is that of [`Pipelines::new`]; no pipeline is in use or will be.
    pub(crate) unsafe fn destroy(&self, device: &ash::Device) {
        let made = lock(&self.made);
        // SAFETY: as the caller says.
        unsafe {
            for pipeline in made.values() {
                device.destroy_pipeline(*pipeline, None);
            }
            device.destroy_pipeline_cache(self.cache, None);
            device.destroy_pipeline_layout(self.layout, None);
        }
    }
}

/// Written beside and then renamed, so that nobody reads half a file.
fn write_whole(file: &PathBuf, id: u64, bytes: &[u8]) -> std::io::Result<()> {
    if fs::read(file).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = file.with_extension(format!("{}-{id}.tmp", std::process::id()));
    fs::write(&beside, bytes)?;
    fs::rename(&beside, file)
}

fn cache_folder(options: &VulkanOptions) -> Option<PathBuf> {
    if let Some(folder) = &options.cache_folder {
        return Some(folder.clone());
    }
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let base = |name: &str| env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    base("XDG_CACHE_HOME").or_else(home).or_else(|| base("LOCALAPPDATA")).map(|base| base.join("fathom"))
}

/// Another device or driver gets another file.
fn cache_name(instance: &Instance, physical: vk::PhysicalDevice) -> String {
    // SAFETY: the device is of this instance.
    let found = unsafe { instance.functions().get_physical_device_properties(physical) };
    let uuid: String = found.pipeline_cache_uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("vulkan-{:04x}-{:04x}-{:08x}-{uuid}.bin", found.vendor_id, found.device_id, found.driver_version)
}

const MAGIC: &[u8; 8] = b"fathomPC";

/// The driver's data, with a sum that tells damage.
fn seal(data: &[u8]) -> Vec<u8> {
    [MAGIC.as_slice(), &sum(data).to_le_bytes(), data].concat()
}

fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (magic, rest) = bytes.split_first_chunk()?;
    let (found, data) = rest.split_first_chunk()?;
    (magic == MAGIC && *found == sum(data).to_le_bytes()).then_some(data)
}

/// FNV-1a.
fn sum(data: &[u8]) -> u64 {
    data.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_is_told_from_a_whole_one() {
        let whole = seal(b"what a driver wrote");
        assert_eq!(unseal(&whole), Some(b"what a driver wrote".as_slice()));
        for cut in 0..whole.len() {
            assert_eq!(unseal(&whole[..cut]), None, "{cut} bytes");
            let mut damaged = whole.clone();
            damaged[cut] ^= 1;
            assert_eq!(unseal(&damaged), None, "byte {cut}");
        }
    }
}
