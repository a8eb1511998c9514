#!/usr/bin/env bash
# What a lost rank costs: loads with a process per rank, undisturbed and with one rank killed at half time, in turn.
#
#   scripts/bench_recovery.sh [--tp 2] [--rank 1] [--rounds 5] [--checkpoint DIR] [--bin PATH] [-- LOAD OPTIONS]
#
# Prints, for each round, the seconds of both, their ratio, and the bytes read from storage beside those needed; then medians.
# Without --checkpoint a synthetic one of 2 GB is written to a temporary directory. Without --bin a release build is made.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
tp=2 rank=1 rounds=5 checkpoint='' bin=''

while (($#)); do
  case $1 in
    --tp) tp=$2; shift 2 ;;
    --rank) rank=$2; shift 2 ;;
    --rounds) rounds=$2; shift 2 ;;
    --checkpoint) checkpoint=$2; shift 2 ;;
    --bin) bin=$2; shift 2 ;;
    --) shift; break ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "bench_recovery.sh: unknown option $1 (--help shows them)" >&2; exit 2 ;;
  esac
done

if [[ -z $bin ]]; then
  (cd "$root" && cargo build --release --locked -p longshore >&2)
  bin=$(cd "$root" && realpath -m "${CARGO_TARGET_DIR:-target}")/release/longshore
fi
if [[ -z $checkpoint ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  checkpoint=$scratch/checkpoint
  "$bin" synth --model deepseek_v3 --quant bf16 --scale small "$checkpoint" >&2
fi

python3 - "$bin" "$checkpoint" "$tp" "$rank" "$rounds" "$@" <<'PYTHON'
import json, os, signal, statistics, subprocess, sys, time

binary, checkpoint, tp, rank, rounds, *options = sys.argv[1:]


def process_of(rank, parent):
    """The rank's process under the launcher, once it is there."""
    while True:
        for pid in os.listdir("/proc"):
            if not pid.isdigit():
                continue
            try:
                stat = open(f"/proc/{pid}/stat").read()
                environ = open(f"/proc/{pid}/environ", "rb").read().split(b"\0")
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent and f"RANK={rank}".encode() in environ:
                return int(pid)
        time.sleep(0.001)


def load(kill_after=None):
    command = [binary, "load", checkpoint, "--ranks", "processes", "--tp", tp, "--json",
               "--no-digest", "--log-level", "error", *options]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    if kill_after is not None:
        pid = process_of(rank, process.pid)
        time.sleep(max(0, kill_after - (time.monotonic() - began)))
        os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate()
    seconds = time.monotonic() - began
    if process.returncode != 0:
        sys.exit(f"the load failed with {process.returncode}")
    return seconds, json.loads(out)


usual, _ = load()
ratios, undisturbed, disturbed = [], [], []
for number in range(int(rounds)):
    plain, _ = load()
    killed, report = load(kill_after=plain / 2)
    read = report["storage_bytes_read"] + report["lost_bytes_read"]
    print(f"{number}: undisturbed {plain:.2f} s, rank {rank} killed at {plain / 2:.2f} s {killed:.2f} s, ratio "
          f"{killed / plain:.2f}; {report['restarts']} replaced, read {read / report['needed_bytes']:.3f} x needed "
          f"(lost with the rank: {report['lost_bytes_read'] / report['needed_bytes']:.3f})")
    ratios.append(killed / plain)
    undisturbed.append(plain)
    disturbed.append(killed)
print(f"medians: {statistics.median(undisturbed):.2f} s, {statistics.median(disturbed):.2f} s, ratio {statistics.median(ratios):.2f}")
PYTHON
