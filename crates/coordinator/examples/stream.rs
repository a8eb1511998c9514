//! For servers that place weights by themselves: every tensor of a checkpoint once, as it is stored, handed to a
//! `load_weights(name, view)`.
//!
//! ```sh
//! cargo run --example stream -- synth:llama-bf16
//! ```
//!
//! Tensors come in the order in which large reads complete, whatever files they are in. A view borrows from memory that is
//! read into again once it is dropped, so what is to stay is copied to where it belongs.

#![expect(clippy::print_stdout, reason = "a program that tells what it does")]

use std::collections::HashMap;

use longshore::{Dtype, Load, LoadError, Tensor};

/// A server with an own idea of where weights belong.
#[derive(Debug, Default)]
struct Server {
    weights: HashMap<String, (Dtype, Vec<u64>, Vec<u8>)>,
}

impl Server {
    /// What model runners have in one form or another. Here is where one rank's part would be cut out, and fused with others.
    fn load_weights(&mut self, name: &str, view: &Tensor) {
        let weight = (view.dtype(), view.shape().to_vec(), view.bytes().to_vec());
        self.weights.insert(name.to_owned(), weight);
    }
}

fn main() -> Result<(), LoadError> {
    let source = std::env::args().nth(1).unwrap_or_else(|| "synth:llama-bf16".to_owned());
    let mut server = Server::default();
    // at most so much memory for what was read and not yet placed
    let mut tensors = Load::from(source).memory_limit(64 << 20).tensors()?;
    while let Some(tensor) = tensors.next()? {
        server.load_weights(tensor.name(), &tensor);
    }
    // the end comes only after a last look at the files: none has changed since its header was read
    let bytes: usize = server.weights.values().map(|(_, _, bytes)| bytes.len()).sum();
    println!("{} tensors, {bytes} bytes", server.weights.len());
    Ok(())
}
