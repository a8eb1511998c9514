#!/usr/bin/env bash
# Compiles the CUDA kernels (crates/kernels/cu/*.cu) to the PTX that is committed beside them (crates/kernels/ptx/*.ptx).
#
#   scripts/build_ptx.sh           rebuilds all of it
#   scripts/build_ptx.sh --check   rebuilds into target/ and fails where anything differs from what is committed
#   scripts/build_ptx.sh --fresh   compiles nothing: fails where sources or compiler are others than those of the last build
#
# Needs Python 3 and pip's default index, once: the pinned compiler goes to target/cuda-compiler (0.5 GB). Exit code 3: it
# cannot be had. No GPU, no CUDA toolkit. Each PTX is assembled for several chips afterwards, with the registers and spills of its kernels printed; what is
# committed is the PTX of the oldest, compute_75, which every newer driver compiles for its own chip.
set -euo pipefail
cd "$(dirname "$0")/.."

# 12.8 writes PTX 8.7, which drivers from 12.8 on accept; a newer compiler would ask for a newer driver
version=12.8.93
oldest=compute_75
chips=(sm_75 sm_80 sm_90 sm_100)

# What the PTX is made of, kept beside it.
origin() {
    # the same order everywhere
    local LC_ALL=C
    sha256sum crates/kernels/cu/* scripts/ptx/nvrtc.py
    echo "compiler $version for $oldest"
}

case ${1:-} in
'' | --check) check=${1:-} ;;
--fresh)
    diff <(origin) crates/kernels/ptx/origin.txt || {
        echo "the committed PTX was made of other sources: run scripts/build_ptx.sh" >&2
        exit 1
    }
    exit
    ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    [[ $1 == --help ]] && exit 0 || exit 2
    ;;
esac

compiler=${LONGSHORE_CUDA_COMPILER:-target/cuda-compiler}
if [[ ! -e $compiler/$version ]]; then
    {
        python3 -m venv "$compiler" && "$compiler/bin/pip" install --quiet --disable-pip-version-check \
            "nvidia-cuda-nvrtc-cu12==$version" "nvidia-cuda-nvcc-cu12==$version"
    } || {
        echo "compiler $version cannot be had: it takes python3 with venv, and pip's index" >&2
        exit 3
    }
    touch "$compiler/$version"
fi
packages=$("$compiler/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
nvrtc=$packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
ptxas=$packages/nvidia/cuda_nvcc/bin/ptxas

committed=crates/kernels/ptx
built=target/ptx
rm -rf "$built"
mkdir -p "$built" "$committed"
for source in crates/kernels/cu/*.cu; do
    "$compiler/bin/python" scripts/ptx/nvrtc.py "$nvrtc" "$source" "$built/$(basename "$source" .cu).ptx" "$oldest"
done

printf '%-8s %-20s %9s %6s %6s\n' chip kernel registers spills shared
for ptx in "$built"/*.ptx; do
    for chip in "${chips[@]}"; do
        "$ptxas" --verbose --gpu-name "$chip" --warn-on-spills --output-file "$built/assembled" "$ptx" 2>&1 |
            awk -v chip="$chip" '
                /Compiling entry function/ { split($0, part, "\047"); kernel = part[2] }
                /spill stores/ { for (i = 2; i <= NF; i++) if ($i " " $(i+1) ~ /^spill (stores|loads)/) spills += $(i-2) }
                /Used [0-9]+ registers/ {
                    shared = 0
                    for (i = 2; i <= NF; i++) {
                        if ($i ~ /^registers/) registers = $(i-1)
                        if ($i ~ /^smem/) shared = $(i-2)
                    }
                    printf "%-8s %-20s %9d %6d %6d\n", chip, kernel, registers, spills, shared
                    spills = 0
                }
                /error|fatal/ { print > "/dev/stderr" }'
    done
done
rm -f "$built/assembled"
origin >"$built/origin.txt"

if [[ $check ]]; then
    diff --recursive --brief "$committed" "$built" || {
        echo "the committed PTX is not what $oldest and compiler $version make of the sources: run scripts/build_ptx.sh" >&2
        exit 1
    }
    echo "PTX equals its sources: $(ls "$built"/*.ptx | wc -l) files"
else
    rm -f "$committed"/*
    cp "$built"/* "$committed"
fi
