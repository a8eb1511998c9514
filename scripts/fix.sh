#!/usr/bin/env bash
# The writing twin of check.sh: formats, and applies what clippy can mend.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged
cargo fmt --all
