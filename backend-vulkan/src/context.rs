//! A device as everything made from it shares it: functions, queue, allocator, pipelines.

use crate::{
    VulkanError, VulkanOptions,
    capabilities::{self, Capabilities},
    instance::{Instance, Messages, OLDEST_VERSION},
    memory::Memory,
    pipelines::Pipelines,
    tuning::{Arithmetic, DeviceClass},
};
use ash::{ext, vk};
use backend_api::{DeviceError, DeviceInfo};
use gpu_allocator::{
    AllocationSizes, AllocatorDebugSettings, MemoryLocation,
    vulkan::{Allocator, AllocatorCreateDesc},
};
use std::{
    collections::HashSet,
    ffi::CString,
    mem::ManuallyDrop,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// What everything made from a device keeps alive.
pub(crate) struct Context {
    pub info: DeviceInfo,
    /// Unlike every other device's of this process; buffers remember it.
    pub id: u64,
    pub device: ash::Device,
    pub capabilities: Capabilities,
    pub pipelines: Pipelines,
    pub queue_family: u32,
    /// Copies always go through staging memory, also where the device's can be written to directly.
    pub always_stage: bool,
    pub class: Option<DeviceClass>,
    pub arithmetic: Option<Arithmetic>,
    pub megamacs_per_second: Option<u32>,
    pub host_import: Option<ext::external_memory_host::Device>,
    pub physical: vk::PhysicalDevice,
    debug: Option<ext::debug_utils::Device>,
    queue: Mutex<Queue>,
    allocator: ManuallyDrop<Mutex<Allocator>>,
    /// Set when the driver says that the device is lost.
    lost: AtomicBool,
    /// Set, before `lost` is, when the device does not answer: what it may still use is never freed.
    hung: AtomicBool,
    /// What tests want to go wrong.
    faults: Mutex<Vec<Fault>>,
    /// What [`scratch`](Context::scratch) made last.
    scratch: Mutex<Weak<Memory>>,
    /// Main memory, by address and size, that the driver did not import when asked to.
    pub refused_imports: Mutex<HashSet<(usize, usize)>>,
    /// Bytes of our own buffers.
    pub allocated: AtomicU64,
    instance: Arc<Instance>,
}

/// The one queue, and how far it is.
pub(crate) struct Queue {
    handle: vk::Queue,
    timeline: vk::Semaphore,
    submitted: u64,
}

/// How long a device may be busy without ending a submission before it is called lost. A GPU's take a fraction of a second
/// each; a driver that runs shaders on the CPU has no watchdog, compiles them meanwhile, and shares it with others.
const PATIENCE: Duration = Duration::from_secs(60);
const PATIENCE_WITH_SOFTWARE: Duration = Duration::from_secs(3600);

/// A call into the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverCall {
    /// Memory for a buffer.
    Allocate,
    /// Reading bytes of main memory in place.
    Import,
    /// Handing work to the queue.
    Submit,
    /// Waiting until work is done.
    Wait,
}

/// What a driver may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The device is lost.
    Lost,
    /// There is no memory left on the device.
    OutOfMemory,
    /// The device has not ended its work in time.
    Timeout,
}

impl From<Failure> for vk::Result {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Lost => vk::Result::ERROR_DEVICE_LOST,
            Failure::OutOfMemory => vk::Result::ERROR_OUT_OF_DEVICE_MEMORY,
            Failure::Timeout => vk::Result::TIMEOUT,
        }
    }
}

/// A failure to come, after so many calls that go well.
struct Fault {
    call: DriverCall,
    after: usize,
    failure: Failure,
}

impl Context {
    pub(crate) fn open(index: usize, options: &VulkanOptions) -> Result<Arc<Self>, VulkanError> {
        let instance = Arc::new(Instance::open(options.validation)?);
        let found = instance.physical_devices()?;
        let Some(physical) = found.get(index).copied() else {
            return Err(VulkanError::NoSuchDevice { index, found: found.len() });
        };
        let info = instance.describe(index, physical);
        let refused =
            |lacks| VulkanError::Refused { device: format!("{} ({})", info.name, info.description), lacks };
        let queue_family = usable(&instance, physical).map_err(refused)?;
        let mut capabilities = Capabilities::of(&instance, physical, queue_family);
        if let Some(largest) = options.largest_buffer {
            capabilities.largest_buffer = capabilities.largest_buffer.min(largest);
        }
        if let Some(arithmetic) = options.arithmetic {
            capabilities.offers_arithmetic(arithmetic).map_err(|lacks| refused(lacks.to_owned()))?;
            if options.class == Some(DeviceClass::Software) {
                return Err(refused("cut as for software it has no arithmetic but floats".to_owned()));
            }
        }
        let device = create_device(&instance, physical, queue_family, &capabilities)?;
        let context =
            Self::equip(instance, physical, device.clone(), queue_family, capabilities, info, options);
        if context.is_err() {
            // SAFETY: what was made from it was undone.
            unsafe { device.destroy_device(None) };
        }
        context
    }

    /// Everything that a device needs beside itself. On an error nothing of it is left.
    fn equip(
        instance: Arc<Instance>,
        physical: vk::PhysicalDevice,
        device: ash::Device,
        queue_family: u32,
        capabilities: Capabilities,
        info: DeviceInfo,
        options: &VulkanOptions,
    ) -> Result<Arc<Self>, VulkanError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let call = |call| move |result: vk::Result| VulkanError::Call { call, result: result.to_string() };
        // SAFETY: the queue was asked for.
        let handle = unsafe { device.get_device_queue(queue_family, 0) };
        let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        let create = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
        // SAFETY: `create` lives through the call.
        let timeline =
            unsafe { device.create_semaphore(&create, None) }.map_err(call("vkCreateSemaphore"))?;
        let undo = |error: VulkanError| {
            // SAFETY: nothing uses it.
            unsafe { device.destroy_semaphore(timeline, None) };
            error
        };
        let allocator = Allocator::new(&AllocatorCreateDesc {
            instance: instance.functions().clone(),
            device: device.clone(),
            physical_device: physical,
            debug_settings: AllocatorDebugSettings::default(),
            buffer_device_address: true,
            // What is larger gets memory of its own.
            allocation_sizes: AllocationSizes::new(64 << 20, 16 << 20),
        })
        .map_err(|error| {
            undo(VulkanError::Call { call: "the allocator's start", result: error.to_string() })
        })?;
        let pipelines = Pipelines::new(&instance, physical, &device, &capabilities, options).map_err(undo)?;
        let debug =
            instance.validates().then(|| ext::debug_utils::Device::new(instance.functions(), &device));
        let host_import = (capabilities.shares_memory && capabilities.import_alignment.is_some())
            .then(|| ext::external_memory_host::Device::new(instance.functions(), &device));
        Ok(Arc::new(Context {
            info,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            capabilities,
            pipelines,
            queue_family,
            always_stage: options.always_stage,
            class: options.class,
            arithmetic: options.arithmetic,
            megamacs_per_second: options.megamacs_per_second,
            host_import,
            physical,
            debug,
            queue: Mutex::new(Queue { handle, timeline, submitted: 0 }),
            allocator: ManuallyDrop::new(Mutex::new(allocator)),
            lost: AtomicBool::new(false),
            hung: AtomicBool::new(false),
            faults: Mutex::default(),
            scratch: Mutex::default(),
            refused_imports: Mutex::default(),
            allocated: AtomicU64::new(0),
            device,
            instance,
        }))
    }

    pub(crate) fn allocator(&self) -> MutexGuard<'_, Allocator> {
        lock(&self.allocator)
    }

    /// What the validation layer complains about.
    pub(crate) fn complaints(&self) -> Messages {
        self.instance.complaints()
    }

    /// Bytes that are free now, as far as the driver tells; where it does not, those that we have not taken.
    pub(crate) fn free(&self) -> u64 {
        let free = self.instance.memory(self.physical, OLDEST_VERSION).1;
        match self.capabilities.memory_budget {
            true => free,
            false => free.saturating_sub(self.allocated.load(Ordering::Relaxed)),
        }
    }

    /// Gives an object the name that validation messages call it by.
    pub(crate) fn name<T: vk::Handle>(&self, object: T, name: &str) {
        if let (Some(debug), Ok(name)) = (&self.debug, CString::new(name)) {
            let info = vk::DebugUtilsObjectNameInfoEXT::default().object_handle(object).object_name(&name);
            // SAFETY: the object is of this device and alive. A name that is not given is no loss.
            let _ = unsafe { debug.set_debug_utils_object_name(&info) };
        }
    }

    /// A driver's answer as an error, which says what was being done.
    pub(crate) fn error(&self, what: &str, result: vk::Result) -> DeviceError {
        let device = self.info.name.clone();
        let reason = format!("{what}: {result}");
        match result {
            vk::Result::ERROR_DEVICE_LOST => {
                self.lose(false);
                DeviceError::Lost { device, reason }
            }
            _ => DeviceError::Driver { device, reason },
        }
    }

    pub(crate) fn fault(&self, reason: String) -> DeviceError {
        DeviceError::Driver { device: self.info.name.clone(), reason }
    }

    /// From now on the device is lost. One that is `hung` may still use what is ours.
    fn lose(&self, hung: bool) {
        if hung {
            self.hung.store(true, Ordering::Release);
        }
        self.lost.store(true, Ordering::Release);
    }

    /// From now on one call, after so many that go well and after those that are to fail already, fails.
    pub(crate) fn fail(&self, call: DriverCall, after: usize, failure: Failure) {
        lock(&self.faults).push(Fault { call, after, failure });
    }

    /// What is to go wrong at this call.
    pub(crate) fn fault_of(&self, call: DriverCall) -> Option<vk::Result> {
        let mut faults = lock(&self.faults);
        let index = faults.iter().position(|fault| fault.call == call)?;
        match faults[index].after.checked_sub(1) {
            Some(left) => {
                faults[index].after = left;
                None
            }
            None => Some(faults.remove(index).failure.into()),
        }
    }

    /// Nothing goes to a device that was lost.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        if self.lost.load(Ordering::Acquire) {
            let (device, reason) = (self.info.name.clone(), "it was lost before".to_owned());
            return Err(DeviceError::Lost { device, reason });
        }
        Ok(())
    }

    /// Memory that programs share, of so many bytes or more. They run one after the other, as all pieces of one are handed to
    /// the queue together, and leave nothing there that is read later.
    pub(crate) fn scratch(self: &Arc<Self>, bytes: usize) -> Result<Arc<Memory>, DeviceError> {
        let mut last = lock(&self.scratch);
        if let Some(memory) = last.upgrade().filter(|memory| memory.room() >= bytes) {
            return Ok(memory);
        }
        let memory = Memory::new(self, "partial results", bytes, MemoryLocation::GpuOnly)?;
        let memory = Arc::new(memory);
        *last = Arc::downgrade(&memory);
        Ok(memory)
    }

    /// A pool of command buffers that may be recorded again and again.
    pub(crate) fn command_pool(&self) -> Result<vk::CommandPool, DeviceError> {
        let create = vk::CommandPoolCreateInfo::default()
            .queue_family_index(self.queue_family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: `create` lives through the call.
        let pool = unsafe { self.device.create_command_pool(&create, None) };
        pool.map_err(|result| self.error("vkCreateCommandPool", result))
    }

    /// One command buffer of a pool.
    ///
    /// # Safety
    /// The pool is of this device, and nobody else uses it now.
    pub(crate) unsafe fn command_buffer(
        &self,
        pool: vk::CommandPool,
    ) -> Result<vk::CommandBuffer, DeviceError> {
        let create = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
        // SAFETY: the caller's.
        let commands = unsafe { self.device.allocate_command_buffers(&create) };
        Ok(commands.map_err(|result| self.error("vkAllocateCommandBuffers", result))?[0])
    }

    /// Hands submissions of some command buffers each to the queue; the number to [wait](Context::wait) for.
    pub(crate) fn submit(&self, submissions: &[Vec<vk::CommandBuffer>]) -> Result<u64, DeviceError> {
        let mut queue = lock(&self.queue);
        // While locked: once somebody has seen that the device is lost and idle, nothing more comes.
        self.check()?;
        for buffers in submissions {
            let semaphores = [queue.timeline];
            let values = [queue.submitted + 1];
            let mut timeline = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
            let submit = [vk::SubmitInfo::default()
                .command_buffers(buffers)
                .signal_semaphores(&semaphores)
                .push_next(&mut timeline)];
            let submitted = match self.fault_of(DriverCall::Submit) {
                Some(result) => Err(result),
                // SAFETY: the commands were recorded from this device and are not running, which their owner sees to;
                // the queue is ours while locked.
                None => unsafe { self.device.queue_submit(queue.handle, &submit, vk::Fence::null()) },
            };
            if let Err(result) = submitted {
                // What went before may run; its owner will not wait for it.
                // SAFETY: the queue is ours while locked.
                if unsafe { self.device.queue_wait_idle(queue.handle) }.is_err() {
                    self.lose(result != vk::Result::ERROR_DEVICE_LOST);
                    let (device, reason) = (self.info.name.clone(), format!("vkQueueSubmit: {result}"));
                    return Err(DeviceError::Lost { device, reason });
                }
                return Err(self.error("vkQueueSubmit", result));
            }
            queue.submitted += 1;
        }
        Ok(queue.submitted)
    }

    /// Submissions so far.
    pub(crate) fn submissions(&self) -> u64 {
        lock(&self.queue).submitted
    }

    /// Waits until everything up to submission `number` is done.
    pub(crate) fn wait(&self, number: u64) -> Result<(), DeviceError> {
        let timeline = lock(&self.queue).timeline;
        let patience = if self.capabilities.software { PATIENCE_WITH_SOFTWARE } else { PATIENCE };
        self.wait_while_it_works(timeline, number, patience).map_err(|result| {
            // Whatever the reason, what was submitted may still run: nothing of ours may touch it again.
            self.lose(result != vk::Result::ERROR_DEVICE_LOST);
            let reason = match result {
                vk::Result::ERROR_DEVICE_LOST => result.to_string(),
                vk::Result::TIMEOUT => format!("no answer for {} s", patience.as_secs()),
                other => format!("vkWaitSemaphores: {other}"),
            };
            DeviceError::Lost { device: self.info.name.clone(), reason }
        })
    }

    /// Waits as long as submissions end now and then.
    fn wait_while_it_works(
        &self,
        timeline: vk::Semaphore,
        number: u64,
        patience: Duration,
    ) -> Result<(), vk::Result> {
        if let Some(result) = self.fault_of(DriverCall::Wait) {
            return Err(result);
        }
        let (semaphores, values) = ([timeline], [number]);
        let wait = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&values);
        loop {
            // SAFETY: the semaphore is alive as long as `self`.
            let done = unsafe { self.device.get_semaphore_counter_value(timeline) }?;
            if done >= number {
                return Ok(());
            }
            // SAFETY: as above.
            let waited = unsafe { self.device.wait_semaphores(&wait, patience.as_nanos() as u64) };
            // SAFETY: as above.
            let now = unsafe { self.device.get_semaphore_counter_value(timeline) }?;
            if waited != Err(vk::Result::TIMEOUT) || now == done {
                return waited;
            }
        }
    }

    /// Waits until all that was submitted is done; at once where the device is idle.
    pub(crate) fn settle(&self) -> Result<(), DeviceError> {
        self.wait(self.submissions())
    }

    /// Before something is freed: whether the device has let go of it.
    pub(crate) fn lets_go(&self) -> bool {
        // A lost device runs nothing, and its semaphore may never come.
        if !self.lost.load(Ordering::Acquire) {
            let _ = self.settle();
        }
        let lost = self.lost.load(Ordering::Acquire);
        let hung = self.hung.load(Ordering::Acquire);
        if lost && !hung {
            let _queue = lock(&self.queue);
            // SAFETY: the device is alive, and its one queue is ours while locked.
            let _ = unsafe { self.device.device_wait_idle() };
        }
        !hung
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if !self.lets_go() {
            // The device stays, and an instance must outlive its devices.
            std::mem::forget(Arc::clone(&self.instance));
            return;
        }
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody else has the device: buffers and programs hold a `Context`, and nothing that was submitted runs
        // any more. Everything made here goes, the device last.
        unsafe {
            self.pipelines.destroy(&self.device);
            self.device.destroy_semaphore(queue.timeline, None);
            ManuallyDrop::drop(&mut self.allocator);
            self.device.destroy_device(None);
        }
    }
}

/// A mutex's content, however a thread that held it ended.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A queue family that computes, or what the device lacks.
pub(crate) fn usable(instance: &Instance, physical: vk::PhysicalDevice) -> Result<u32, String> {
    let functions = instance.functions();
    // SAFETY: `physical` comes from this instance, which is alive.
    let version = unsafe { functions.get_physical_device_properties(physical) }.api_version;
    if version < OLDEST_VERSION {
        let (major, minor) = (vk::api_version_major(version), vk::api_version_minor(version));
        return Err(format!("expected Vulkan 1.2 or newer, found {major}.{minor}"));
    }
    let missing = capabilities::missing(instance, physical);
    if !missing.is_empty() {
        return Err(format!("its driver lacks {}", missing.join(", ")));
    }
    // SAFETY: as above.
    let families = unsafe { functions.get_physical_device_queue_family_properties(physical) };
    let computes = |family: &vk::QueueFamilyProperties| family.queue_flags.contains(vk::QueueFlags::COMPUTE);
    match families.iter().position(computes) {
        Some(family) => Ok(family as u32),
        None => Err(format!("none of its {} queue families computes", families.len())),
    }
}

fn create_device(
    instance: &Instance,
    physical: vk::PhysicalDevice,
    family: u32,
    capabilities: &Capabilities,
) -> Result<ash::Device, VulkanError> {
    let queue = [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
    let mut control = vk::PhysicalDeviceSubgroupSizeControlFeatures::default()
        .subgroup_size_control(true)
        .compute_full_subgroups(true);
    let mut dots =
        vk::PhysicalDeviceShaderIntegerDotProductFeatures::default().shader_integer_dot_product(true);
    let mut matrices = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default().cooperative_matrix(true);
    let has_matrices = capabilities.matrix.is_some();
    let extensions = capabilities::extensions(instance, physical, capabilities);
    let extensions: Vec<_> = extensions.iter().map(|name| name.as_ptr()).collect();
    let basic = vk::PhysicalDeviceFeatures::default().shader_int64(true);
    let mut features11 = vk::PhysicalDeviceVulkan11Features::default().storage_buffer16_bit_access(true);
    let mut features12 = vk::PhysicalDeviceVulkan12Features::default()
        .buffer_device_address(true)
        .scalar_block_layout(true)
        .shader_subgroup_extended_types(true)
        .timeline_semaphore(true)
        .shader_float16(has_matrices)
        .vulkan_memory_model(has_matrices)
        .vulkan_memory_model_device_scope(has_matrices);
    let mut features = vk::PhysicalDeviceFeatures2::default()
        .features(basic)
        .push_next(&mut features11)
        .push_next(&mut features12)
        .push_next(&mut control);
    if capabilities.integer_dots {
        features = features.push_next(&mut dots);
    }
    if has_matrices {
        features = features.push_next(&mut matrices);
    }
    let create = vk::DeviceCreateInfo::default()
        .queue_create_infos(&queue)
        .enabled_extension_names(&extensions)
        .push_next(&mut features);
    // SAFETY: `physical` comes from this instance; `create` and what it points to live through the call; family,
    // extensions and features are the device's.
    let device = unsafe { instance.functions().create_device(physical, &create, None) };
    device.map_err(|result| VulkanError::Call { call: "vkCreateDevice", result: result.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;

    /// A copy beyond the end of a tensor, recorded and never submitted.
    #[test]
    fn a_validation_message_names_the_tensor() {
        let cache_folder = Some(env::temp_dir().join("fathom-test-pipelines"));
        let options = VulkanOptions { validation: true, cache_folder, ..VulkanOptions::default() };
        let context = match Context::open(0, &options) {
            Ok(context) => context,
            Err(error) => {
                use VulkanError::{NoDevice, NoLoader, NoValidation};
                assert!(env::var_os("FATHOM_REQUIRE_VULKAN").is_none(), "{error}");
                assert!(matches!(error, NoLoader(_) | NoDevice(_) | NoValidation(_)), "{error}");
                return println!("skipped: {error}");
            }
        };
        let new = |name| Memory::new(&context, name, 1024, MemoryLocation::GpuOnly).expect("room");
        let (weight, other) = (new("blk.0.attn_q.weight"), new("scratch"));
        let pool = context.command_pool().expect("a pool");
        let beyond = [vk::BufferCopy::default().size(1 << 20)];
        // SAFETY: the commands are of a new pool, which goes before the buffers do. The copy is wrong, as it should be: drivers
        // only note it down, and it is never submitted.
        unsafe {
            let commands = context.command_buffer(pool).expect("a command buffer");
            let begin = vk::CommandBufferBeginInfo::default();
            context.device.begin_command_buffer(commands, &begin).expect("recording");
            context.device.cmd_copy_buffer(commands, weight.buffer(), other.buffer(), &beyond);
            context.device.destroy_command_pool(pool, None);
        }
        let complaints = lock(&context.complaints()).join("\n");
        assert!(complaints.contains("blk.0.attn_q.weight"), "{complaints:?}");
    }
}
