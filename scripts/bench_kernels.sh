#!/usr/bin/env bash
# How fast the host kernels are on one thread, beside a plain copy of as many bytes: a table for the README.
#
#   scripts/bench_kernels.sh [PATTERN]      only rows whose kernel or shape contains PATTERN: 'swizzle', 'W31PERM [4096'
#
# Takes half a minute. `N × [rows, bytes]` are as many experts as exceed the last-level cache; what counts is the best of
# at least five turns. Anything else that runs slows both down: compare within a row.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} != -* ]] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0; }
cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1)
cache=$(cat /sys/devices/system/cpu/cpu0/cache/index3/size 2>/dev/null || echo unknown)
cargo bench --quiet --locked -p longshore-kernels --bench host --no-run
printf '%s, last-level cache %s, %s, one thread\n\n' "${cpu:-$(uname -m)}" "$cache" "$(rustc --version | cut -d' ' -f1,2)"
cargo bench --quiet --locked -p longshore-kernels --bench host -- ${1:+"$1"}
