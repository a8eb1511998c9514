//! A checkpoint: every tensor by name, with dtype, shape, file and absolute byte range.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::dtype::Dtype;

use crate::{
    byte_range::ByteRange,
    error::CheckpointError,
    header::HeaderEntry,
    index::{INDEX_FILE, Index},
};

/// Index of a tensor in [`Checkpoint::tensors`]; the order is that of files and of bytes within a file.
pub type TensorId = u32;

/// One tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<u64>,
    /// The file that holds it (index into [`Checkpoint::files`]).
    pub file: u32,
    /// Its bytes in that file, absolute.
    pub file_range: ByteRange,
}

/// One checkpoint file.
#[derive(Debug, Clone)]
pub struct CheckpointFile {
    /// Name within the checkpoint directory.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Bytes before the data section: the length word and the header.
    pub header_bytes: u64,
}

/// The validated headers of all files of a checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The files, sorted by name.
    pub files: Vec<CheckpointFile>,
    /// All tensors, in the order in which they lie in the files.
    pub tensors: Vec<Tensor>,
    by_name: HashMap<String, TensorId, RandomState>,
}

impl Checkpoint {
    /// Joins the parsed headers of all files, checked against the index where there is one.
    ///
    /// # Errors
    /// A tensor in two files, a tensor that is not where the index says, or one that the index does not list.
    pub fn new(
        headers: Vec<(CheckpointFile, Vec<HeaderEntry>)>,
        index: Option<&Index>,
    ) -> Result<Self, CheckpointError> {
        let mut headers = headers;
        headers.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let count = headers.iter().map(|(_, entries)| entries.len()).sum();
        let mut this = Self {
            files: Vec::with_capacity(headers.len()),
            tensors: Vec::with_capacity(count),
            by_name: HashMap::with_capacity_and_hasher(count, RandomState::default()),
        };
        for (file, entries) in headers {
            this.add_file(file, entries)?;
        }
        if let Some(index) = index {
            this.check_index(index)?;
        }
        Ok(this)
    }

    fn add_file(
        &mut self,
        file: CheckpointFile,
        entries: Vec<HeaderEntry>,
    ) -> Result<(), CheckpointError> {
        let number = self.files.len() as u32;
        for e in entries {
            let id = self.tensors.len() as TensorId;
            if let Some(other) = self.by_name.insert(e.name.clone(), id) {
                let first = self.tensors[other as usize].file as usize;
                return Err(CheckpointError::DuplicateTensor {
                    tensor: e.name,
                    first: self.files[first].name.clone(),
                    second: file.name,
                });
            }
            let ByteRange { start, end } = e.data_offsets;
            self.tensors.push(Tensor {
                name: e.name,
                dtype: e.dtype,
                shape: e.shape,
                file: number,
                file_range: ByteRange::new(file.header_bytes + start, file.header_bytes + end),
            });
        }
        self.files.push(file);
        Ok(())
    }

    /// Index and headers name the same tensors, each once and in the same file.
    fn check_index(&self, index: &Index) -> Result<(), CheckpointError> {
        let mut listed = vec![false; self.tensors.len()];
        for (tensor, file) in index.entries() {
            let id = self.id(tensor).map(|id| id as usize);
            match id.filter(|&id| self.file_name(&self.tensors[id]) == file) {
                None => {
                    return Err(CheckpointError::IndexMissingTensor {
                        index: INDEX_FILE.into(),
                        tensor: tensor.into(),
                        expected: file.into(),
                    });
                }
                Some(id) if listed[id] => {
                    return Err(CheckpointError::IndexSyntax {
                        file: INDEX_FILE.into(),
                        reason: format!("tensor {tensor} stands twice in weight_map"),
                    });
                }
                Some(id) => listed[id] = true,
            }
        }
        match self.tensors.iter().zip(listed).find(|(_, listed)| !listed) {
            Some((t, _)) => Err(CheckpointError::NotInIndex {
                file: self.file_name(t).into(),
                tensor: t.name.clone(),
                listed: "not at all".into(),
            }),
            None => Ok(()),
        }
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.id(name).map(|id| &self.tensors[id as usize])
    }

    /// The number of the tensor of that name.
    pub fn id(&self, name: &str) -> Option<TensorId> {
        self.by_name.get(name).copied()
    }

    /// The name of the file that holds `tensor`.
    pub fn file_name(&self, tensor: &Tensor) -> &str {
        &self.files[tensor.file as usize].name
    }

    /// Cuts `range` of `file` into pieces of at most `bytes_max` (at least 16), on page boundaries of the file where these
    /// cut no element.
    pub fn cut(
        &self,
        file: u32,
        range: ByteRange,
        bytes_max: u64,
    ) -> impl Iterator<Item = ByteRange> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at == range.end {
                return None;
            }
            let end = if range.end - at <= bytes_max {
                range.end
            } else {
                self.cut_before(file, at, at + bytes_max)
            };
            let piece = ByteRange::new(at, end);
            at = end;
            Some(piece)
        })
    }

    /// The best place to cut in `at + 8 .. limit`: no element is cut, and on a page boundary if possible.
    fn cut_before(&self, file: u32, at: u64, limit: u64) -> u64 {
        const PAGE: u64 = 4096;
        // no element is longer than this
        const ELEMENT: u64 = 8;
        let page = limit - limit % PAGE;
        let wanted = if page > at + ELEMENT { page } else { limit };
        let number = self.tensors.partition_point(|t| (t.file, t.file_range.end) <= (file, wanted));
        match self.tensors.get(number) {
            Some(t) if t.file == file && t.file_range.start < wanted => {
                wanted - (wanted - t.file_range.start) % ELEMENT
            }
            _ => wanted,
        }
    }

    /// The tensors that `range` of `file` touches: `(tensor, the part of it, where that part begins in the range)`.
    pub fn tensors_in(
        &self,
        file: u32,
        range: ByteRange,
    ) -> impl Iterator<Item = (TensorId, ByteRange, u64)> {
        let first =
            self.tensors.partition_point(|t| (t.file, t.file_range.end) <= (file, range.start));
        let touched = move |t: &&Tensor| t.file == file && t.file_range.start < range.end;
        self.tensors[first..].iter().take_while(touched).enumerate().filter_map(move |(i, t)| {
            let (part, start) = (t.file_range.intersect(&range)?, t.file_range.start);
            let within = ByteRange::new(part.start - start, part.end - start);
            Some(((first + i) as TensorId, within, part.start - range.start))
        })
    }

    /// Bytes of data of all tensors, headers not counted.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.file_range.len()).sum()
    }
}
