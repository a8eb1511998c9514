//! Makes the emulated driver and prints the directory that holds its `libcuda.so.1`, for scripts:
//!
//! ```text
//! LD_LIBRARY_PATH=$(cargo run -p longshore-emulator --example library -- target/tmp) longshore load … --device cuda
//! ```

#![expect(clippy::print_stdout, reason = "the directory is what this program is for")]

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    let Some(target_tmp) = env::args_os().nth(1) else {
        eprintln!("library: name a directory of the build tree, such as target/tmp");
        return ExitCode::from(2);
    };
    // relative to where it is called, while the library is looked for from anywhere
    let target_tmp = std::path::absolute(&target_tmp).unwrap_or(target_tmp.into());
    match longshore_emulator::library_dir(target_tmp) {
        Some(directory) => {
            println!("{}", directory.display());
            ExitCode::SUCCESS
        }
        // it has said why
        None => ExitCode::FAILURE,
    }
}
