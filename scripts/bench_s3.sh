#!/usr/bin/env bash
# How fast longshore loads from S3, beside other clients and what the connection gives: all against the same local server.
#
#   scripts/bench_s3.sh [--rounds N] [--dir DIR] [--size-gb 4] [--model llama] [--only PATTERN] [--quick] [more] [-- LOAD OPTIONS]
#
# Makes a virtual environment for the other clients and a checkpoint of --size-gb GiB under DIR (once; both are shared with
# bench_local.sh), builds longshore and its storage server, runs everything in turn, and prints tables with the seconds,
# processor seconds per GB of client and server, bytes fetched, ratios, and the targets met. One rank; one rank while each
# request takes 50 ms longer and one in a hundred 2 s; two ranks beside two processes that each stream everything. Each run
# is a line of DIR/results-s3-DATE.jsonl.
#
#   --rounds N       runs of each client, medians count (default 5)
#   --dir DIR        default $XDG_CACHE_HOME/longshore-bench or ~/.cache/longshore-bench; needs 6 GB and the size
#   --model MODEL    llama (few large tensors) or deepseek (many small ones)
#   --only PATTERN   regular expression on "RANKS CONDITION CLIENT": --only '1 undisturbed', --only 'slow (longshore|limit)'
#   --quick          one round on a checkpoint of 1 GiB: shows that everything runs, its figures mean little
#   --bin PATH       this longshore instead of building one; "none" measures the others alone
#   --server PATH    this storage server instead of building one
#   --verify, --hold-gib G, --memory-limit BYTES: see scripts/bench/s3.py --help
#   -- LOAD OPTIONS  go to `longshore load`
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/longshore-bench
size=4 model=llama bin='' server='' pass=()

while (($#)); do
  case $1 in
    --dir) dir=$2; shift 2 ;;
    --size-gb) size=$2; shift 2 ;;
    --model) model=$2; shift 2 ;;
    --bin) bin=$2; shift 2 ;;
    --server) server=$2; shift 2 ;;
    --quick) size=1; pass+=(--rounds 1); shift ;;
    --rounds | --only | --hold-gib | --memory-limit) pass+=("$1" "$2"); shift 2 ;;
    --verify) pass+=("$1"); shift ;;
    --) shift; break ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "bench_s3.sh: unknown option $1 (--help shows them)" >&2; exit 2 ;;
  esac
done

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
python=$dir/venv/bin/python

for wanted in requirements.txt requirements-s3.txt; do
  if ! cmp -s "$root/scripts/bench/$wanted" "$dir/venv/$wanted"; then
    echo "installing the clients of $wanted into $dir/venv" >&2
    [[ -e $python ]] || python3 -m venv "$dir/venv"
    "$python" -m pip install --quiet --no-cache-dir --disable-pip-version-check -r "$root/scripts/bench/$wanted" >&2
    cp "$root/scripts/bench/$wanted" "$dir/venv/$wanted"
  fi
done

ckpt=$dir/$model-${size}g
if [[ ! -d $ckpt ]]; then
  echo "writing $ckpt" >&2
  "$python" "$root/scripts/bench/gen_ckpt.py" "$ckpt" --model "$model" --size-gb "$size" >&2
fi

built=$(cd "$root" && realpath -m "${CARGO_TARGET_DIR:-target}")/release
if [[ -z $bin ]]; then
  (cd "$root" && cargo build --release --locked -p longshore >&2)
  bin=$built/longshore
fi
if [[ -z $server ]]; then
  (cd "$root" && cargo build --release --locked -p longshore-storage-server >&2)
  server=$built/storage-server
fi
[[ $bin == none ]] || pass+=(--bin "$bin")

exec "$python" "$root/scripts/bench/s3.py" --server "$server" --out "$dir/results-s3-$(date +%Y%m%d-%H%M%S).jsonl" "${pass[@]}" "$ckpt" -- "$@"
