//! A whole tensor in memory and the few ways to cut and join it, all by plain loops.

use super::numbers::{decode_floats, encode_floats};

/// Dtype in safetensors spelling, shape, and bytes in row-major order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

impl Tensor {
    pub(super) fn new(dtype: &str, shape: &[usize], bytes: Vec<u8>) -> Tensor {
        let tensor = Tensor { dtype: dtype.to_owned(), shape: shape.to_vec(), bytes };
        let count: usize = shape.iter().product();
        assert_eq!(tensor.bytes.len(), count * tensor.element(), "{dtype} {shape:?}");
        tensor
    }

    pub(super) fn zeros(dtype: &str, shape: &[usize]) -> Tensor {
        let mut tensor = Tensor { dtype: dtype.to_owned(), shape: shape.to_vec(), bytes: vec![] };
        tensor.bytes = vec![0; shape.iter().product::<usize>() * tensor.element()];
        tensor
    }

    /// F32 numbers in the given shape.
    pub(super) fn numbers(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::new("F32", shape, encode_floats("F32", values))
    }

    /// Bytes of one element.
    pub(super) fn element(&self) -> usize {
        match self.dtype.as_str() {
            "U8" | "F8_E4M3" => 1,
            "BF16" | "F16" => 2,
            "F32" | "I32" => 4,
            "I64" => 8,
            other => panic!("no model stores {other}"),
        }
    }

    /// Bytes of one step along the first axis.
    pub(super) fn row_bytes(&self) -> usize {
        self.shape[1..].iter().product::<usize>() * self.element()
    }

    /// Rows `start..start + count` of the first axis.
    pub(super) fn rows(&self, start: usize, count: usize) -> Tensor {
        assert!(start + count <= self.shape[0], "rows {start}+{count} of {:?}", self.shape);
        self.rows_or_zeros(start, count)
    }

    /// Rows `start..start + count`; those past the end are zero.
    pub(super) fn rows_or_zeros(&self, start: usize, count: usize) -> Tensor {
        let mut shape = self.shape.clone();
        shape[0] = count;
        let mut out = Tensor::zeros(&self.dtype, &shape);
        let size = self.row_bytes();
        for row in 0..count {
            if start + row < self.shape[0] {
                let from = (start + row) * size;
                out.bytes[row * size..][..size].copy_from_slice(&self.bytes[from..][..size]);
            }
        }
        out
    }

    /// Columns `start..start + count` of a matrix.
    pub(super) fn columns(&self, start: usize, count: usize) -> Tensor {
        assert!(start + count <= self.shape[1], "columns {start}+{count} of {:?}", self.shape);
        self.columns_or_zeros(start, count)
    }

    /// Columns `start..start + count` of a matrix; those past the end are zero.
    pub(super) fn columns_or_zeros(&self, start: usize, count: usize) -> Tensor {
        let [rows, columns] = self.matrix();
        let size = self.element();
        let mut out = Tensor::zeros(&self.dtype, &[rows, count]);
        for row in 0..rows {
            for column in 0..count {
                if start + column < columns {
                    let from = (row * columns + start + column) * size;
                    let to = (row * count + column) * size;
                    out.bytes[to..][..size].copy_from_slice(&self.bytes[from..][..size]);
                }
            }
        }
        out
    }

    /// The matrix with zeros added below and to the right.
    pub(super) fn padded(&self, rows: usize, columns: usize) -> Tensor {
        self.rows_or_zeros(0, rows).columns_or_zeros(0, columns)
    }

    /// Rows and columns of a matrix.
    pub(super) fn matrix(&self) -> [usize; 2] {
        self.shape[..].try_into().unwrap_or_else(|_| panic!("{:?} is no matrix", self.shape))
    }

    /// The same bytes under another shape.
    pub(super) fn reshaped(&self, shape: &[usize]) -> Tensor {
        Tensor::new(&self.dtype, shape, self.bytes.clone())
    }

    /// The tensors one below the other.
    pub(super) fn stack(parts: &[Tensor]) -> Tensor {
        let mut shape = parts[0].shape.clone();
        shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        let same = |part: &Tensor| part.dtype == parts[0].dtype && part.shape[1..] == shape[1..];
        assert!(parts.iter().all(same), "parts of one parameter differ in dtype or width");
        let bytes = parts.iter().flat_map(|part| part.bytes.clone()).collect();
        Tensor::new(&parts[0].dtype, &shape, bytes)
    }

    /// Equal tensors along a new first axis, as experts are.
    pub(super) fn batch(parts: &[Tensor]) -> Tensor {
        let mut shape = vec![parts.len()];
        shape.extend(&parts[0].shape);
        assert!(parts.iter().all(|p| p.shape == parts[0].shape && p.dtype == parts[0].dtype));
        let bytes = parts.iter().flat_map(|part| part.bytes.clone()).collect();
        Tensor::new(&parts[0].dtype, &shape, bytes)
    }

    /// The numbers of a float tensor.
    pub(super) fn floats(&self) -> Vec<f32> {
        decode_floats(&self.dtype, &self.bytes)
    }

    /// Converted to another float dtype, to nearest even; unchanged bytes where it has it already.
    pub(super) fn cast(&self, dtype: &str) -> Tensor {
        if self.dtype == dtype {
            return self.clone();
        }
        Tensor::new(dtype, &self.shape, encode_floats(dtype, &self.floats()))
    }
}
