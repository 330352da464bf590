//! Opening whatever this machine has. Without a loader or a driver the tests say so and pass.

use backend_api::{BufferRequest, BufferUsage, DType, Device, Op, OpDesc, Precision, Shape, TensorDesc};
use backend_vulkan::{VulkanDevice, VulkanError};

/// The number of devices, or `None`, said aloud, where there are none.
fn devices() -> Option<usize> {
    match VulkanDevice::enumerate() {
        Ok(found) => Some(found.len()),
        Err(missing @ (VulkanError::NoLoader(_) | VulkanError::NoDevice(_))) => {
            println!("skipped: {missing}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn every_device_opens_as_it_was_listed() {
    if devices().is_none() {
        return;
    }
    for (index, listed) in VulkanDevice::enumerate().unwrap().into_iter().enumerate() {
        match VulkanDevice::open(index) {
            Ok(device) => {
                let info = device.info();
                assert_eq!(info.name, format!("vulkan{index}"));
                assert_eq!((&info.name, &info.description), (&listed.name, &listed.description));
                assert!(info.memory_total > 0 && info.memory_free <= info.memory_total);
            }
            Err(refused) => assert!(matches!(refused, VulkanError::Refused { .. }), "{refused}"),
        }
    }
}

#[test]
fn an_index_past_the_last_is_a_sentence() {
    match (VulkanDevice::open(1000), devices()) {
        (Err(VulkanError::NoSuchDevice { index: 1000, found }), Some(count)) => assert_eq!(found, count),
        (Err(VulkanError::NoLoader(_) | VulkanError::NoDevice(_)), None) => {}
        (result, found) => panic!("{result:?} with {found:?} devices"),
    }
}

#[test]
fn it_claims_no_operation_and_holds_no_memory() {
    if devices().is_none() {
        return;
    }
    let Ok(device) = VulkanDevice::open(0) else {
        println!("skipped: vulkan0 cannot be opened");
        return;
    };
    let inputs = vec![
        TensorDesc::new(DType::F32, Shape::fixed(&[4, 8])),
        TensorDesc::new(DType::F32, Shape::rows(&[8])),
    ];
    let op = Op::MatMul { precision: Precision::Default };
    let outputs = op.infer(&inputs).unwrap();
    let refusal = device.supports(&OpDesc { op, inputs, outputs }).unwrap_err();
    assert_eq!(refusal.to_string(), "vulkan0 cannot run MatMul: no Vulkan kernels yet");
    let request = BufferRequest { name: "cache".into(), size: 16, usage: BufferUsage::State };
    assert!(device.allocate(&request).unwrap_err().to_string().contains("no Vulkan kernels yet"));
}
