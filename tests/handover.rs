//! Parameters that were handed over: what a consumer of DLPack and a server in another process see, through reloads and
//! until the memory is freed. On the host, and on devices as the stories of `cuda.rs`.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    collections::BTreeMap,
    env, fs,
    hash::{DefaultHasher, Hasher},
    io::{self, BufRead, BufReader, Write},
    path::PathBuf,
    process::{Command, Stdio},
    ptr::NonNull,
    slice,
    sync::Arc,
};

use longshore::{
    DeviceChoice, Load, Loaded, Params,
    handover::{DLManagedTensorVersioned, DLTensor, IpcExport, IpcParams},
};
use longshore_emulator::Options;
use longshore_harness::{
    generator::{Checkpoint, Family, Scheme},
    scratch::Scratch,
};
use longshore_kernels::cuda::driver::Device;

#[path = "common/cuda.rs"]
mod cuda;

use cuda::Cuda;

/// Streams that run late, and a device for each rank.
fn late() -> Options {
    Options { seed: 11, delay_us_max: 300, devices: 2, ..Options::default() }
}

/// Two checkpoints that differ in their weights only: BF16, FP8 and packed FP4, with second names for some.
fn pair(scratch: &Scratch) -> [String; 2] {
    [1, 2].map(|seed| {
        let dir = scratch.join(&format!("checkpoint-{seed}"));
        Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4).seed(seed).write(&dir).unwrap();
        dir.to_str().unwrap().to_owned()
    })
}

fn loaded(source: &str, device: DeviceChoice) -> Loaded {
    let load = Load::from(source).tensor_parallel(2).device(device);
    load.start().unwrap().wait().unwrap_or_else(|e| panic!("{}", e.line()))
}

/// What is in the memory of `device`.
fn on_device(device: &Arc<Device>, address: u64, bytes: usize) -> Vec<u8> {
    let mut contents = vec![0; bytes];
    let stream = device.stream().unwrap();
    // SAFETY: both are there until the stream is done.
    unsafe { stream.copy_to_host(contents.as_mut_ptr(), address, bytes as u64).unwrap() };
    stream.synchronize().unwrap();
    contents
}

/// The parameters of a rank, as they are now.
fn contents(params: Params<'_>) -> BTreeMap<String, Vec<u8>> {
    let each = params.iter().map(|p| (p.name.to_owned(), p.data.to_host().unwrap().into_owned()));
    each.collect()
}

/// A consumer of DLPack, which knows nothing but what the tensor says.
struct Consumer(NonNull<DLManagedTensorVersioned>);

impl Consumer {
    fn tensor(&self) -> &DLTensor {
        // SAFETY: it is there until the consumer goes.
        unsafe { &self.0.as_ref().dl_tensor }
    }

    fn shape(&self) -> &[i64] {
        // SAFETY: it is as long as there are dimensions.
        unsafe { slice::from_raw_parts(self.tensor().shape, self.tensor().ndim as usize) }
    }

    fn contents(&self) -> Vec<u8> {
        let tensor = self.tensor();
        let elements: i64 = self.shape().iter().product();
        let bytes = elements as usize * tensor.dtype.bits as usize / 8;
        match tensor.device.device_type {
            // SAFETY: the tensor is of so many bytes, which nobody writes to meanwhile.
            1 => unsafe { slice::from_raw_parts(tensor.data.cast::<u8>(), bytes) }.to_vec(),
            2 => {
                let device = Device::open(tensor.device.device_id.cast_unsigned()).unwrap();
                on_device(&device, tensor.data as u64, bytes)
            }
            other => panic!("device type {other}"),
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        // SAFETY: once, at the end.
        unsafe { self.0.as_ref().deleter.unwrap()(self.0.as_ptr()) };
    }
}

fn consumers_see_reloads(choice: DeviceChoice) {
    let scratch = Scratch::new().unwrap();
    let [a, b] = pair(&scratch);
    let mut loaded = loaded(&a, choice);
    let ranks = || 0..2;
    let consumers = ranks().map(|rank| {
        let params = loaded.ranks().unwrap()[rank];
        let consume = |name: &str| Consumer(params.get(name).unwrap().dlpack().into_raw());
        let names = params.iter().map(|p| p.name).chain(params.aliases().map(|(name, _)| name));
        names.map(|name| (name.to_owned(), consume(name))).collect()
    });
    let consumers: Vec<BTreeMap<String, Consumer>> = consumers.collect();
    let check = |loaded: &Loaded| {
        for (rank, consumers) in loaded.ranks().unwrap().iter().zip(&consumers) {
            for (name, consumer) in consumers {
                let param = rank.get(name).unwrap();
                let signed: Vec<i64> = param.shape.iter().map(|n| *n as i64).collect();
                assert_eq!(consumer.shape(), signed, "{name}");
                assert_eq!(consumer.tensor().data as u64, param.data.address(), "{name}");
                assert_eq!(consumer.contents(), *param.data.to_host().unwrap(), "{name}");
            }
        }
        loaded.digest().unwrap()
    };
    let first = check(&loaded);
    loaded.reload(&b).unwrap_or_else(|e| panic!("{}", e.line()));
    assert_ne!(check(&loaded), first);
    let last: Vec<_> = loaded.ranks().unwrap().into_iter().map(contents).collect();
    drop(loaded);
    for (consumers, last) in consumers.iter().zip(last) {
        for (name, bytes) in last {
            assert_eq!(consumers[&name].contents(), bytes, "{name} without its owner");
        }
    }
}

#[test]
fn tensors_show_a_reload_and_outlive_their_group() {
    consumers_see_reloads(DeviceChoice::Cpu);
}

#[test]
fn tensors_on_devices_show_a_reload_and_outlive_their_group() {
    let Some(cuda) = Cuda::find() else { return };
    if cuda.is_inside("tensors_on_devices_show_a_reload_and_outlive_their_group", &late()) {
        consumers_see_reloads(DeviceChoice::Cuda);
        // on a real device other stories of this process allocate too
        let left = Device::open(0).unwrap().allocated_bytes();
        assert!(!cuda.is_emulated() || left == 0, "{left} bytes were not given back");
    }
}

/// In the environment of a server: the file that tells it what it is to open.
const EXPORT: &str = "LONGSHORE_TEST_EXPORT";

/// A number for each parameter's bytes.
fn hashes(params: impl Iterator<Item = (String, Vec<u8>)>) -> String {
    let hash = |(name, bytes): (String, Vec<u8>)| {
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        format!("{name}={:x}", hasher.finish())
    };
    params.map(hash).collect::<Vec<_>>().join(" ")
}

/// Opens what it is told, and says what is there whenever it is asked.
fn serve(export: &str) {
    let text = fs::read_to_string(export).unwrap();
    let export: IpcExport = serde_json::from_str(&text).unwrap();
    let params = IpcParams::open(&export).unwrap_or_else(|e| panic!("{}", e.line()));
    assert!(params.aliases().count() > 0);
    for (name, of) in params.aliases() {
        assert_eq!(params.get(name).unwrap().address, params.get(of).unwrap().address);
    }
    for param in params.iter() {
        let consumer = Consumer(param.dlpack().into_raw());
        assert_eq!(consumer.tensor().data as u64, param.address);
        assert_eq!(
            on_device(params.device(), param.address, param.bytes as usize),
            consumer.contents()
        );
    }
    for _asked in io::stdin().lines() {
        let each = params
            .iter()
            .map(|p| (p.name.to_owned(), on_device(params.device(), p.address, p.bytes as usize)));
        eprintln!("holds {} {}", params.rank(), hashes(each));
    }
}

#[test]
fn a_server_in_another_process_reads_parameters_where_they_are() {
    let name = "a_server_in_another_process_reads_parameters_where_they_are";
    let Some(cuda) = Cuda::find() else { return };
    if !cuda.is_inside(name, &late()) {
        return;
    }
    if let Ok(export) = env::var(EXPORT) {
        return serve(&export);
    }
    let scratch = Scratch::new().unwrap();
    let [a, b] = pair(&scratch);
    let mut loaded = loaded(&a, DeviceChoice::Cuda);
    let export = loaded.ranks().unwrap()[1].ipc().unwrap_or_else(|e| panic!("{}", e.line()));
    let refused = IpcParams::open(&export).unwrap_err().line();
    assert!(refused.ends_with("this process exported them itself and can use them as they are"));
    let mut elsewhere = serde_json::to_value(&export).unwrap();
    elsewhere["process"] = 0.into();
    elsewhere["device"] = vec![0xee; 16].into();
    let elsewhere: IpcExport = serde_json::from_value(elsewhere).unwrap();
    let refused = IpcParams::open(&elsewhere).unwrap_err().line();
    let invisible =
        "device GPU-eeeeeeee-eeee-eeee-eeee-eeeeeeeeeeee is not visible to this process";
    assert!(refused.ends_with(invisible), "{refused}");

    let told: PathBuf = scratch.join("export.json");
    fs::write(&told, serde_json::to_string(&export).unwrap()).unwrap();
    let mut server = Command::new(env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(EXPORT, &told)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ask = server.stdin.take().unwrap();
    let mut answers = BufReader::new(server.stderr.take().unwrap()).lines();
    let mut check = |loaded: &Loaded| {
        writeln!(ask, "what do you hold?").unwrap();
        let params = loaded.ranks().unwrap()[1];
        let own =
            params.iter().map(|p| (p.name.to_owned(), p.data.to_host().unwrap().into_owned()));
        let own = format!("holds 1 {}", hashes(own));
        let mut told = answers.by_ref().map(Result::unwrap).inspect(|line| eprintln!("{line}"));
        assert_eq!(told.find(|line| line.starts_with("holds")).unwrap(), own);
        own
    };
    let first = check(&loaded);
    loaded.reload(&b).unwrap_or_else(|e| panic!("{}", e.line()));
    assert_ne!(check(&loaded), first);
    drop(ask);
    assert!(server.wait().unwrap().success());
}
