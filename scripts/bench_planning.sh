#!/usr/bin/env bash
# How long planning takes at true scale: DeepSeek-V3 in FP8, headers only, a quarter, half and all of its layers, 16 ranks.
# Prints tensors, seconds of planning (headers already read) and the process's peak memory.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked -p longshore
longshore=$(realpath "${CARGO_TARGET_DIR:-target}")/release/longshore
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for layers in 15 30 61; do
  "$longshore" synth "$dir/$layers" --model deepseek_v3 --quant fp8 --scale full --layers $layers --headers-only --json >"$dir/synth.json"
  "$longshore" plan "$dir/$layers" --tp 16 --json >"$dir/plan.json"
  value() { sed -n "s/^ *\"$2\": \([0-9.e-]*\),*$/\1/p" "$dir/$1.json" | head -1; }
  printf '%s layers: %s tensors, planned in %.3f s, peak memory %.0f MiB\n' "$layers" "$(value synth tensors)" \
    "$(value plan plan)" "$(($(value plan peak_rss_bytes) / 1048576))"
done
