//! What kernels are compared with: random bytes, and what the host makes of them.

use longshore_kernels::{
    cuda::permute::Order,
    host::{blocks::into_blocks, rows::permute_rows, shuffle, swizzle},
};
use longshore_models::transform::{Matrices, Reordering, RowOrder};

/// A generator of numbers, the same in each run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 33) % end
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 40) as u8).collect()
    }
}

pub(crate) fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    if let Some(at) = (0..got.len()).find(|i| got[*i] != want[*i]) {
        panic!("{what}: byte {at} of {} is {:#x}, not {:#x}", got.len(), got[at], want[at]);
    }
}

/// What a rank does to the matrices of a parameter on the host.
pub(crate) fn reorder_on_host(bytes: &mut [u8], m: &Matrices, how: Reordering) {
    let (rows, row_bytes) = (m.rows as usize, m.row_bytes as usize);
    let workspace = &mut Vec::new();
    for matrix in bytes.chunks_exact_mut((rows * row_bytes).max(1)) {
        let by = |order: RowOrder| move |i| Order::from(order).source(i, rows);
        let band = |order: RowOrder, least| order.band(m.rows, least) as usize;
        match how {
            // of whole bands of 32 rows only, where there is something to do
            Reordering::Rows(RowOrder::AsStored) => {}
            Reordering::Rows(order) => {
                permute_rows(matrix, row_bytes, band(order, 32), by(order), workspace);
            }
            Reordering::Blocks(order) => {
                into_blocks(matrix, rows, row_bytes, by(order), workspace);
            }
            Reordering::Swizzled(order) => {
                let band = band(order, 128);
                swizzle::swizzle_in_place(matrix, rows, row_bytes, by(order), band, workspace);
            }
            Reordering::ScaleTiles => shuffle::shuffle_scales(matrix, rows, row_bytes, workspace),
            Reordering::WeightTiles => shuffle::shuffle_weights(matrix, rows, row_bytes, workspace),
        }
    }
}

pub(crate) const ROW_ORDERS: [RowOrder; 3] =
    [RowOrder::AsStored, RowOrder::Shuffled32, RowOrder::GatedShuffled32];
