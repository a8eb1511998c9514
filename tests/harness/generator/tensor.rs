//! One tensor as it stands in a checkpoint file.

/// Name, dtype in safetensors spelling, shape and bytes.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<u8>,
}

impl Tensor {
    /// # Panics
    /// If the bytes do not fill the shape: the generator's own mistake.
    pub(super) fn new(name: &str, dtype: &str, shape: &[usize], data: Vec<u8>) -> Tensor {
        let bytes = shape.iter().product::<usize>() * element_bytes(dtype);
        assert_eq!(data.len(), bytes, "{name} {dtype} {shape:?}");
        Tensor { name: name.to_owned(), dtype: dtype.to_owned(), shape: shape.to_vec(), data }
    }

    /// Bytes of one element.
    pub(super) fn element_bytes(&self) -> usize {
        element_bytes(&self.dtype)
    }
}

fn element_bytes(dtype: &str) -> usize {
    match dtype {
        "U8" | "F8_E4M3" => 1,
        "BF16" | "F16" => 2,
        "F32" | "I32" => 4,
        "I64" => 8,
        other => unreachable!("the generator writes no {other}"),
    }
}
