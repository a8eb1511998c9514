//! safetensors headers: from bytes to entries that can be trusted.
//!
//! A file is `u64 little-endian n`, `n` bytes of JSON, then the data section. The JSON maps names to
//! `{dtype, shape, data_offsets}`; offsets are relative to the data section, which the tensors must tile without gap
//! or overlap. Source: the format's specification, `huggingface/safetensors` README "Format".

use std::{collections::HashMap, fmt};

use crate::dtype::Dtype;
use serde::{
    Deserialize,
    de::{MapAccess, Visitor},
};

use crate::{byte_range::ByteRange, error::CheckpointError};

/// The longest header that is accepted, in bytes (the limit of the format's own implementation).
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// One tensor as a header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderEntry {
    /// The tensor's name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<u64>,
    /// Its bytes, relative to the data section.
    pub data_offsets: ByteRange,
}

/// Reads the header's length from the first eight bytes of a file and checks it against the file's length.
///
/// # Errors
/// When the file is too short for the length, or for the header that the length announces, or when the header would
/// be longer than [`HEADER_BYTES_MAX`].
pub fn header_bytes(file: &str, prefix: &[u8], file_bytes: u64) -> Result<u64, CheckpointError> {
    let Some(prefix) = prefix.first_chunk::<8>().filter(|_| file_bytes >= 8) else {
        return Err(CheckpointError::NoHeader { file: file.into(), file_bytes });
    };
    let found = u64::from_le_bytes(*prefix);
    let limit = HEADER_BYTES_MAX.min(file_bytes - 8);
    if found > limit {
        return Err(CheckpointError::HeaderTooLong { file: file.into(), found, limit, file_bytes });
    }
    Ok(found)
}

/// Parses a header's JSON and proves that its entries tile a data section of `data_bytes` bytes.
///
/// The entries come back in the order in which they lie in the file.
///
/// # Errors
/// Names file, tensor and numbers: syntax, duplicate names, sizes that overflow or do not match the offsets, overlaps,
/// holes, a data section that is longer or shorter than the entries.
pub fn parse_header(
    file: &str,
    json: &[u8],
    data_bytes: u64,
) -> Result<Vec<HeaderEntry>, CheckpointError> {
    let header: Header = serde_json::from_slice(json)
        .map_err(|e| CheckpointError::HeaderSyntax { file: file.into(), reason: e.to_string() })?;
    let mut entries = Vec::with_capacity(header.0.len());
    for (name, raw) in header.0 {
        entries.push(checked_entry(file, name, raw)?);
    }
    check_unique(file, &entries)?;
    entries.sort_by_key(|e| (e.data_offsets.start, e.data_offsets.end));
    check_tiling(file, &entries, 8 + json.len() as u64, data_bytes)?;
    Ok(entries)
}

fn checked_entry(file: &str, name: String, raw: RawEntry) -> Result<HeaderEntry, CheckpointError> {
    let RawEntry { dtype, shape, data_offsets: (begin, end) } = raw;
    let Some(expected) = tensor_bytes(dtype, &shape) else {
        return Err(CheckpointError::SizeOverflow {
            file: file.into(),
            tensor: name,
            dtype,
            shape,
        });
    };
    if end < begin {
        return Err(CheckpointError::BackwardOffsets {
            file: file.into(),
            tensor: name,
            begin,
            end,
        });
    }
    let range = ByteRange::new(begin, end);
    if range.len() != expected {
        return Err(CheckpointError::SizeMismatch {
            file: file.into(),
            tensor: name,
            dtype,
            shape,
            expected,
            range,
        });
    }
    Ok(HeaderEntry { name, dtype, shape, data_offsets: range })
}

/// Bytes of a tensor; `None` when they overflow or are no whole number (sub-byte types).
pub fn tensor_bytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let elems = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
    let bits = elems.checked_mul(dtype.bitsize() as u64)?;
    (bits % 8 == 0).then_some(bits / 8)
}

fn check_unique(file: &str, entries: &[HeaderEntry]) -> Result<(), CheckpointError> {
    let mut names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => {
            Err(CheckpointError::DuplicateInHeader { file: file.into(), tensor: w[0].into() })
        }
        None => Ok(()),
    }
}

fn check_tiling(
    file: &str,
    entries: &[HeaderEntry],
    data_start: u64,
    data_bytes: u64,
) -> Result<(), CheckpointError> {
    let (mut at, mut previous) = (0, "");
    for e in entries {
        let range = e.data_offsets;
        if range.start < at {
            return Err(CheckpointError::Overlap {
                file: file.into(),
                tensor: e.name.clone(),
                range,
                previous: previous.into(),
                previous_end: at,
            });
        }
        if range.start > at {
            return Err(CheckpointError::Hole {
                file: file.into(),
                tensor: e.name.clone(),
                range,
                previous_end: at,
            });
        }
        (at, previous) = (range.end, &e.name);
    }
    if at != data_bytes {
        return Err(CheckpointError::FileLength {
            file: file.into(),
            data_start,
            expected: at,
            found: data_bytes,
            tensor: previous.into(),
        });
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's map in file order, duplicates kept (a map type would drop all but the last).
struct Header(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Option<HashMap<String, String>>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
