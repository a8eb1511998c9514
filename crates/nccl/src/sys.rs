//! NCCL's C interface as far as it is used.
//!
//! Source: `nccl.h`. The declarations below are the same, word for word, in the headers of 2.18.3, 2.19.3, 2.20.5,
//! 2.21.5, 2.22.3, 2.23.4, 2.26.5, 2.27.7, 2.28.9, 2.29.7, 2.30.7 and 2.32.3 (packages `nvidia-nccl-cu12`).

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
};

use crate::error::NcclError;

/// `ncclComm_t`.
pub(crate) type Comm = *mut c_void;
/// `cudaStream_t`, the same pointer as the driver's `CUstream`.
pub(crate) type RawStream = *mut c_void;

/// `ncclSuccess`.
pub(crate) const SUCCESS: c_int = 0;
/// `ncclInvalidArgument`.
pub(crate) const INVALID_ARGUMENT: c_int = 4;
/// `ncclInProgress`.
pub(crate) const IN_PROGRESS: c_int = 7;
/// `ncclUint8`: every operation counts bytes.
pub(crate) const UINT8: c_int = 1;

/// `ncclUniqueId`, handed over by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RawUniqueId(pub(crate) [u8; 128]);

/// `ncclConfig_t` as it is in 2.18.
///
/// The layout only ever grew at its end. A library copies no more of it than `size`, and whatever a field did not exist
/// for in the `version` given is reset to its default. Source: `parseCommConfig` in `init.cc`, 2.18.3 to 2.30.7.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Padding in 2.18 that `size` counts. `trafficClass` since 2.26, whose undefined value it has in case a library
    /// looks at it.
    after_split_share: c_int,
}

impl Config {
    /// `NCCL_CONFIG_UNDEF_INT`.
    const UNDEFINED: c_int = c_int::MIN;

    /// A communicator that is not blocking; at most `max_ctas` thread blocks per operation, or as many as NCCL likes.
    ///
    /// `minCTAs` stays undefined: a minimum without a maximum would be refused, as the undefined maximum counts as
    /// smaller.
    pub(crate) fn non_blocking(max_ctas: Option<c_int>) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 0,
            cga_cluster_size: Self::UNDEFINED,
            min_ctas: Self::UNDEFINED,
            max_ctas: max_ctas.unwrap_or(Self::UNDEFINED),
            net_name: ptr::null(),
            split_share: Self::UNDEFINED,
            after_split_share: Self::UNDEFINED,
        }
    }
}

/// Whatever finds the address of a symbol; `None` where there is no such symbol.
pub(crate) trait Symbols {
    /// The address of `name`.
    fn address(&self, name: &CStr) -> Option<*mut c_void>;
    /// The error of a library that lacks `name`.
    fn missing(&self, name: &CStr) -> NcclError;
}

/// Declares a table of entries, and how it is filled: what is in `required` has to be there.
macro_rules! entries {
    (
        required { $( $entry:ident = $name:literal ( $($argument:ty),* ) -> $result:ty; )* }
        optional { $( $maybe:ident = $maybe_name:literal ( $($maybe_argument:ty),* ) -> $maybe_result:ty; )* }
    ) => {
        /// The entries of one library.
        #[derive(Debug, Clone)]
        pub(crate) struct Entries {
            $( pub(crate) $entry: unsafe extern "C" fn($($argument),*) -> $result, )*
            $( pub(crate) $maybe: Option<unsafe extern "C" fn($($maybe_argument),*) -> $maybe_result>, )*
        }

        impl Entries {
            /// Looks up every entry.
            ///
            /// # Safety
            /// What `symbols` finds are the functions of NCCL that have these names, and they stay loaded.
            pub(crate) unsafe fn look_up(symbols: &impl Symbols) -> Result<Self, NcclError> {
                Ok(Self {
                    $( $entry: {
                        let address = symbols.address($name).ok_or_else(|| symbols.missing($name))?;
                        // SAFETY: not null, and by the caller's word a function with this signature
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(address)
                        }
                    }, )*
                    $( $maybe: symbols.address($maybe_name).map(|address| {
                        // SAFETY: not null, and by the caller's word a function with this signature
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($maybe_argument),*) -> $maybe_result,
                            >(address)
                        }
                    }), )*
                })
            }
        }
    };
}

entries! {
    required {
        get_unique_id = c"ncclGetUniqueId"(*mut RawUniqueId) -> c_int;
        // communicator, ranks, identifier, rank, configuration
        comm_init_rank_config = c"ncclCommInitRankConfig"(*mut Comm, c_int, RawUniqueId, c_int, *mut Config) -> c_int;
        comm_get_async_error = c"ncclCommGetAsyncError"(Comm, *mut c_int) -> c_int;
        comm_count = c"ncclCommCount"(Comm, *mut c_int) -> c_int;
        comm_user_rank = c"ncclCommUserRank"(Comm, *mut c_int) -> c_int;
        comm_cu_device = c"ncclCommCuDevice"(Comm, *mut c_int) -> c_int;
        group_start = c"ncclGroupStart"() -> c_int;
        group_end = c"ncclGroupEnd"() -> c_int;
        // from, count, type, to rank
        send = c"ncclSend"(*const c_void, usize, c_int, c_int, Comm, RawStream) -> c_int;
        // into, count, type, from rank
        recv = c"ncclRecv"(*mut c_void, usize, c_int, c_int, Comm, RawStream) -> c_int;
        // from, into, count, type, root
        broadcast = c"ncclBroadcast"(*const c_void, *mut c_void, usize, c_int, c_int, Comm, RawStream) -> c_int;
        // from, into, count that each rank sends, type
        all_gather = c"ncclAllGather"(*const c_void, *mut c_void, usize, c_int, Comm, RawStream) -> c_int;
        comm_finalize = c"ncclCommFinalize"(Comm) -> c_int;
        comm_destroy = c"ncclCommDestroy"(Comm) -> c_int;
        comm_abort = c"ncclCommAbort"(Comm) -> c_int;
    }
    // they only make errors clearer
    optional {
        get_error_string = c"ncclGetErrorString"(c_int) -> *const c_char;
        get_last_error = c"ncclGetLastError"(Comm) -> *const c_char;
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// Offsets by hand from `ncclConfig_v21700` in `nccl.h` 2.18.3: 48 bytes with its padding.
    #[test]
    fn the_configuration_has_the_layout_of_2_18() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(offset_of!(Config, magic), 8);
        assert_eq!(offset_of!(Config, version), 12);
        assert_eq!(offset_of!(Config, blocking), 16);
        assert_eq!(offset_of!(Config, max_ctas), 28);
        assert_eq!(offset_of!(Config, net_name), 32);
        assert_eq!(offset_of!(Config, split_share), 40);
        assert_eq!(offset_of!(Config, after_split_share), 44);
    }
}
