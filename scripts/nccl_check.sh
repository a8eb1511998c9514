#!/usr/bin/env bash
# Runs the tests of crates/nccl with real NCCL. Without a GPU they load it, make identifiers, and are refused in order.
#
#   scripts/nccl_check.sh                 the oldest version that is supported and the newest that was tried
#   scripts/nccl_check.sh VERSION...      these versions
#
# Needs Python 3 and pip's default index. Each library (0.2 to 0.4 GB) goes to a temporary directory, and is removed. Exit
# code 3: one cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
-*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    [[ $1 == --help ]] && exit 0 || exit 2
    ;;
esac
versions=("${@:-}")
[[ ${versions[0]} ]] || versions=(2.18.3 2.32.3)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for version in "${versions[@]}"; do
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps \
        --no-compile --target "$scratch/$version" "nvidia-nccl-cu12==$version" || {
        echo "NCCL $version cannot be had: it takes python3 with pip, and pip's index" >&2
        exit 3
    }
    echo "== NCCL $version"
    LONGSHORE_NCCL_LIB=$scratch/$version/nvidia/nccl/lib/libnccl.so.2 \
        cargo test --quiet --locked --package longshore-nccl --test library -- --nocapture --test-threads 1
    rm -rf "${scratch:?}/$version"
done
