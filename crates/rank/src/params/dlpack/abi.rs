//! What producers and consumers of DLPack have agreed on: its structures, as far as parameters need them.
//!
//! Source: `include/dlpack/dlpack.h` of <https://github.com/dmlc/dlpack>, version 1.1; names of structures and fields
//! are the header's.

use std::ffi::c_void;

/// The version that is written into tensors: the first with codes for FP8. Consumers of another minor version take the
/// tensor if they know its type; 1.2 and 1.3 differ for producers in that strides must not be null.
pub(super) const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 1 };

/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
pub(super) const READ_ONLY: u64 = 1 << 0;

/// The version of the structures and of the codes in them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLPackVersion {
    /// Changes when structures do.
    pub major: u32,
    /// Changes when codes are added.
    pub minor: u32,
}

/// Where a tensor lies.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDevice {
    /// `kDLCPU` or `kDLCUDA`; the C type is an enumeration, an `int32_t` in C++.
    pub device_type: i32,
    /// The device's number in this process; 0 for the host.
    pub device_id: i32,
}

impl DLDevice {
    /// `kDLCPU`: the host's memory.
    pub(super) const HOST: DLDevice = DLDevice { device_type: 1, device_id: 0 };

    /// `kDLCUDA`: the memory of the device with that number.
    pub(super) fn cuda(ordinal: u32) -> DLDevice {
        // the driver counts devices in a C int
        DLDevice { device_type: 2, device_id: ordinal.cast_signed() }
    }
}

/// The type of an element.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDataType {
    /// One of `DLDataTypeCode`.
    pub code: u8,
    /// Bits of an element.
    pub bits: u8,
    /// Elements that count as one: 1.
    pub lanes: u16,
}

/// A tensor that owns nothing.
#[repr(C)]
#[derive(Debug)]
pub struct DLTensor {
    /// Where it begins; null where it has no elements.
    pub data: *mut c_void,
    /// Where that is.
    pub device: DLDevice,
    /// Dimensions.
    pub ndim: i32,
    /// The type of its elements.
    pub dtype: DLDataType,
    /// Elements in each dimension.
    pub shape: *mut i64,
    /// Elements from one to the next in each dimension: those of a row-major tensor without gaps.
    pub strides: *mut i64,
    /// Bytes from `data` to the first element: 0.
    pub byte_offset: u64,
}

/// A tensor with what keeps it, as consumers before DLPack 1.0 know it.
#[repr(C)]
#[derive(Debug)]
pub struct DLManagedTensor {
    /// The tensor.
    pub dl_tensor: DLTensor,
    /// The producer's own: null here.
    pub manager_ctx: *mut c_void,
    /// Gives the tensor back, this structure included; to be called once.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

/// A tensor with what keeps it.
#[repr(C)]
#[derive(Debug)]
pub struct DLManagedTensorVersioned {
    /// The version of the rest.
    pub version: DLPackVersion,
    /// The producer's own: null here.
    pub manager_ctx: *mut c_void,
    /// Gives the tensor back, this structure included; to be called once.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// `DLPACK_FLAG_BITMASK_READ_ONLY`: nobody is to write to it.
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: DLTensor,
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    /// What a C compiler makes of the header on a 64-bit machine.
    #[test]
    fn structures_are_laid_out_as_in_the_header() {
        assert_eq!((size_of::<DLPackVersion>(), size_of::<DLDevice>()), (8, 8));
        let offsets = [
            offset_of!(DLDataType, code),
            offset_of!(DLDataType, bits),
            offset_of!(DLDataType, lanes),
            size_of::<DLDataType>(),
        ];
        assert_eq!(offsets, [0, 1, 2, 4]);
        let offsets = [
            offset_of!(DLTensor, data),
            offset_of!(DLTensor, device),
            offset_of!(DLTensor, ndim),
            offset_of!(DLTensor, dtype),
            offset_of!(DLTensor, shape),
            offset_of!(DLTensor, strides),
            offset_of!(DLTensor, byte_offset),
            size_of::<DLTensor>(),
        ];
        assert_eq!(offsets, [0, 8, 16, 20, 24, 32, 40, 48]);
        let offsets = [
            offset_of!(DLManagedTensor, dl_tensor),
            offset_of!(DLManagedTensor, manager_ctx),
            offset_of!(DLManagedTensor, deleter),
            size_of::<DLManagedTensor>(),
        ];
        assert_eq!(offsets, [0, 48, 56, 64]);
        let offsets = [
            offset_of!(DLManagedTensorVersioned, version),
            offset_of!(DLManagedTensorVersioned, manager_ctx),
            offset_of!(DLManagedTensorVersioned, deleter),
            offset_of!(DLManagedTensorVersioned, flags),
            offset_of!(DLManagedTensorVersioned, dl_tensor),
            size_of::<DLManagedTensorVersioned>(),
        ];
        assert_eq!(offsets, [0, 8, 16, 24, 32, 80]);
    }
}
