#!/usr/bin/env bash
# Everything that has to hold before a change lands: formatting, lints, tests, documentation. Writes nothing but target/.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
scripts/build_ptx.sh --fresh
cargo clippy --workspace --all-targets --locked -- -D warnings
cargo test --workspace --locked
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
