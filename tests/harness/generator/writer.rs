//! Collects tensors with random weights: single tensors, norms, scalars and linear layers.

use super::numbers::{bell, encode, flat, random_bytes};
use super::settings::Settings;
use super::tensor::Tensor;
use super::{Family, Scheme};

/// The model under construction.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    pub(super) family: Family,
    pub(super) scheme: Scheme,
    pub(super) settings: &'a Settings,
    pub(super) seed: u64,
    pub(super) tensors: Vec<Tensor>,
}

/// A linear layer to write: its shape and how it is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Linear<'a> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) scheme: Scheme,
    /// The name that seeds an NVFP4 input scale shared with another layer.
    pub(super) input_scale_of: Option<&'a str>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        family: Family,
        scheme: Scheme,
        settings: &'a Settings,
        seed: u64,
    ) -> Writer<'a> {
        Writer { family, scheme, settings, seed, tensors: Vec::new() }
    }

    pub(super) fn raw(&mut self, name: &str, dtype: &str, shape: &[usize], data: Vec<u8>) {
        self.tensors.push(Tensor::new(name, dtype, shape, data));
    }

    /// BF16 numbers around zero.
    pub(super) fn weight(&mut self, name: &str, shape: &[usize]) {
        self.bell_shaped(name, shape, "BF16", 0.02, 0.0);
    }

    /// Roughly normal numbers.
    pub(super) fn bell_shaped(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: &str,
        deviation: f64,
        mean: f64,
    ) {
        let count = shape.iter().product();
        let mut values = bell(self.seed, name, count);
        for value in &mut values {
            *value = mean + deviation * *value;
        }
        self.raw(name, dtype, shape, numbers(&values, dtype));
    }

    /// The weight of a normalisation, around one, in the checkpoint's dtype for norms.
    pub(super) fn norm(&mut self, name: &str, size: usize) {
        let dtype = self.settings.text("norm_dtype").unwrap_or("BF16");
        self.bell_shaped(&format!("{name}.weight"), &[size], dtype, 0.1, 1.0);
    }

    /// A normalisation with a bias, in the given dtype or the checkpoint's dtype for norms.
    pub(super) fn biased_norm(&mut self, name: &str, size: usize, dtype: Option<&str>) {
        let dtype = dtype.or(self.settings.text("norm_dtype")).unwrap_or("BF16");
        self.bell_shaped(&format!("{name}.weight"), &[size], dtype, 0.1, 1.0);
        self.bell_shaped(&format!("{name}.bias"), &[size], dtype, 0.1, 0.0);
    }

    /// One F32 number in `[low, high)`, drawn by the name `of`.
    pub(super) fn scalar_of(&mut self, name: &str, of: &str, shape: &[usize], range: [f64; 2]) {
        let value = flat(self.seed, of, 1, range[0], range[1]);
        self.raw(name, "F32", shape, numbers(&value, "F32"));
    }

    /// One plain linear layer.
    pub(super) fn plain_linear(&mut self, name: &str, rows: usize, columns: usize) {
        let plain = Linear { rows, columns, scheme: Scheme::Bf16, input_scale_of: None };
        self.linear(name, plain);
    }

    /// One quantised or plain linear layer, weights first.
    pub(super) fn linear(&mut self, name: &str, linear: Linear<'_>) {
        match linear.scheme {
            Scheme::Bf16 => self.weight(&format!("{name}.weight"), &[linear.rows, linear.columns]),
            Scheme::Fp8 => self.fp8_linear(name, linear),
            Scheme::Nvfp4 => self.nvfp4_linear(name, linear),
            Scheme::Mxfp4 => self.mxfp4_linear(name, linear),
            Scheme::Int4 => self.int4_linear(name, linear),
        }
    }

    fn fp8_linear(&mut self, name: &str, Linear { rows, columns, .. }: Linear<'_>) {
        let weight = format!("{name}.weight");
        let mut codes = random_bytes(self.seed, &weight, rows * columns);
        for code in &mut codes {
            if *code & 0x7F == 0x7F {
                *code ^= 1; // no NaN
            }
        }
        self.raw(&weight, "F8_E4M3", &[rows, columns], codes);
        let scale = format!("{name}.weight_scale_inv");
        let shape = [rows.div_ceil(128), columns.div_ceil(128)];
        let values = flat(self.seed, &scale, shape[0] * shape[1], 5e-5, 5e-4);
        self.raw(&scale, "F32", &shape, numbers(&values, "F32"));
    }

    fn nvfp4_linear(&mut self, name: &str, linear: Linear<'_>) {
        let Linear { rows, columns, .. } = linear;
        assert_eq!(columns % 16, 0, "{name} has {columns} columns");
        self.fp4_codes(name, rows, columns);
        let scale = format!("{name}.weight_scale");
        let mut codes = random_bytes(self.seed, &scale, rows * columns / 16);
        for code in &mut codes {
            *code = 8 + *code % 119; // 2^-6 … 448, positive
        }
        self.raw(&scale, "F8_E4M3", &[rows, columns / 16], codes);

        let shape = vec![1; self.settings.size("scalar_shape")];
        let scale_2 = format!("{name}.weight_scale_2");
        self.scalar_of(&scale_2, &scale_2, &shape, [2e-5, 2e-4]);
        let input_scale = format!("{name}.input_scale");
        let differs = self.settings.flag("input_scale_pair_differs");
        // gate and up of one expert see the same input, so their input scale is the same number
        let of = linear.input_scale_of.filter(|_| !differs).unwrap_or(&input_scale);
        self.scalar_of(&input_scale, of, &shape, [1e-3, 1e-2]);
    }

    fn mxfp4_linear(&mut self, name: &str, Linear { rows, columns, .. }: Linear<'_>) {
        assert_eq!(columns % 32, 0, "{name} has {columns} columns");
        self.fp4_codes(name, rows, columns);
        let scale = format!("{name}.weight_scale");
        let mut codes = random_bytes(self.seed, &scale, rows * columns / 32);
        for code in &mut codes {
            *code = 112 + *code % 12;
        }
        self.raw(&scale, "U8", &[rows, columns / 32], codes);
    }

    fn fp4_codes(&mut self, name: &str, rows: usize, columns: usize) {
        let weight = format!("{name}.weight");
        let codes = random_bytes(self.seed, &weight, rows * columns / 2);
        self.raw(&weight, "U8", &[rows, columns / 2], codes);
    }

    fn int4_linear(&mut self, name: &str, Linear { rows, columns, .. }: Linear<'_>) {
        assert_eq!(columns % 32, 0, "{name} has {columns} columns");
        let packed = format!("{name}.weight_packed");
        let codes = random_bytes(self.seed, &packed, rows * columns / 2);
        self.raw(&packed, "I32", &[rows, columns / 8], codes);
        let scale = format!("{name}.weight_scale");
        let values = flat(self.seed, &scale, rows * columns / 32, 1e-3, 2e-2);
        self.raw(&scale, "BF16", &[rows, columns / 32], numbers(&values, "BF16"));
        let shape = numbers(&[rows as f64, columns as f64], "I64");
        self.raw(&format!("{name}.weight_shape"), "I64", &[2], shape);
    }
}

fn numbers(values: &[f64], dtype: &str) -> Vec<u8> {
    encode(values, dtype).expect("a dtype setting names a float or integer of 16 to 64 bits")
}
