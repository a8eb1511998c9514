//! Reads what emulated processes append to [`crate::Options::log`].
//!
//! ```text
//! <pid> op <device> <stream> <kind> <bytes> <kernel or -> <queued ns> <start ns> <end ns> <state of the context>
//! <pid> alloc|free|open|close <device> <address> <bytes> <used bytes> <ns>
//! ```
//!
//! Times are those of a clock that all processes of a host share. Devices are numbered as the machine does, whichever a
//! process sees.

use std::{fs, io, ops::Range, path::Path};

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// An operation of a stream has ended.
    Operation(Operation),
    /// Device memory was taken, given back, or opened or closed by another process.
    Memory(Memory),
}

/// What a stream has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// The process.
    pub process: u32,
    /// The device.
    pub device: u32,
    /// The stream, by the order in which those of a process and device were made.
    pub stream: u32,
    /// `htod`, `dtoh`, `dtod`, `memset`, `kernel`, `record`, `wait`, `host`, or `nccl` for a group of NCCL's.
    pub kind: String,
    /// Bytes copied, set, or counted by the operations of a group.
    pub bytes: u64,
    /// The kernel, or `-`.
    pub name: String,
    /// When it was queued.
    pub queued_ns: u64,
    /// From its start, once nothing held it back any more, to its end.
    pub ran_ns: Range<u64>,
    /// `CUDA_SUCCESS`, or what the context was lost by: by this operation, or before it, and then it did nothing.
    pub context: String,
}

/// A change of what memory a process has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// The process.
    pub process: u32,
    /// The device.
    pub device: u32,
    /// `alloc`, `free`, or `open` and `close` for memory of another process.
    pub kind: String,
    /// Where it is.
    pub address: u64,
    /// How much.
    pub bytes: u64,
    /// What the process has of the device afterwards, memory of others not counted.
    pub used_bytes: u64,
    /// When.
    pub at_ns: u64,
}

/// All lines, in the order in which they were written; empty where no process has begun a log.
///
/// # Errors
///
/// When the file cannot be read, or holds something else.
pub fn read(path: &Path) -> io::Result<Vec<Line>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text?,
    };
    let other = |line: &str| {
        io::Error::new(io::ErrorKind::InvalidData, format!("no line of a log: {line}"))
    };
    text.lines().map(|line| parsed(line).ok_or_else(|| other(line))).collect()
}

/// The operations among them.
pub fn operations(lines: &[Line]) -> impl Iterator<Item = &Operation> {
    lines.iter().filter_map(|line| match line {
        Line::Operation(operation) => Some(operation),
        Line::Memory(_) => None,
    })
}

/// The changes of memory among them.
pub fn memory(lines: &[Line]) -> impl Iterator<Item = &Memory> {
    lines.iter().filter_map(|line| match line {
        Line::Memory(memory) => Some(memory),
        Line::Operation(_) => None,
    })
}

/// The most that the processes of these lines had of a device at a time. One that ended without giving back keeps what
/// it had.
pub fn peak_bytes(lines: &[Line], device: u32) -> u64 {
    let (mut used, mut peak) = (0u64, 0);
    for memory in memory(lines).filter(|memory| memory.device == device) {
        match memory.kind.as_str() {
            "alloc" => used += memory.bytes,
            "free" => used -= memory.bytes,
            _ => {}
        }
        peak = peak.max(used);
    }
    peak
}

fn parsed(line: &str) -> Option<Line> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        [process, "op", device, stream, kind, bytes, name, queued, start, end, context] => {
            Some(Line::Operation(Operation {
                process: process.parse().ok()?,
                device: device.parse().ok()?,
                stream: stream.parse().ok()?,
                kind: kind.to_owned(),
                bytes: bytes.parse().ok()?,
                name: name.to_owned(),
                queued_ns: queued.parse().ok()?,
                ran_ns: start.parse().ok()?..end.parse().ok()?,
                context: context.to_owned(),
            }))
        }
        [process, kind, device, address, bytes, used, at] => Some(Line::Memory(Memory {
            process: process.parse().ok()?,
            device: device.parse().ok()?,
            kind: kind.to_owned(),
            address: u64::from_str_radix(address.strip_prefix("0x")?, 16).ok()?,
            bytes: bytes.parse().ok()?,
            used_bytes: used.parse().ok()?,
            at_ns: at.parse().ok()?,
        })),
        _ => None,
    }
}
