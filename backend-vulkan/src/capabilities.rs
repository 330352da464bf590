//! What a device offers and what its driver needs worked around, found out once, as named bits.

use crate::{instance::Instance, tuning::Arithmetic};
use ash::{ext, khr, vk};
use std::{ffi::CStr, ptr};

/// What a device offers beyond what every device must have.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Capabilities {
    /// Invocations of a subgroup: 8 to 128.
    pub subgroup: u32,
    /// Bytes of main memory can be used in place (`VK_EXT_external_memory_host`), at multiples of this.
    pub import_alignment: Option<u64>,
    /// Free memory is told (`VK_EXT_memory_budget`).
    pub memory_budget: bool,
    /// Largest buffer, and largest piece of memory.
    pub largest_buffer: u64,
    /// Nanoseconds of a timestamp's unit, where the queue has timestamps.
    pub timestamp_period: Option<f32>,
    /// Invocations of a work group: 128 or more.
    pub largest_group: u32,
    /// Work groups of an axis.
    pub largest_count: u32,
    /// Bytes of memory that a work group may share: 16 KiB or more.
    pub shared_memory: u32,
    /// Memory is main memory, so that importing a file's map costs nothing later.
    pub shares_memory: bool,
    /// The driver runs shaders on the CPU: dispatches are dear, and loads of one lane as dear as of all.
    pub software: bool,
    /// Four products of bytes are summed at once (`VK_KHR_shader_integer_dot_product`).
    pub integer_dots: bool,
    /// There is an instruction for it.
    pub fast_integer_dots: bool,
    /// Rows, columns and depth of matrices of 16-bit floats that a subgroup multiplies, summing in f32
    /// (`VK_KHR_cooperative_matrix`).
    pub matrix: Option<[u32; 3]>,
}

/// Which of the features a device lacks without which no shader of ours runs, by the names that Vulkan gives them.
pub(crate) fn missing(instance: &Instance, device: vk::PhysicalDevice) -> Vec<&'static str> {
    let mut features11 = vk::PhysicalDeviceVulkan11Features::default();
    let mut features12 = vk::PhysicalDeviceVulkan12Features::default();
    let mut features =
        vk::PhysicalDeviceFeatures2::default().push_next(&mut features11).push_next(&mut features12);
    // SAFETY: the device is of this instance and, as the caller has seen, of version 1.2.
    unsafe { instance.functions().get_physical_device_features2(device, &mut features) };
    let long = features.features.shader_int64;
    let subgroups = instance.subgroups(device);
    let (control, sizes) = subgroup_control(instance, device);
    // Lanes are counted on: without these a work group's subgroups may have any size.
    let sized = sizes.required_subgroup_size_stages.contains(vk::ShaderStageFlags::COMPUTE)
        && (sizes.min_subgroup_size..=sizes.max_subgroup_size).contains(&subgroups.subgroup_size);
    let wanted = [
        (long, "shaderInt64"),
        (features11.storage_buffer16_bit_access, "storageBuffer16BitAccess"),
        (features12.buffer_device_address, "bufferDeviceAddress"),
        (features12.scalar_block_layout, "scalarBlockLayout"),
        (features12.shader_subgroup_extended_types, "shaderSubgroupExtendedTypes"),
        (features12.timeline_semaphore, "timelineSemaphore"),
        (control.subgroup_size_control, "subgroupSizeControl"),
        (control.compute_full_subgroups, "computeFullSubgroups"),
        (vk::Bool32::from(sized), "a subgroup size that compute shaders may require"),
    ];
    let operations = vk::SubgroupFeatureFlags::BASIC
        | vk::SubgroupFeatureFlags::ARITHMETIC
        | vk::SubgroupFeatureFlags::BALLOT
        | vk::SubgroupFeatureFlags::SHUFFLE;
    let mut missing: Vec<&str> =
        wanted.into_iter().filter(|(has, _)| *has == vk::FALSE).map(|(_, name)| name).collect();
    if !subgroups.supported_operations.contains(operations)
        || !subgroups.supported_stages.contains(vk::ShaderStageFlags::COMPUTE)
    {
        missing.push("subgroup arithmetic, ballot and shuffle in compute shaders");
    }
    if !(8..=128).contains(&subgroups.subgroup_size) {
        missing.push("subgroups of 8 to 128 invocations");
    }
    missing
}

/// How subgroups' sizes can be asked for; nothing where they cannot.
fn subgroup_control(
    instance: &Instance,
    device: vk::PhysicalDevice,
) -> (
    vk::PhysicalDeviceSubgroupSizeControlFeatures<'static>,
    vk::PhysicalDeviceSubgroupSizeControlProperties<'static>,
) {
    let mut control = vk::PhysicalDeviceSubgroupSizeControlFeatures::default();
    let mut sizes = vk::PhysicalDeviceSubgroupSizeControlProperties::default();
    if instance.has_or_is_1_3(device, ext::subgroup_size_control::NAME) {
        let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut control);
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut sizes);
        // SAFETY: the device is of this instance and has the extension, or version 1.3, whose structures are chained.
        unsafe {
            instance.functions().get_physical_device_features2(device, &mut features);
            instance.functions().get_physical_device_properties2(device, &mut properties);
        }
    }
    control.p_next = ptr::null_mut();
    sizes.p_next = ptr::null_mut();
    (control, sizes)
}

/// The extensions that a device of these capabilities is made with.
pub(crate) fn extensions(
    instance: &Instance,
    device: vk::PhysicalDevice,
    capabilities: &Capabilities,
) -> Vec<&'static CStr> {
    let wanted = [
        (capabilities.import_alignment.is_some(), ext::external_memory_host::NAME),
        (capabilities.memory_budget, ext::memory_budget::NAME),
        (capabilities.matrix.is_some(), khr::cooperative_matrix::NAME),
        (capabilities.integer_dots, khr::shader_integer_dot_product::NAME),
        (true, ext::subgroup_size_control::NAME),
        (true, khr::maintenance4::NAME),
    ];
    // The last three are core in Vulkan 1.3, where a driver need not list them.
    let listed = |(wanted, name): &(bool, &'static CStr)| *wanted && instance.has(device, name);
    wanted.into_iter().filter(listed).map(|(_, name)| name).collect()
}

/// Whether four products of bytes are summed at once, and whether by one instruction.
fn integer_dots(instance: &Instance, device: vk::PhysicalDevice) -> (bool, bool) {
    if !instance.has_or_is_1_3(device, khr::shader_integer_dot_product::NAME) {
        return (false, false);
    }
    let mut offered = vk::PhysicalDeviceShaderIntegerDotProductFeatures::default();
    let mut how = vk::PhysicalDeviceShaderIntegerDotProductProperties::default();
    let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut offered);
    let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut how);
    // SAFETY: the device is of this instance and has the extension whose structures are chained.
    unsafe {
        instance.functions().get_physical_device_features2(device, &mut features);
        instance.functions().get_physical_device_properties2(device, &mut properties);
    }
    let offered = offered.shader_integer_dot_product != vk::FALSE;
    (offered, offered && how.integer_dot_product4x8_bit_packed_signed_accelerated != vk::FALSE)
}

/// The first shape of matrices that our shader can use: tiles are multiples of 16 rows and columns, a unit of 32 values.
fn matrix(instance: &Instance, device: vk::PhysicalDevice) -> Option<[u32; 3]> {
    if !instance.has(device, khr::cooperative_matrix::NAME) {
        return None;
    }
    let mut twelve = vk::PhysicalDeviceVulkan12Features::default();
    let mut offered = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default();
    let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut twelve).push_next(&mut offered);
    // SAFETY: the device is of this instance and has the extension whose structure is chained.
    unsafe { instance.functions().get_physical_device_features2(device, &mut features) };
    // A device whose memory model is Vulkan's has to know the device's scope, too, which atomics of other shaders have.
    let needed = [
        offered.cooperative_matrix,
        twelve.shader_float16,
        twelve.vulkan_memory_model,
        twelve.vulkan_memory_model_device_scope,
    ];
    if needed.contains(&vk::FALSE) {
        return None;
    }
    let (half, single) = (vk::ComponentTypeKHR::FLOAT16, vk::ComponentTypeKHR::FLOAT32);
    let suits = |shape: &vk::CooperativeMatrixPropertiesKHR<'_>| {
        (shape.a_type, shape.b_type, shape.c_type, shape.result_type) == (half, half, single, single)
            && shape.scope == vk::ScopeKHR::SUBGROUP
            && [shape.m_size, shape.n_size].iter().all(|size| *size > 0 && 16u32.is_multiple_of(*size))
            && matches!(shape.k_size, 8 | 16 | 32)
    };
    instance.matrix(device, suits)
}

/// A vendor's number with the PCI.
const INTEL: u32 = 0x8086;

impl Capabilities {
    pub(crate) fn of(instance: &Instance, device: vk::PhysicalDevice, family: u32) -> Self {
        let functions = instance.functions();
        // SAFETY: the device is of this instance.
        let basic = unsafe { functions.get_physical_device_properties(device) };
        let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let mut eleven = vk::PhysicalDeviceVulkan11Properties::default();
        let mut sizes = vk::PhysicalDeviceMaintenance4Properties::default();
        let has = |name: &CStr| instance.has(device, name);
        let imports = has(ext::external_memory_host::NAME);
        let maintenance4 = instance.has_or_is_1_3(device, khr::maintenance4::NAME);
        let mut all = vk::PhysicalDeviceProperties2::default().push_next(&mut eleven);
        if imports {
            all = all.push_next(&mut host);
        }
        if maintenance4 {
            all = all.push_next(&mut sizes);
        }
        // SAFETY: only structures of extensions that the device has are chained.
        unsafe { functions.get_physical_device_properties2(device, &mut all) };
        // SAFETY: the device is of this instance, and the caller has the family from it.
        let families = unsafe { functions.get_physical_device_queue_family_properties(device) };
        let timestamps = families[family as usize].timestamp_valid_bits > 0;
        let kind = basic.device_type;
        let (integer_dots, fast_integer_dots) = integer_dots(instance, device);
        let mut largest_buffer = eleven.max_memory_allocation_size;
        if maintenance4 {
            largest_buffer = largest_buffer.min(sizes.max_buffer_size);
        }
        let named = instance.subgroups(device).subgroup_size;
        let sizes = subgroup_control(instance, device).1;
        // A lane of 32 has half the registers of a lane of 16 there, too few for our kernels; the driver names 32.
        let short_of_registers = basic.vendor_id == INTEL;
        Capabilities {
            subgroup: match short_of_registers {
                true => 16.clamp(sizes.min_subgroup_size, sizes.max_subgroup_size),
                false => named,
            },
            import_alignment: imports.then_some(host.min_imported_host_pointer_alignment),
            memory_budget: has(ext::memory_budget::NAME),
            largest_buffer,
            timestamp_period: timestamps.then_some(basic.limits.timestamp_period),
            largest_count: basic.limits.max_compute_work_group_count.into_iter().min().unwrap_or(65535),
            largest_group: basic
                .limits
                .max_compute_work_group_invocations
                .min(basic.limits.max_compute_work_group_size[0]),
            shared_memory: basic.limits.max_compute_shared_memory_size,
            shares_memory: matches!(
                kind,
                vk::PhysicalDeviceType::CPU | vk::PhysicalDeviceType::INTEGRATED_GPU
            ),
            software: kind == vk::PhysicalDeviceType::CPU,
            integer_dots,
            fast_integer_dots,
            matrix: matrix(instance, device),
        }
    }

    /// What stands in the way of an arithmetic.
    pub(crate) fn offers_arithmetic(&self, arithmetic: Arithmetic) -> Result<(), &'static str> {
        match arithmetic {
            Arithmetic::IntegerDots if !self.integer_dots => {
                Err("its driver lacks shaderIntegerDotProduct, which integer dot products need")
            }
            Arithmetic::CooperativeMatrices if self.matrix.is_none() => {
                Err("its driver lacks cooperative matrices of 16-bit floats that are summed in f32")
            }
            _ => Ok(()),
        }
    }

    /// In words, for people.
    pub(crate) fn offers(&self) -> Vec<String> {
        let subgroups = format!("subgroups of {}", self.subgroup);
        let named = [
            (self.software, "runs on the CPU"),
            (self.shares_memory, "shares main memory"),
            (self.import_alignment.is_some(), "imports host memory"),
            (self.memory_budget, "tells free memory"),
            (self.timestamp_period.is_some(), "timestamps"),
            (self.fast_integer_dots, "integer dot products"),
            (self.matrix.is_some(), "cooperative matrices"),
        ];
        let has = named.into_iter().filter(|(has, _)| *has).map(|(_, name)| name.to_owned());
        has.chain([subgroups]).collect()
    }
}
