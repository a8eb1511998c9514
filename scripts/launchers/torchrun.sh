#!/usr/bin/env bash
# A checkpoint loaded by ranks that torchrun starts; or, with --verify, the proof that they load what threads load.
#
#   scripts/launchers/torchrun.sh SOURCE N [OPTIONS OF load]
#   scripts/launchers/torchrun.sh --verify [N] [FAMILY-SCHEME ...]
#
# --verify makes a tiny checkpoint of each FAMILY-SCHEME (default: llama-bf16 deepseek_v3-fp8 deepseek_v3-nvfp4), loads it
# with N (default 2) ranks as threads and as torchrun's processes, and compares the digests, which cover every byte of
# every parameter.
#
#   LONGSHORE   the binary (default: the one on PATH, else it is built)
#   TORCHRUN    torchrun (default: the one on PATH, else torch is installed into a virtual environment under VENV; a CPU
#               build found through PIP_EXTRA_INDEX_URL will do)
#   VENV        default $XDG_CACHE_HOME/longshore-torchrun or ~/.cache/longshore-torchrun
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }

find_longshore() {
  longshore=${LONGSHORE:-$(command -v longshore || true)}
  if [[ -z $longshore ]]; then
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p longshore
    longshore=${CARGO_TARGET_DIR:-$root/target}/release/longshore
  fi
}

find_torchrun() {
  torchrun=${TORCHRUN:-$(command -v torchrun || true)}
  [[ -z $torchrun ]] || return 0
  local venv=${VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/longshore-torchrun}
  torchrun=$venv/bin/torchrun
  if [[ ! -x $torchrun ]]; then
    echo "installing torch into $venv" >&2
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check torch >&2
  fi
}

# torchrun hands its environment down, so the secret is made here, once for all ranks.
new_secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# run SOURCE N [OPTIONS]
run() {
  local source=$1 count=$2
  shift 2
  # one thread per rank is torchrun's own default for OpenMP; set, it is not warned of
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} LONGSHORE_SECRET=${LONGSHORE_SECRET:-$(new_secret)} \
    "$torchrun" --no-python --nproc-per-node "$count" "$longshore" rank "$source" "$@"
}

digest() { python3 -c 'import json, sys; print(json.load(sys.stdin)["digest"])'; }

verify() {
  local count=2 name dir threads processes failed=0
  if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    count=$1
    shift
  fi
  (($#)) || set -- llama-bf16 deepseek_v3-fp8 deepseek_v3-nvfp4
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  for name; do
    dir=$scratch/$name
    "$longshore" synth "$dir" --model "${name%-*}" --quant "${name##*-}" --log-level error >&2
    threads=$("$longshore" load "$dir" --tp "$count" --ranks threads --json --log-level error | digest)
    processes=$(run "$dir" "$count" --json --log-level error | digest)
    if [[ $threads == "$processes" ]]; then
      echo "$name on $count ranks: torchrun's processes hold what threads hold, digest $threads"
    else
      echo "$name on $count ranks: digest $processes under torchrun, $threads as threads" >&2
      failed=1
    fi
  done
  return "$failed"
}

case ${1:-} in
  -h | --help) usage; exit 0 ;;
  --verify) shift; find_longshore; find_torchrun; verify "$@" ;;
  *)
    (($# >= 2)) || { usage >&2; exit 2; }
    find_longshore
    find_torchrun
    run "$@"
    ;;
esac
