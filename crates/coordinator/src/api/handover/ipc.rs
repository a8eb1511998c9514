//! Parameters on a device, opened by another process.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{Arc, LazyLock},
};

use longshore_kernels::cuda::driver::{CudaError, Device, IpcMemory};
use longshore_models::dtype::{Dtype, elem_bytes};
use longshore_rank::params::{ParamView, ReadyParams, data::Allocation, dlpack::DlpackTensor};
use serde::{Deserialize, Serialize};

use crate::{LoadError, Params};

/// One rank's parameters on a device, as another process on this machine finds them: to be sent there by whatever
/// means, and opened with [`IpcParams::open`].
///
/// Good as long as the parameters live: see the rules of [`handover`](crate::handover).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcExport {
    rank: u32,
    /// [`THIS_PROCESS`] of the one that holds them.
    process: u64,
    /// UUID.
    device: [u8; 16],
    /// The driver's, of the one allocation that holds all of them.
    #[serde(with = "handle")]
    handle: [u8; 64],
    /// Of that allocation.
    bytes: u64,
    params: Vec<ExportedParam>,
    /// Second names: derived name, name of the parameter whose storage it shares.
    aliases: Vec<(String, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ExportedParam {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    /// From the start of the allocation.
    offset: u64,
    bytes: u64,
}

/// Tells processes apart; their numbers do not, where containers count for themselves.
static THIS_PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());

impl Params<'_> {
    /// What another process opens them by, where they live on a device.
    ///
    /// # Errors
    /// [`LoadError::Ipc`]: they live in host memory, or the device's memory cannot be shared.
    pub fn ipc(&self) -> Result<IpcExport, LoadError> {
        let rank = self.rank();
        IpcExport::new(self.0).map_err(|source| LoadError::Ipc { rank, source })
    }
}

impl IpcExport {
    fn new(params: &ReadyParams) -> Result<Self, IpcError> {
        let Allocation::Device(allocation) = params.allocation() else {
            return Err(IpcError::HostMemory);
        };
        let memory = allocation.memory();
        Ok(Self::of(params, memory.device().uuid(), memory.ipc_handle()?))
    }

    fn of(params: &ReadyParams, device: [u8; 16], handle: [u8; 64]) -> Self {
        let aliases = params.aliases().map(|(name, of)| (name.to_owned(), of.to_owned()));
        Self {
            rank: params.rank,
            process: *THIS_PROCESS,
            device,
            handle,
            bytes: params.allocated_bytes(),
            params: params.iter().map(ExportedParam::from).collect(),
            aliases: aliases.collect(),
        }
    }

    /// Parameters by name, second names included, all of them as long as their shapes say and within the allocation.
    fn index(&self) -> Result<HashMap<String, usize>, IpcError> {
        let names = self.params.iter().enumerate().map(|(i, param)| (param.name.clone(), i));
        let mut by_name = HashMap::with_capacity(self.params.len() + self.aliases.len());
        for (name, i) in names {
            self.params[i].check(self.bytes)?;
            by_name.insert(name, i);
        }
        for (name, of) in &self.aliases {
            let Some(i) = by_name.get(of).copied() else {
                let why = format!("shares the storage of {of}, which is not there");
                return Err(IpcError::Param { param: name.clone(), why });
            };
            by_name.insert(name.clone(), i);
        }
        Ok(by_name)
    }
}

impl From<ParamView<'_>> for ExportedParam {
    fn from(param: ParamView<'_>) -> Self {
        Self {
            name: param.name.to_owned(),
            dtype: param.dtype,
            shape: param.shape.to_vec(),
            offset: param.offset(),
            bytes: param.data.len() as u64,
        }
    }
}

impl ExportedParam {
    fn check(&self, allocation_bytes: u64) -> Result<(), IpcError> {
        let Self { name, dtype, shape, offset, bytes } = self;
        let refuse = |why| Err(IpcError::Param { param: name.clone(), why });
        let count =
            shape.iter().try_fold(elem_bytes(*dtype), |all, extent| all.checked_mul(*extent));
        if count != Some(*bytes) {
            return refuse(format!("{bytes} bytes are not {dtype:?} {shape:?}"));
        }
        match offset.checked_add(*bytes) {
            Some(end) if end <= allocation_bytes => Ok(()),
            _ => refuse(format!(
                "{bytes} bytes from {offset} on leave the allocation of {allocation_bytes} bytes"
            )),
        }
    }
}

/// serde has no arrays of 64.
mod handle {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(handle: &[u8; 64], to: S) -> Result<S::Ok, S::Error> {
        handle.as_slice().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 64], D::Error> {
        let bytes = Vec::deserialize(from)?;
        let other = |bytes: Vec<u8>| D::Error::invalid_length(bytes.len(), &"a handle of 64 bytes");
        bytes.try_into().map_err(other)
    }
}

/// One rank's parameters in the memory of a device, which another process holds.
///
/// Closed when it and the last tensor that was made of any of them are dropped. See the rules of
/// [`handover`](crate::handover).
#[derive(Debug)]
pub struct IpcParams {
    memory: Arc<IpcMemory>,
    export: IpcExport,
    by_name: HashMap<String, usize>,
}

/// One parameter that another process holds.
#[derive(Debug, Clone, Copy)]
pub struct IpcParam<'a> {
    /// The runtime's name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Rank-local shape.
    pub shape: &'a [u64],
    /// The address of its first byte, for kernels of this process on [`IpcParams::device`].
    pub address: u64,
    /// Its length.
    pub bytes: u64,
    memory: &'a Arc<IpcMemory>,
}

impl IpcParams {
    /// Opens what another process on this machine has exported.
    ///
    /// # Errors
    /// [`LoadError::Ipc`]: what it says does not fit together, this process may not use the device or is the exporting
    /// one itself, or the driver refuses.
    pub fn open(export: &IpcExport) -> Result<IpcParams, LoadError> {
        let rank = export.rank;
        Self::opened(export).map_err(|source| LoadError::Ipc { rank, source })
    }

    fn opened(export: &IpcExport) -> Result<IpcParams, IpcError> {
        let by_name = export.index()?;
        if export.process == *THIS_PROCESS {
            return Err(IpcError::SameProcess);
        }
        let Some(device) = Device::with_uuid(export.device)? else {
            return Err(IpcError::NotVisible { device: Uuid(export.device).to_string() });
        };
        let memory = Arc::new(IpcMemory::open(&device, &export.handle, export.bytes)?);
        Ok(Self { memory, export: export.clone(), by_name })
    }

    /// The rank that holds them.
    pub fn rank(&self) -> u32 {
        self.export.rank
    }

    /// The device that they are on.
    pub fn device(&self) -> &Arc<Device> {
        self.memory.device()
    }

    /// A parameter by its name, or by a second name that shares its storage.
    pub fn get(&self, name: &str) -> Option<IpcParam<'_>> {
        self.by_name.get(name).map(|i| self.view(&self.export.params[*i]))
    }

    /// All of them under their own names, in model order.
    pub fn iter(&self) -> impl Iterator<Item = IpcParam<'_>> {
        self.export.params.iter().map(|param| self.view(param))
    }

    /// Second names: `(derived name, name of the parameter whose storage it shares)`.
    pub fn aliases(&self) -> impl Iterator<Item = (&str, &str)> {
        self.export.aliases.iter().map(|(name, of)| (name.as_str(), of.as_str()))
    }

    fn view<'a>(&'a self, param: &'a ExportedParam) -> IpcParam<'a> {
        let ExportedParam { name, dtype, shape, offset, bytes } = param;
        let address = self.memory.address() + offset;
        IpcParam { name, dtype: *dtype, shape, address, bytes: *bytes, memory: &self.memory }
    }
}

impl IpcParam<'_> {
    /// The parameter as a DLPack tensor, row-major, without a copy. It keeps the memory open, not alive: that is the
    /// other process's to do.
    pub fn dlpack(&self) -> DlpackTensor {
        let memory = Arc::<IpcMemory>::clone(self.memory);
        DlpackTensor::on_device(memory, self.memory.device(), self.address, self.dtype, self.shape)
    }
}

/// Why parameters cannot be shared between processes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IpcError {
    /// Only a device's memory is shared.
    #[error("they live in host memory")]
    HostMemory,
    /// CUDA opens no memory in the process that allocated it.
    #[error("this process exported them itself and can use them as they are")]
    SameProcess,
    /// The device is not among those that this process may use.
    #[error("device {device} is not visible to this process")]
    NotVisible {
        /// Its UUID, as `nvidia-smi -L` prints it.
        device: String,
    },
    /// What the other process says does not fit together.
    #[error("{param}: {why}")]
    Param {
        /// The parameter.
        param: String,
        /// What is wrong with it.
        why: String,
    },
    /// What the driver says.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Prints as `nvidia-smi -L` does.
struct Uuid([u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if [0, 4, 6, 8, 10].contains(&i) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Load, Loaded};

    fn loaded() -> Loaded {
        Load::from("synth:deepseek_v3-fp8").tensor_parallel(2).start().unwrap().wait().unwrap()
    }

    /// What a rank on a device would export.
    fn export(loaded: &Loaded) -> IpcExport {
        IpcExport::of(loaded.ranks().unwrap()[1].0, [0xee; 16], [7; 64])
    }

    #[test]
    fn an_export_survives_the_way_to_another_process() {
        let loaded = loaded();
        let export = export(&loaded);
        let rank = loaded.ranks().unwrap()[1];
        let by_name = export.index().unwrap();
        assert_eq!(by_name.len(), rank.iter().count() + rank.aliases().count());
        let first = rank.iter().next().unwrap().data.address();
        for param in rank.iter() {
            let ours = &export.params[by_name[param.name]];
            assert_eq!(ours.offset, param.data.address() - first, "{}", param.name);
        }
        let json = serde_json::to_string(&export).unwrap();
        assert_eq!(serde_json::from_str::<IpcExport>(&json).unwrap(), export);
        let bytes = postcard::to_allocvec(&export).unwrap();
        assert_eq!(postcard::from_bytes::<IpcExport>(&bytes).unwrap(), export);
        let short = json.replacen("\"handle\":[7,", "\"handle\":[", 1);
        let error = serde_json::from_str::<IpcExport>(&short).unwrap_err().to_string();
        assert!(error.starts_with("invalid length 63, expected a handle of 64 bytes"), "{error}");
    }

    #[test]
    fn what_does_not_fit_together_is_refused_by_name() {
        let good = IpcExport {
            rank: 3,
            process: *THIS_PROCESS ^ 1,
            device: [0xee; 16],
            handle: [0; 64],
            bytes: 1024,
            params: vec![ExportedParam {
                name: "a".into(),
                dtype: Dtype::BF16,
                shape: vec![4, 8],
                offset: 512,
                bytes: 64,
            }],
            aliases: vec![("b".into(), "a".into())],
        };
        assert_eq!(good.index().unwrap(), [("a".into(), 0), ("b".into(), 0)].into());
        let refused = |change: fn(&mut IpcExport)| {
            let mut bad = good.clone();
            change(&mut bad);
            IpcParams::open(&bad).unwrap_err().line()
        };
        let start = "the parameters of rank 3 cannot be shared between processes: ";
        for (line, why) in [
            (
                refused(|e| e.params[0].offset = 961),
                "a: 64 bytes from 961 on leave the allocation of 1024 bytes",
            ),
            (
                refused(|e| e.params[0].offset = u64::MAX),
                "a: 64 bytes from 18446744073709551615 on leave the allocation of 1024 bytes",
            ),
            (refused(|e| e.params[0].shape[0] = 5), "a: 64 bytes are not BF16 [5, 8]"),
            (
                refused(|e| e.params[0].shape = vec![1 << 63, 2, 0]),
                "a: 64 bytes are not BF16 [9223372036854775808, 2, 0]",
            ),
            (
                refused(|e| e.aliases[0].1 = "c".into()),
                "b: shares the storage of c, which is not there",
            ),
            (
                refused(|e| e.process ^= 1),
                "this process exported them itself and can use them as they are",
            ),
        ] {
            assert_eq!(line, format!("{start}{why}"));
        }
        let line = IpcParams::open(&good).unwrap_err().line();
        let invisible =
            format!("{start}device GPU-eeeeeeee-eeee-eeee-eeee-eeeeeeeeeeee is not visible");
        let without = format!("{start}CUDA cannot be used: ");
        assert!(line.starts_with(&invisible) || line.starts_with(&without), "{line}");
    }

    #[test]
    fn host_memory_is_not_shared() {
        let loaded = loaded();
        let line = loaded.ranks().unwrap()[0].ipc().unwrap_err().line();
        assert_eq!(
            line,
            "the parameters of rank 0 cannot be shared between processes: they live in host memory"
        );
    }
}
