//! Parameters as DLPack tensors: what Python frameworks and others take over without a copy.
//!
//! A tensor keeps the allocation that its parameter lies in, and with it all others of the rank, but not the right to
//! read: a reload writes new weights under it. Source of everything about DLPack: see [`abi`].

pub mod abi;

use std::{any::Any, ptr, sync::Arc};

use longshore_kernels::cuda::driver::Device;
use longshore_models::Dtype;

use self::abi::{
    DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLTensor, READ_ONLY, VERSION,
};
use super::{Allocation, ParamView};

/// A parameter that is about to be handed to a consumer of DLPack.
///
/// Dropping it gives the parameter's memory back; so does, once it is handed over, the deleter of what was made of it.
/// There is no way to read through it from here: what a consumer has to keep to is written where parameters are handed
/// over (`longshore::handover`).
#[derive(Debug, Clone)]
pub struct DlpackTensor {
    owner: Arc<dyn Any + Send + Sync>,
    address: u64,
    device: DLDevice,
    dtype: DLDataType,
    shape: Vec<i64>,
}

impl ParamView<'_> {
    /// The parameter as a DLPack tensor, row-major, without a copy. It may outlive the parameters, whose memory it
    /// keeps.
    pub fn dlpack(&self) -> DlpackTensor {
        DlpackTensor {
            owner: Arc::<Allocation>::clone(self.allocation),
            address: self.allocation.address() + self.offset,
            device: self
                .allocation
                .device()
                .map_or(DLDevice::HOST, |device| DLDevice::cuda(device.ordinal())),
            dtype: data_type(self.dtype),
            shape: shape(self.shape),
        }
    }
}

impl DlpackTensor {
    /// A row-major tensor at `address` of `device`, in memory that `owner` keeps.
    ///
    /// # Panics
    /// No parameter has such a dtype or shape.
    pub fn on_device(
        owner: Arc<dyn Any + Send + Sync>,
        device: &Device,
        address: u64,
        dtype: Dtype,
        extents: &[u64],
    ) -> Self {
        let (dtype, shape) = (data_type(dtype), shape(extents));
        Self { owner, address, device: DLDevice::cuda(device.ordinal()), dtype, shape }
    }

    /// The same bytes as unsigned integers of the same size, for consumers that do not know the element type and view
    /// it as theirs: NumPy knows neither BF16 nor FP8, and no consumer before DLPack 1.1 knows FP8.
    #[must_use]
    pub fn as_unsigned(mut self) -> Self {
        self.dtype.code = UNSIGNED;
        self
    }

    /// The tensor for a consumer of DLPack 1.x; in Python, the contents of a capsule that is called
    /// `dltensor_versioned`.
    ///
    /// It is marked as read-only: arrays of NumPy 2.4 that are made of it refuse to be written to, tensors of PyTorch
    /// 2.15 do not (tried).
    ///
    /// Whoever takes it calls its deleter, once, on whatever thread.
    pub fn into_raw(self) -> ptr::NonNull<DLManagedTensorVersioned> {
        self.export(|dl_tensor| DLManagedTensorVersioned {
            version: VERSION,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete),
            flags: READ_ONLY,
            dl_tensor,
        })
    }

    /// The tensor for a consumer that knows nothing newer than DLPack 0.8; in Python, the contents of a capsule that is
    /// called `dltensor`. It cannot say that nobody is to write to it.
    ///
    /// Whoever takes it calls its deleter, once, on whatever thread.
    pub fn into_raw_unversioned(self) -> ptr::NonNull<DLManagedTensor> {
        self.export(|dl_tensor| DLManagedTensor {
            dl_tensor,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete),
        })
    }

    fn export<M>(self, managed: impl FnOnce(DLTensor) -> M) -> ptr::NonNull<M> {
        let Self { owner, address, device, dtype, mut shape } = self;
        let mut strides = strides(&shape);
        let tensor = DLTensor {
            data: match shape.contains(&0) {
                true => ptr::null_mut(),
                false => ptr::with_exposed_provenance_mut(address as usize),
            },
            device,
            // no shape in a header is longer than the header
            ndim: shape.len() as i32,
            dtype,
            shape: shape.as_mut_ptr(),
            strides: strides.as_mut_ptr(),
            byte_offset: 0,
        };
        let managed = managed(tensor);
        let exported = Exported { managed, _shape: shape, _strides: strides, _owner: owner };
        ptr::NonNull::from(Box::leak(Box::new(exported))).cast()
    }
}

/// A tensor that was given away, and what it points to.
#[repr(C)]
struct Exported<M> {
    /// Comes first: its address is that of the whole.
    managed: M,
    _shape: Vec<i64>,
    _strides: Vec<i64>,
    _owner: Arc<dyn Any + Send + Sync>,
}

/// Takes back what [`DlpackTensor::export`] gave away.
///
/// # Safety
/// `managed` came from there and was not taken back; nobody uses it or reads the tensor any more.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: it was leaked as a box of this type, whose first field it is; the caller gives it up.
    drop(unsafe { Box::from_raw(managed.cast::<Exported<M>>()) });
}

/// `kDLUInt`.
const UNSIGNED: u8 = 1;

/// The code and size of an element type.
///
/// E4M3 of checkpoints is the one without infinities (`F8_E4M3` is `torch.float8_e4m3fn` in the `safetensors` Python
/// package, `torch.py`), and so is E8M0 (`torch.float8_e8m0fnu`).
fn data_type(dtype: Dtype) -> DLDataType {
    let code = match dtype {
        Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => 0, // kDLInt
        Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => UNSIGNED,
        Dtype::F16 | Dtype::F32 | Dtype::F64 => 2, // kDLFloat
        Dtype::BF16 => 4,                          // kDLBfloat
        Dtype::C64 => 5,                           // kDLComplex
        Dtype::BOOL => 6,                          // kDLBool
        Dtype::F8_E4M3 => 10,                      // kDLFloat8_e4m3fn
        Dtype::F8_E4M3FNUZ => 11,                  // kDLFloat8_e4m3fnuz
        Dtype::F8_E5M2 => 12,                      // kDLFloat8_e5m2
        Dtype::F8_E5M2FNUZ => 13,                  // kDLFloat8_e5m2fnuz
        Dtype::F8_E8M0 => 14,                      // kDLFloat8_e8m0fnu
        // packed types are parameters of U8 or I32, and there are no more
        other => unreachable!("no parameter is of {other:?}"),
    };
    // 64 at most
    DLDataType { code, bits: dtype.bitsize() as u8, lanes: 1 }
}

fn shape(extents: &[u64]) -> Vec<i64> {
    let signed = |extent: &u64| i64::try_from(*extent).expect("all elements have an address");
    extents.iter().map(signed).collect()
}

/// Elements from one to the next in each dimension, row-major.
fn strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1_i64; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::{super::Data, *};
    use crate::region::Region;

    /// Three rows of two BF16 at offset 512 of a rank's memory.
    fn tensor(allocation: &Arc<Allocation>) -> DlpackTensor {
        let (name, dtype, shape) = ("a", Dtype::BF16, &[3, 2]);
        let data = Data::Host(&[]);
        ParamView { name, dtype, shape, data, allocation, offset: 512 }.dlpack()
    }

    fn allocation() -> Arc<Allocation> {
        Arc::new(Allocation::Host(Region::new("a test", 1024).unwrap()))
    }

    #[test]
    fn a_tensor_says_what_the_parameter_is() {
        let allocation = allocation();
        let raw = tensor(&allocation).into_raw();
        // SAFETY: nobody has taken it back.
        let managed = unsafe { raw.as_ref() };
        assert_eq!((managed.version.major, managed.version.minor, managed.flags), (1, 1, 1));
        let tensor = &managed.dl_tensor;
        assert_eq!(tensor.data as u64, allocation.address() + 512);
        assert_eq!(tensor.device, DLDevice { device_type: 1, device_id: 0 });
        assert_eq!(tensor.dtype, DLDataType { code: 4, bits: 16, lanes: 1 });
        // SAFETY: they are as long as there are dimensions.
        let extents = unsafe {
            let ndim = tensor.ndim as usize;
            [slice::from_raw_parts(tensor.shape, ndim), slice::from_raw_parts(tensor.strides, ndim)]
        };
        assert_eq!((extents, tensor.byte_offset), ([&[3, 2][..], &[2, 1]], 0));
        // SAFETY: once.
        unsafe { managed.deleter.unwrap()(raw.as_ptr()) };
    }

    /// Whichever form it takes, a tensor keeps the memory until it is given back, and gives it back once.
    #[test]
    fn memory_is_kept_until_the_deleter_has_run() {
        let allocation = allocation();
        let weak = Arc::downgrade(&allocation);
        let (kept, versioned) = (tensor(&allocation), tensor(&allocation).into_raw());
        let unversioned = kept.clone().as_unsigned().into_raw_unversioned();
        drop(allocation);
        assert_eq!(weak.strong_count(), 3);
        drop(kept);
        assert_eq!(weak.strong_count(), 2);
        // SAFETY: given away above, and not taken back yet.
        unsafe { versioned.as_ref().deleter.unwrap()(versioned.as_ptr()) };
        assert_eq!(weak.strong_count(), 1);
        // SAFETY: as above.
        let dtype = unsafe { unversioned.as_ref().dl_tensor.dtype };
        assert_eq!(dtype, DLDataType { code: 1, bits: 16, lanes: 1 });
        let unversioned = unversioned.as_ptr() as usize;
        std::thread::spawn(move || {
            let raw = unversioned as *mut DLManagedTensor;
            // SAFETY: as above; any thread may give it back.
            unsafe { (*raw).deleter.unwrap()(raw) };
        })
        .join()
        .unwrap();
        assert_eq!(weak.strong_count(), 0);
    }

    #[test]
    fn element_types_have_the_codes_and_sizes_of_the_header() {
        for (dtype, code, bits) in [
            (Dtype::BF16, 4, 16),
            (Dtype::F16, 2, 16),
            (Dtype::F32, 2, 32),
            (Dtype::F64, 2, 64),
            (Dtype::I8, 0, 8),
            (Dtype::I32, 0, 32),
            (Dtype::I64, 0, 64),
            (Dtype::U8, 1, 8),
            (Dtype::BOOL, 6, 8),
            (Dtype::F8_E4M3, 10, 8),
            (Dtype::F8_E5M2, 12, 8),
            (Dtype::F8_E8M0, 14, 8),
        ] {
            assert_eq!(data_type(dtype), DLDataType { code, bits, lanes: 1 }, "{dtype:?}");
        }
    }

    #[test]
    fn strides_count_elements() {
        assert_eq!(strides(&[4, 3, 2]), [6, 2, 1]);
        assert_eq!(strides(&[7]), [1]);
        assert_eq!(strides(&[]), [0_i64; 0]);
        assert_eq!(strides(&[0, 5]), [5, 1]);
    }
}
