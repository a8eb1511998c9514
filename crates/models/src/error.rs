//! What can be wrong with a checkpoint, a configuration or a plan, with names and numbers.

use crate::dtype::Dtype;

use crate::byte_range::ByteRange;

/// Why a checkpoint was refused before any weight was read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file cannot hold the eight bytes that give the header's length.
    #[error(
        "{file}: {file_bytes} bytes are too few for a safetensors file (8 bytes give the header's length)"
    )]
    NoHeader {
        /// The checkpoint file.
        file: String,
        /// Its length.
        file_bytes: u64,
    },
    /// The header claims a length that is over the limit or past the end of the file.
    #[error(
        "{file}: header claims {found} bytes at offset 8, at most {limit} are possible (file has {file_bytes} bytes)"
    )]
    HeaderTooLong {
        /// The checkpoint file.
        file: String,
        /// The claimed length.
        found: u64,
        /// The most that is accepted here.
        limit: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// The header is no valid safetensors header.
    #[error("{file}: header is not valid safetensors JSON: {reason}")]
    HeaderSyntax {
        /// The checkpoint file.
        file: String,
        /// What the JSON reader said.
        reason: String,
    },
    /// A tensor stands twice in one header.
    #[error("{file}: tensor {tensor} stands twice in the header")]
    DuplicateInHeader {
        /// The checkpoint file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// Shape times element size does not fit in 64 bits.
    #[error("{file}: tensor {tensor}: {dtype} {shape:?} overflows 64 bits")]
    SizeOverflow {
        /// The checkpoint file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// The data offsets run backwards.
    #[error("{file}: tensor {tensor}: data_offsets {begin}..{end} run backwards")]
    BackwardOffsets {
        /// The checkpoint file.
        file: String,
        /// The tensor.
        tensor: String,
        /// First offset.
        begin: u64,
        /// Second offset.
        end: u64,
    },
    /// Dtype × shape is not the length that the offsets give.
    #[error("{file}: tensor {tensor}: {dtype} {shape:?} needs {expected} bytes, data_offsets {range} hold {}", .range.len())]
    SizeMismatch {
        /// The checkpoint file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes that dtype and shape need.
        expected: u64,
        /// Its offsets, relative to the data section.
        range: ByteRange,
    },
    /// Two tensors share bytes.
    #[error("{file}: tensor {tensor} at data offset {} overlaps {previous}, which ends at {previous_end}", .range.start)]
    Overlap {
        /// The checkpoint file.
        file: String,
        /// The later tensor.
        tensor: String,
        /// Its offsets, relative to the data section.
        range: ByteRange,
        /// The tensor before it.
        previous: String,
        /// Where that one ends.
        previous_end: u64,
    },
    /// Bytes between two tensors belong to none.
    #[error("{file}: hole in the data section: tensor {tensor} begins at {}, the tensor before it ends at {previous_end}", .range.start)]
    Hole {
        /// The checkpoint file.
        file: String,
        /// The later tensor.
        tensor: String,
        /// Its offsets, relative to the data section.
        range: ByteRange,
        /// Where the tensor before it ends (0: there is none).
        previous_end: u64,
    },
    /// The file is shorter or longer than its header says.
    #[error(
        "{file}: header describes {expected} bytes of data after offset {data_start}, the file has {found} (last tensor {tensor})"
    )]
    FileLength {
        /// The checkpoint file.
        file: String,
        /// Where the data section begins.
        data_start: u64,
        /// Bytes that the header describes.
        expected: u64,
        /// Bytes that the file has there.
        found: u64,
        /// The last tensor of the file.
        tensor: String,
    },
    /// `model.safetensors.index.json` is no valid index.
    #[error("{file}: {reason}")]
    IndexSyntax {
        /// The index file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// An index entry is not a plain file name.
    #[error(
        "{index}: tensor {tensor} is said to be in {found:?}, which is not a plain file name beside the index"
    )]
    IndexPath {
        /// The index file.
        index: String,
        /// The tensor.
        tensor: String,
        /// The entry.
        found: String,
    },
    /// The index names a file that does not exist.
    #[error("{index}: tensor {tensor} is said to be in {found}, which does not exist")]
    IndexMissingFile {
        /// The index file.
        index: String,
        /// The first tensor said to be there.
        tensor: String,
        /// The missing file.
        found: String,
    },
    /// A tensor is not in the file that the index names.
    #[error("{index}: tensor {tensor} is said to be in {expected}, whose header does not list it")]
    IndexMissingTensor {
        /// The index file.
        index: String,
        /// The tensor.
        tensor: String,
        /// The file that should hold it.
        expected: String,
    },
    /// A file holds a tensor that the index does not place there.
    #[error("{file}: tensor {tensor} is not listed for this file in the index ({listed})")]
    NotInIndex {
        /// The file that holds it.
        file: String,
        /// The tensor.
        tensor: String,
        /// What the index says of it.
        listed: String,
    },
    /// One tensor lies in two files.
    #[error("tensor {tensor} lies in both {first} and {second}")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// There is no checkpoint file.
    #[error("no model.safetensors.index.json and no *.safetensors file here")]
    NoFiles,
}

/// Why a configuration and a checkpoint do not make a plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A JSON file cannot be parsed.
    #[error("{file}: not valid JSON: {reason}")]
    ConfigSyntax {
        /// The file.
        file: String,
        /// What the JSON reader said.
        reason: String,
    },
    /// A key is missing or has a value that cannot be used.
    #[error("{file}: {key}: expected {expected}, found {found}")]
    ConfigValue {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// What would be right.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// Options, dimensions and parallel sizes do not go together.
    #[error("{what}: {found}; {expected}")]
    Unsupported {
        /// The module, option or dimension.
        what: String,
        /// The numbers at hand.
        found: String,
        /// What would be needed.
        expected: String,
    },
    /// A tensor that a parameter needs is not in the checkpoint.
    #[error("tensor {tensor} is missing: parameter {param} needs it")]
    MissingTensor {
        /// The missing tensor.
        tensor: String,
        /// The parameter.
        param: String,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("{file}: tensor {tensor}: expected shape {expected:?}, found {found:?}")]
    WrongShape {
        /// The checkpoint file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shape that config.json implies.
        expected: Vec<u64>,
        /// The shape in the header.
        found: Vec<u64>,
    },
    /// A tensor has a dtype that cannot become the parameter's.
    #[error("{file}: tensor {tensor}: expected {expected}, found {found}")]
    WrongDtype {
        /// The checkpoint file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What would be accepted.
        expected: String,
        /// The dtype in the header.
        found: Dtype,
    },
    /// The checkpoint holds a tensor that the model has no use for.
    #[error(
        "{file}: tensor {tensor} ({dtype} {shape:?}) belongs to no parameter of {family}; --allow-unknown skips such tensors"
    )]
    UnknownTensor {
        /// The checkpoint file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// The model family.
        family: String,
    },
    /// Two spellings of one name are both present.
    #[error("tensors {first} and {second} are the same tensor under two names")]
    DoublySupplied {
        /// One spelling.
        first: String,
        /// The other.
        second: String,
    },
    /// Parts of one fused parameter are stored in different ways.
    #[error(
        "{param}: {first} is stored as {first_scheme}, {second} as {second_scheme}; parts of one fused parameter must be stored alike"
    )]
    MixedSchemes {
        /// The fused parameter.
        param: String,
        /// One part.
        first: String,
        /// How it is stored.
        first_scheme: String,
        /// Another part.
        second: String,
        /// How that one is stored.
        second_scheme: String,
    },
    /// A module is stored in a scheme that the configuration does not declare.
    #[error(
        "{module} is stored as {found}, but {declared_in} declares {declared}; if all quantised modules are, say --quantization {found}"
    )]
    UndeclaredScheme {
        /// The module.
        module: String,
        /// How it is stored.
        found: String,
        /// Where the declaration stands.
        declared_in: String,
        /// What is declared.
        declared: String,
    },
    /// A checkpoint to be reloaded does not fill the parameters that the ranks hold.
    #[error("cannot be loaded in place: parameter {param}: expected {expected}, found {found}")]
    OtherParameters {
        /// The first parameter that differs.
        param: String,
        /// What the ranks hold.
        expected: String,
        /// What the new checkpoint implies.
        found: String,
    },
    /// Two files declare different quantisations.
    #[error(
        "{first} says {first_value}, {second} says {second_value}; --quantization METHOD decides which one is meant"
    )]
    DeclarationsDiffer {
        /// File and key of one declaration.
        first: String,
        /// What it declares.
        first_value: String,
        /// File and key of the other.
        second: String,
        /// What that one declares.
        second_value: String,
    },
    /// A module is stored in another scheme than the user named.
    #[error("{module} is stored as {found}, but --quantization {word} was given ({files})")]
    UserContradicted {
        /// The module.
        module: String,
        /// How it is stored.
        found: String,
        /// What the user said.
        word: String,
        /// What the files say.
        files: String,
    },
    /// The plan contradicts itself: a bug of ours, caught before it could do harm.
    #[error("plan check failed for {what}: {found}; please report this")]
    Inconsistent {
        /// The parameter or tensor.
        what: String,
        /// What does not add up.
        found: String,
    },
}

impl PlanError {
    /// Shorthand for [`PlanError::Unsupported`].
    pub(crate) fn unsupported(
        what: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Unsupported { what: what.into(), found: found.into(), expected: expected.into() }
    }
}
