//! The loader and the instance: opened together, closed together.

use crate::{VulkanError, context::lock};
use ash::{Entry, Instance as Functions, ext, khr, vk};
use backend_api::{DeviceInfo, DeviceKind};
use std::{
    borrow::Cow,
    ffi::{CStr, c_char, c_void},
    ptr,
    sync::{Arc, Mutex},
};

/// The oldest version whose core has all that Fathom needs (subgroups, 8/16-bit storage, timeline semaphores).
pub(crate) const OLDEST_VERSION: u32 = vk::API_VERSION_1_2;

/// The newest version that Fathom knows: drivers of it, and newer ones, need not list what its core has by extensions' names.
const NEWEST_VERSION: u32 = vk::API_VERSION_1_3;

/// The Vulkan library, and our connection to it.
pub(crate) struct Instance {
    // Dropped after `drop` has destroyed the instance: the functions live in the library that it keeps open.
    functions: Functions,
    validation: Option<Validation>,
    _library: Entry,
}

/// The validation layer's complaints.
struct Validation {
    functions: ext::debug_utils::Instance,
    messenger: vk::DebugUtilsMessengerEXT,
    /// In a place of its own, whose address the layer keeps.
    messages: Messages,
}

/// What the validation layer has complained about; outlives what it was about.
pub(crate) type Messages = Arc<Mutex<Vec<String>>>;

const LAYER: &CStr = c"VK_LAYER_KHRONOS_validation";

/// Collects a complaint. Nothing is done with it here: a panic must not cross the layer.
unsafe extern "system" fn collect(
    _severity: vk::DebugUtilsMessageSeverityFlagsEXT,
    _kinds: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    user: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: the layer passes valid data, and the `user` that the messenger was made with, which outlives it.
    let (message, messages) = unsafe { ((*data).message_as_c_str(), &*user.cast::<Mutex<Vec<String>>>()) };
    let text = message.map_or(Cow::Borrowed("a message without text"), CStr::to_string_lossy);
    lock(messages).push(text.into_owned());
    vk::FALSE
}

impl Instance {
    /// With the validation layer, if wanted, which must then be there.
    pub(crate) fn open(validation: bool) -> Result<Self, VulkanError> {
        // SAFETY: the library is the system's Vulkan loader, whose initialisers we trust as every program that
        // links it does; it stays open as long as `self`.
        let library = unsafe { Entry::load() }.map_err(|e| VulkanError::NoLoader(e.to_string()))?;
        let application =
            vk::ApplicationInfo::default().application_name(c"fathom").api_version(NEWEST_VERSION);
        let messages = Messages::default();
        let mut messenger = vk::DebugUtilsMessengerCreateInfoEXT::default()
            .message_severity(
                vk::DebugUtilsMessageSeverityFlagsEXT::ERROR | vk::DebugUtilsMessageSeverityFlagsEXT::WARNING,
            )
            .message_type(
                vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION
                    | vk::DebugUtilsMessageTypeFlagsEXT::GENERAL
                    | vk::DebugUtilsMessageTypeFlagsEXT::PERFORMANCE,
            )
            .pfn_user_callback(Some(collect))
            .user_data(ptr::from_ref(&*messages).cast_mut().cast());
        let (layers, extensions) = ([LAYER.as_ptr()], [ext::debug_utils::NAME.as_ptr()]);
        let enabled = [vk::ValidationFeatureEnableEXT::SYNCHRONIZATION_VALIDATION];
        let mut features = vk::ValidationFeaturesEXT::default().enabled_validation_features(&enabled);
        let mut create = vk::InstanceCreateInfo::default().application_info(&application);
        if validation {
            // The instance's own making and end are watched too.
            create = create
                .enabled_layer_names(&layers)
                .enabled_extension_names(&extensions)
                .push_next(&mut features)
                .push_next(&mut messenger);
        }
        // SAFETY: `create` and what it points to live through the call.
        let created = unsafe { library.create_instance(&create, None) };
        let functions = created.map_err(|result| match result {
            vk::Result::ERROR_INCOMPATIBLE_DRIVER => VulkanError::NoDevice(result.to_string()),
            vk::Result::ERROR_LAYER_NOT_PRESENT => VulkanError::NoValidation(result.to_string()),
            other => VulkanError::Call { call: "vkCreateInstance", result: other.to_string() },
        })?;
        let mut instance = Instance { functions, validation: None, _library: library };
        if validation {
            let functions = ext::debug_utils::Instance::new(&instance._library, &instance.functions);
            messenger.p_next = ptr::null();
            // SAFETY: the instance has the extension; `messages` lives in it, until the messenger is gone.
            let made = unsafe { functions.create_debug_utils_messenger(&messenger, None) };
            let messenger = made.map_err(|result| VulkanError::Call {
                call: "vkCreateDebugUtilsMessengerEXT",
                result: result.to_string(),
            })?;
            instance.validation = Some(Validation { functions, messenger, messages });
        }
        Ok(instance)
    }

    /// What the validation layer complains about; always empty without it.
    pub(crate) fn complaints(&self) -> Messages {
        self.validation.as_ref().map(|validation| Arc::clone(&validation.messages)).unwrap_or_default()
    }

    pub(crate) fn validates(&self) -> bool {
        self.validation.is_some()
    }

    pub(crate) fn subgroups(
        &self,
        device: vk::PhysicalDevice,
    ) -> vk::PhysicalDeviceSubgroupProperties<'static> {
        let mut subgroups = vk::PhysicalDeviceSubgroupProperties::default();
        let mut all = vk::PhysicalDeviceProperties2::default().push_next(&mut subgroups);
        // SAFETY: the device is of this instance, and of version 1.1 or newer, as every one that is opened.
        unsafe { self.functions.get_physical_device_properties2(device, &mut all) };
        vk::PhysicalDeviceSubgroupProperties { p_next: ptr::null_mut(), ..subgroups }
    }

    /// Rows, columns and depth of the first cooperative matrices that suit, of a device that has the extension.
    pub(crate) fn matrix(
        &self,
        device: vk::PhysicalDevice,
        suits: impl Fn(&vk::CooperativeMatrixPropertiesKHR<'_>) -> bool,
    ) -> Option<[u32; 3]> {
        let functions = khr::cooperative_matrix::Instance::new(&self._library, &self.functions);
        // SAFETY: the device is of this instance and has the extension.
        let found = unsafe { functions.get_physical_device_cooperative_matrix_properties(device) };
        let shapes = found.unwrap_or_default();
        shapes.iter().find(|shape| suits(shape)).map(|shape| [shape.m_size, shape.n_size, shape.k_size])
    }

    pub(crate) fn functions(&self) -> &Functions {
        &self.functions
    }

    /// The machine's devices, in the loader's order; never empty.
    pub(crate) fn physical_devices(&self) -> Result<Vec<vk::PhysicalDevice>, VulkanError> {
        // SAFETY: the instance is alive.
        let found = unsafe { self.functions.enumerate_physical_devices() };
        let found = found.map_err(|result| VulkanError::Call {
            call: "vkEnumeratePhysicalDevices",
            result: result.to_string(),
        })?;
        if found.is_empty() {
            return Err(VulkanError::NoDevice("no driver shows a device".to_owned()));
        }
        Ok(found)
    }

    /// Facts about device number `index`.
    pub(crate) fn describe(&self, index: usize, device: vk::PhysicalDevice) -> DeviceInfo {
        // SAFETY: `device` comes from this instance, which is alive.
        let properties = unsafe { self.functions.get_physical_device_properties(device) };
        let kind = match properties.device_type {
            vk::PhysicalDeviceType::CPU => DeviceKind::Cpu,
            vk::PhysicalDeviceType::INTEGRATED_GPU => DeviceKind::IntegratedGpu,
            _ => DeviceKind::Gpu,
        };
        let (memory_total, memory_free) = self.memory(device, properties.api_version);
        let version = properties.api_version;
        let description = format!(
            "{} (Vulkan {}.{}.{})",
            text(&properties.device_name),
            vk::api_version_major(version),
            vk::api_version_minor(version),
            vk::api_version_patch(version),
        );
        let name = format!("vulkan{index}");
        // Repeatable, but not batch-invariant: shaders, and so the order of sums, follow the number of rows.
        DeviceInfo { name, description, kind, memory_total, memory_free, batch_invariant: false }
    }

    /// Total and free bytes of the largest device-local heap: others are windows into it, or what the CPU writes to. Free is
    /// what `VK_EXT_memory_budget` says; without it, all of them.
    pub(crate) fn memory(&self, device: vk::PhysicalDevice, version: u32) -> (u64, u64) {
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let knows_budget = version >= vk::API_VERSION_1_1 && self.has(device, ext::memory_budget::NAME);
        let heaps = if knows_budget {
            let mut all = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
            // SAFETY: the device has version 1.1 and the extension whose structure is chained.
            unsafe { self.functions.get_physical_device_memory_properties2(device, &mut all) };
            all.memory_properties
        } else {
            // SAFETY: `device` comes from this instance, which is alive.
            unsafe { self.functions.get_physical_device_memory_properties(device) }
        };
        let all = heaps.memory_heaps_as_slice().iter().enumerate();
        let own = all.filter(|(_, heap)| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
        let Some((index, heap)) = own.max_by_key(|(_, heap)| heap.size) else { return (0, 0) };
        let free = budget.heap_budget[index].saturating_sub(budget.heap_usage[index]);
        (heap.size, if knows_budget { free.min(heap.size) } else { heap.size })
    }

    /// Whether a device has what is an extension before version 1.3 and core from then on.
    pub(crate) fn has_or_is_1_3(&self, device: vk::PhysicalDevice, extension: &CStr) -> bool {
        // SAFETY: `device` comes from this instance, which is alive.
        let version = unsafe { self.functions.get_physical_device_properties(device) }.api_version;
        version >= vk::API_VERSION_1_3 || self.has(device, extension)
    }

    pub(crate) fn has(&self, device: vk::PhysicalDevice, extension: &CStr) -> bool {
        // SAFETY: `device` comes from this instance, which is alive.
        let found = unsafe { self.functions.enumerate_device_extension_properties(device) };
        found.is_ok_and(|all| all.iter().any(|one| one.extension_name_as_c_str() == Ok(extension)))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(validation) = &self.validation {
            // SAFETY: made from this instance, which is alive.
            unsafe { validation.functions.destroy_debug_utils_messenger(validation.messenger, None) };
        }
        // SAFETY: every device made from the instance holds a reference to it and is gone by now. What the instance's end
        // itself is complained about goes to `messages`, which live until all of `self` is dropped.
        unsafe { self.functions.destroy_instance(None) };
    }
}

fn text(fixed: &[c_char]) -> String {
    let bytes: Vec<u8> = fixed.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
