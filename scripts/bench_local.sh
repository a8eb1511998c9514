#!/usr/bin/env bash
# How fast longshore loads from a local disk, beside the loaders of today and the machine's own limit.
#
#   scripts/bench_local.sh [--rounds N] [--dir DIR] [--size-gb 4] [--only PATTERN] [--quick] [more] [-- LOAD OPTIONS]
#
# Makes a virtual environment for the peers and two checkpoints of --size-gb GiB under DIR (once), builds longshore, runs
# everything in turn (page cache warm and cold, one rank and two), and prints tables with ratios and the targets met.
# Two ranks of longshore run as threads ("longshore") and as processes ("longshore, processes"); of the second the same
# ratios are asked within 10 %. Each run is a line of DIR/results-DATE.jsonl.
#
#   --rounds N       runs of each loader, medians count (default 5)
#   --dir DIR        default $XDG_CACHE_HOME/longshore-bench or ~/.cache/longshore-bench; needs 6 GB and twice the size
#   --only PATTERN   regular expression on "CHECKPOINT RANKS STATE LOADER": --only 'deepseek 1 warm', --only 'longshore|limit',
#                    --only ' 2 .*(processes$|processes, half)' for two rank processes and their limit alone,
#                    --only ' 2 .*(?<!longshore)$' for two rank processes beside every peer
#   --quick          one round on checkpoints of 1 GiB: shows that everything runs, its figures mean little
#   --bin PATH       this longshore instead of building one; "none" measures the peers alone
#   --verify, --max-other CORES, --hold-gib G, --memory-limit BYTES: see scripts/bench/matrix.py --help
#   -- LOAD OPTIONS  go to `longshore load`
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/longshore-bench
size=4 bin='' pass=()

while (($#)); do
  case $1 in
    --dir) dir=$2; shift 2 ;;
    --size-gb) size=$2; shift 2 ;;
    --bin) bin=$2; shift 2 ;;
    --quick) size=1; pass+=(--rounds 1); shift ;;
    --rounds | --only | --max-other | --hold-gib | --memory-limit) pass+=("$1" "$2"); shift 2 ;;
    --verify) pass+=("$1"); shift ;;
    --) shift; break ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "bench_local.sh: unknown option $1 (--help shows them)" >&2; exit 2 ;;
  esac
done

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
python=$dir/venv/bin/python
wanted=$root/scripts/bench/requirements.txt

if ! cmp -s "$wanted" "$dir/venv/requirements.txt"; then
  echo "installing the peers into $dir/venv" >&2
  python3 -m venv "$dir/venv"
  "$python" -m pip install --quiet --no-cache-dir --disable-pip-version-check -r "$wanted" >&2
  cp "$wanted" "$dir/venv/requirements.txt"
fi

for model in deepseek llama; do
  ckpt=$dir/$model-${size}g
  if [[ ! -d $ckpt ]]; then
    echo "writing $ckpt" >&2
    "$python" "$root/scripts/bench/gen_ckpt.py" "$ckpt" --model "$model" --size-gb "$size" >&2
  fi
done

if [[ -z $bin ]]; then
  (cd "$root" && cargo build --release -p longshore >&2)
  bin=$(cd "$root" && realpath "${CARGO_TARGET_DIR:-target}")/release/longshore
fi
[[ $bin == none ]] || pass+=(--bin "$bin")

exec "$python" "$root/scripts/bench/matrix.py" --out "$dir/results-$(date +%Y%m%d-%H%M%S).jsonl" "${pass[@]}" \
  "$dir/deepseek-${size}g" "$dir/llama-${size}g" -- "$@"
