//! Handing parameters over to the code that serves with them: addresses, DLPack tensors, memory of a device in another
//! process.
//!
//! | for | there is | who keeps the memory |
//! |---|---|---|
//! | kernels launched by this process | [`Param::data`](crate::Param): address, length, device | [`Loaded`], [`Rank`] or [`OwnParams`] |
//! | Python frameworks in this process, and whatever else knows DLPack | [`Param::dlpack`](crate::Param) → [`DlpackTensor`] | the tensor too, until its deleter has run |
//! | a server in another process of the same machine | [`Params::ipc`] → [`IpcExport`] → [`IpcParams::open`] | the process that loaded |
//!
//! # Rules
//!
//! The borrow checker enforces them for what is borrowed from [`Params`]. Addresses, tensors and opened parameters are
//! not: whoever uses those, in `unsafe` code or in another language, sees to it that they are kept.
//!
//! * **Complete.** Parameters are handed out when every byte of every rank has landed and what is derived from them is
//!   computed. All work of the load on devices has ended by then: any stream may read at once, without waiting for
//!   anything.
//! * **Read-only.** Nobody writes to them but a reload, and a reload leaves alone what is the same in both checkpoints. Two names may share storage ([`Params::aliases`]).
//! * **Where they are.** Addresses, shapes and types stay as they are for the life of the parameters, through reloads
//!   too, so what has them built in (a CUDA graph) stays valid. All parameters of a rank lie in one allocation, each on
//!   a multiple of 256 bytes.
//! * **Reloads** write new weights where the old ones are ([`Loaded::reload`], [`Rank::reload`]). From the call until it has returned
//!   nobody reads: kernels that do have ended, and none is launched. Whoever reads meanwhile reads a mix, and in this
//!   process has a data race. It may read again when [`Loaded::ranks`] or [`Rank::params`] hands out parameters, not when
//!   that says that they are not ready.
//! * **The end.** The memory of a rank's parameters is freed when their owner and the last DLPack tensor that was made
//!   of any of them are gone. Kernels that read have ended by then: the driver waits for what runs as it frees, but
//!   that is no promise of its own.
//! * **Threads.** What is done here to a device may leave its primary context current on the calling thread; what is
//!   dropped, on whatever thread, does not.
//!
//! # DLPack
//!
//! ```
//! use longshore::{Load, handover::DLManagedTensorVersioned};
//!
//! /// What a consumer does, in C or behind Python: takes the tensor, uses it, and calls its deleter once.
//! ///
//! /// # Safety
//! /// The tensor is one that nobody has taken yet.
//! unsafe fn consume(tensor: *mut DLManagedTensorVersioned) {
//!     // SAFETY: the caller's promise.
//!     unsafe {
//!         assert_eq!((*tensor).dl_tensor.ndim, 1);
//!         (*tensor).deleter.expect("there is one")(tensor);
//!     }
//! }
//!
//! let loaded = Load::from("synth:llama-bf16").start()?.wait()?;
//! let norm = loaded.ranks()?[0].get("model.norm.weight").expect("a Llama has it").dlpack();
//! // SAFETY: it is handed over once; the weights are not reloaded.
//! unsafe { consume(norm.into_raw().as_ptr()) };
//! # Ok::<(), longshore::LoadError>(())
//! ```
//!
//! In Python the pointer becomes a capsule, `PyCapsule_New(pointer, "dltensor_versioned", destructor)`, which
//! `from_dlpack` takes from an object's `__dlpack__`; the destructor calls the deleter of a capsule that still has that
//! name. Source: DLPack, "Python Specification for DLPack". PyTorch 2.15 takes all types of parameters so; NumPy 2.4
//! takes neither BF16 nor FP8; JAX 0.10 takes [the unversioned form](DlpackTensor::into_raw_unversioned) alone (tried
//! on the host with these versions). No stream has to be waited for, see above.
//!
//! A tensor keeps its rank's memory, not the right to read: after a reload it shows the new weights. A consumer that
//! keeps tensors keeps to the rules above. [`DlpackTensor::as_unsigned`] is for those that do not know BF16 or FP8.
//!
//! # Another process
//!
//! ```no_run
//! # use longshore::{DeviceChoice, Load, handover::{IpcExport, IpcParams}};
//! // in the process that loads
//! let loaded = Load::from("/models/Qwen3-8B").device(DeviceChoice::Cuda).start()?.wait()?;
//! let export: IpcExport = loaded.ranks()?[0].ipc()?; // serde: sent as whatever both sides like
//!
//! // in the server
//! let params = IpcParams::open(&export)?;
//! let down = params.get("model.layers.0.mlp.down_proj.weight").expect("a Qwen3 has it");
//! println!("{:?} {:?} at {:#x}", down.dtype, down.shape, down.address);
//! # Ok::<(), longshore::LoadError>(())
//! ```
//!
//! CUDA shares the allocation, nothing is copied. Beside the rules above:
//!
//! * The process that loads keeps its parameters until every other has dropped its [`IpcParams`] and the tensors made
//!   of them: what happens to memory that is freed earlier is undefined. Source: CUDA driver API, `cuIpcOpenMemHandle`.
//! * A reload over there changes what is read here: the processes agree on when.
//! * Both run the same version of longshore, on the same machine; the server has the device among those that it may
//!   use, by whatever number. A process cannot open what it exported itself: CUDA refuses that.
//!
//! [`Loaded`]: crate::Loaded
//! [`Loaded::ranks`]: crate::Loaded::ranks
//! [`Loaded::reload`]: crate::Loaded::reload
//! [`Rank::params`]: crate::Rank::params
//! [`Rank::reload`]: crate::Rank::reload
//! [`OwnParams`]: crate::OwnParams
//! [`Params`]: crate::Params
//! [`Params::aliases`]: crate::Params::aliases
//! [`Params::ipc`]: crate::Params::ipc
//! [`Rank`]: crate::Rank

mod ipc;

pub use longshore_rank::params::dlpack::{
    DlpackTensor,
    abi::{
        DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLPackVersion, DLTensor,
    },
};

pub use self::ipc::{IpcError, IpcExport, IpcParam, IpcParams};
