#!/usr/bin/env bash
# Loads a checkpoint through mixtures of storage faults: errors, refusals, stalls, resets, bodies and ranges that are cut
# short, wrong or slow, objects that are replaced; from S3, GCS, Azure and the hub, ranks as threads and as processes. Each
# load has the digest of the load from disk and no staging memory left, or fails in time and names what it asked for.
#
#   scripts/fault_mixtures.sh [N]         N mixtures (default 1000), about a minute for 100
#   scripts/fault_mixtures.sh FROM..TO    these: what a failure prints, FROM..FROM+1 repeats
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-1000} in
-*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    [[ $1 == --help ]] && exit 0 || exit 2
    ;;
*..*) mixtures=$1 ;;
*) mixtures=0..${1:-1000} ;;
esac
LONGSHORE_MIXTURES=$mixtures exec cargo test --quiet --locked --package longshore --test remote_mixtures -- --ignored --nocapture
