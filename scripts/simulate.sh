#!/usr/bin/env bash
# Simulates groups of ranks, their losses and their storage from many seeds: 20000, or as many as the first argument says, from
# the second on. A seed that fails is printed with its scenario. The ordinary tests run the first 500.
set -euo pipefail
cd "$(dirname "$0")/.."
count=${1:-20000} first=${2:-0}
LONGSHORE_SEEDS=$first..$((first + count)) cargo test --locked -p longshore --lib -- \
    --exact simulation::seeds_that_are_asked_for_hold --ignored --nocapture
