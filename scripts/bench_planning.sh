#!/usr/bin/env bash
# How long planning takes at true scale, headers only: DeepSeek-V3 in FP8 with a quarter, half and all of its layers on 16
# ranks; Kimi-K2.5 in INT4 and NVFP4 on 8 ranks, with experts cut and with experts shared out.
# Prints tensors, seconds of planning (headers already read; the median of ROUNDS, default 5) and the process's peak memory.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked -p longshore
longshore=$(realpath "${CARGO_TARGET_DIR:-target}")/release/longshore
rounds=${ROUNDS:-5}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

value() { sed -n "s/^ *\"$2\": \([0-9.e-]*\),*$/\1/p" "$1" | head -1; }

# what it is, then options of synth, then --, then options of plan
measure() {
  local what=$1 synth=()
  shift
  while [ "$1" != -- ]; do synth+=("$1"); shift; done
  shift
  local checkpoint
  checkpoint=$dir/$(echo "${synth[*]}" | tr -c 'a-z0-9\n' _)
  [ -d "$checkpoint" ] || "$longshore" synth "$checkpoint" "${synth[@]}" --scale full --headers-only --json >"$checkpoint.json"
  for round in $(seq "$rounds"); do
    "$longshore" plan "$checkpoint" "$@" --json --log-level error >"$dir/plan-$round.json"
  done
  local seconds
  seconds=$(for round in $(seq "$rounds"); do value "$dir/plan-$round.json" plan; done | sort -g | sed -n "$(((rounds + 1) / 2))p")
  printf '%s, %s: %s tensors, planned in %.3f s, peak memory %.0f MiB\n' "$what" "$*" "$(value "$checkpoint.json" tensors)" \
    "$seconds" "$(($(value "$dir/plan-1.json" peak_rss_bytes) / 1048576))"
}

for layers in 15 30 61; do
  measure "DeepSeek-V3 FP8, $layers layers" --model deepseek_v3 --quant fp8 --layers $layers -- --tp 16
done
for quant in int4 nvfp4; do
  for ranks in "--tp 8" "--tp 8 --ep 8"; do
    # shellcheck disable=SC2086 # two options in one word
    measure "Kimi-K2.5 $quant" --model kimi_k25 --quant $quant -- $ranks
  done
done
