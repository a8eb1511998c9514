#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one call: kernels against their host twins, conformance cases
# on the device, over NCCL, reloads, compute-sanitizer, and rates beside the device's own copies. Prints one table.
#
#   scripts/gpu_check.sh build [DIR]       builds what it runs into DIR (default target/gpu-check), below 64 MiB
#   scripts/gpu_check.sh [OPTIONS] [DIR]   runs what lies in DIR, with neither cargo nor network; builds it first where
#                                          there is nothing yet, or, without DIR, wherever there is cargo
#   scripts/gpu_check.sh --rehearse [...]  the same steps on the emulated driver: shows that this script works, no more
#
#   --out DIR       also leaves the table and a log of all steps there (default: DIR/results)
#   --scratch DIR   where checkpoints are written, 12 GB: the file system whose page cache is measured (default: TMPDIR)
#   --seconds N     the time that all of it may take (default 570); what would come later is skipped
#   --only LIST     of these, in this order: kernels,rates,load,conformance,nccl,finishes,sizes,sanitizer,stories
#
# Beside DIR it needs this checkout, which holds the expectations of the conformance cases, and bash, coreutils, sed and
# awk. It ends with "N run, M failed, K skipped"; a rate below what is wanted has failed. Without a GPU it says so, ends
# with "0 run", and has not failed. LONGSHORE_NCCL_LIB names NCCL where neither the linker nor python3 knows of one.
set -uo pipefail
export LC_ALL=C.UTF-8
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bytes_max=$((64 << 20))
# 16 reads in flight and twice as many slabs: what a load of a cached checkpoint takes on 8 cores and more
threads=$(($(nproc) * 2 > 16 ? 16 : $(nproc) * 2))
memory_limit=$((512 << 20))
# the most that a finish takes for work where it could do with less: WORKSPACE_BYTES_MAX of crates/rank
workspace_max=$((64 << 20))

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }
refuse() { echo "gpu_check.sh: $*" >&2; exit 2; }

# ---- building --------------------------------------------------------------------------------------------------------

# The path of what cargo built, among its messages on stdin.
executable() { sed -n "s/.*\"kind\":\[\"$1\"\].*\"name\":\"$2\".*\"executable\":\"\([^\"]*\)\".*/\1/p" | tail -1; }

# into NAME KIND TARGET CARGO ARGUMENTS...
into() {
  local name=$1 kind=$2 target=$3 from
  shift 3
  from=$(cargo "$@" --locked --message-format json-render-diagnostics | executable "$kind" "$target")
  [[ -x $from ]] || { echo "gpu_check.sh: cargo $* made no $target" >&2; return 1; }
  strip -o "$dir/$name" "$from"
}

mib() { awk "BEGIN { printf \"%.1f MiB\", $1 / 1048576 }"; }

build() {
  cd "$root" && mkdir -p "$dir" && rm -f "$dir/built" || return
  into kernels test cuda_device test --release --no-run -p longshore-kernels --test cuda_device || return
  into rates bench device bench --no-run -p longshore-kernels --bench device || return
  into nccl test library test --release --no-run -p longshore-nccl --test library || return
  into stories test cuda test --release --no-run -p longshore --test cuda || return
  into handover test handover test --release --no-run -p longshore --test handover || return
  # last: with the tests, it is built with what only they need
  into longshore bin longshore build --release -p longshore --bin longshore || return
  local bytes=0 name revision
  for name in kernels rates nccl stories handover longshore; do
    bytes=$((bytes + $(stat -c %s "$dir/$name")))
    printf '%10s  %s\n' "$(mib "$(stat -c %s "$dir/$name")")" "$dir/$name"
  done
  printf '%10s  in all, of at most %s\n' "$(mib $bytes)" "$(mib $bytes_max)"
  ((bytes < bytes_max)) || return
  revision=$(git describe --always --dirty --abbrev=10 2>/dev/null || echo 'unknown revision')
  printf '%s, %s\n' "$revision" "$(rustc --version | cut -d' ' -f1,2)" >"$dir/built"
}

# ---- what there is ---------------------------------------------------------------------------------------------------

# Before anything is built for it: whether the system shows a GPU at all.
shows_gpu() {
  # grep reads to the end: a pipe that breaks would count as a failure
  nvidia-smi -L 2>/dev/null | grep GPU >/dev/null || compgen -G '/dev/nvidia[0-9]*' >/dev/null ||
    [[ -e /dev/nvidiactl || -e /dev/dxg ]]
}

no_gpu() {
  echo "no GPU: $*"
  echo "0 run"
  exit 0
}

# Some containers mount the driver where the linker does not look.
find_driver() {
  local place
  ldconfig -p 2>/dev/null | grep 'libcuda\.so\.1 ' >/dev/null && return
  for place in /usr/local/nvidia/lib64 /usr/lib/wsl/lib; do
    [[ -e $place/libcuda.so.1 ]] && export LD_LIBRARY_PATH=$place${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} && return
  done
}

find_nccl() {
  [[ ! ${LONGSHORE_NCCL_LIB:-} ]] || return 0
  local found
  found=$(ldconfig -p 2>/dev/null | sed -n 's/.*libnccl\.so\.2 .*=> //p' | head -1)
  [[ $found ]] || found=$(python3 -c 'import importlib.util as u
print(u.find_spec("nvidia.nccl").submodule_search_locations[0] + "/lib/libnccl.so.2")' 2>/dev/null)
  [[ -e $found ]] && export LONGSHORE_NCCL_LIB=$found
}

find_sanitizer() {
  sanitizer=$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | tail -1)
  [[ $sanitizer ]]
}

cpu() { sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1; }
gib_of_memory() { awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo; }

driver_version() {
  local version
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)
  [[ $version ]] || version=$(grep -o '[0-9]\{3\}\.[0-9.]*' /proc/driver/nvidia/version 2>/dev/null | head -1)
  echo "${version:-unknown}"
}

# ---- steps and the table ---------------------------------------------------------------------------------------------

rows=() run=0 failed=0 skipped=0 child=''

# row CHECK RESULT FIGURE BESIDE RATIO WANTED VERDICT; "-" where there is none
row() {
  set -- "${@//[|$'\t\n']/ }"
  rows+=("$(printf '%s\t%s\t%s\t%s\t%s\t%s\t%s' "$@")")
  printf '   %s: %s%s\n' "$1" "$2" "$([[ $7 == ok || $7 == - ]] || printf ' (%s)' "$7")" >&2
  case $7 in
    skipped) skipped=$((skipped + 1)) ;;
    FAILED | below) run=$((run + 1)) failed=$((failed + 1)) ;;
    *) run=$((run + 1)) ;;
  esac
}

skip() { row "$1" "skipped: $2" - - - - skipped; }

# step CHECK SECONDS COMMAND...: its output in $out and $err, how it ended in $status, how long it took in $took; fails
# where no time is left for it, of which there is a row then
step() {
  local check=$1 limit=$2 begun left=$((seconds - SECONDS))
  shift 2
  ((left >= 5)) || { skip "$check" "no time left of $seconds s"; return 1; }
  ((limit <= left)) || limit=$left
  printf '== %s\n' "$check" | tee -a "$log" >&2
  begun=$SECONDS
  # in the background, so that a signal ends it and not only what would have followed
  timeout --kill-after=5 "$limit" "$@" >"$out" 2>"$err" </dev/null &
  child=$!
  wait "$child"
  status=$? child=''
  took="$((SECONDS - begun)) s"
  { printf '$ %s\n' "$*"; cat "$out" "$err"; printf '(status %s, %s)\n' "$status" "$took"; } >>"$log"
  case $status in
    124 | 137) why="not done after $limit s" ;;
    *) why="exit code $status" ;;
  esac
}

# fail CHECK WHY: with the end of what the step printed
fail() {
  row "$1" "failed: $2" - - - - FAILED
  # the sanitizer's first findings say more than its last
  { grep -h '^=========' "$out" "$err" | head -n 16; tail -n 12 "$out"; tail -n 12 "$err"; } |
    cut -c1-400 | sed 's/^/   | /' >&2
}

# tests CHECK SECONDS BINARY ARGUMENTS...: tests that compare bytes; none of them may have been ignored
tests() {
  local check=$1 passed ignored
  step "$@" || return 0
  # the last: a test may run others in processes of its own
  passed=$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$out" | tail -1)
  ignored=$(sed -n 's/^ignored: //p' "$err" | head -1)
  if ((status != 0)); then
    fail "$check" "$why"
  elif ((${passed:-0} == 0)); then
    fail "$check" "no test was run"
  elif [[ $ignored ]]; then
    skip "$check" "$ignored"
  else
    row "$check" "${result:-equal}" "$passed $( ((passed == 1)) && echo test || echo tests), $took" - - - ok
  fi
}

# A number of the JSON in FILE, by its key and the spaces before it (the first such).
value() { sed -n "s/^ \{$2\}\"$3\": \([0-9.e-]*\),*$/\1/p" "$1" | head -1; }
text() { sed -n "s/^ \{$2\}\"$3\": \"\([^\"]*\)\",*$/\1/p" "$1" | head -1; }
calculate() { awk "BEGIN { $1 }"; }

# judged RATIO WANTED: the verdict
judged() {
  if [[ $mode == rehearsal ]]; then
    echo 'not judged'
  else
    calculate "print ($1 >= $2) ? \"ok\" : \"below\""
  fi
}

# The table; its last line counts.
print_table() {
  local all line i cells widths=(0 0 0 0 0 0 0)
  all=("$(printf 'check\tresult\tfigure\tbeside\tratio\twanted\tverdict')" "${rows[@]}")
  for line in "${all[@]}"; do
    IFS=$'\t' read -ra cells <<<"$line"
    for i in "${!cells[@]}"; do ((${#cells[i]} <= widths[i])) || widths[i]=${#cells[i]}; done
  done
  printf '%s\n\n' "$heading"
  local line_number=0
  for line in "${all[@]}"; do
    IFS=$'\t' read -ra cells <<<"$line"
    # widths are in characters; printf would count bytes
    for i in "${!cells[@]}"; do printf '| %s%*s ' "${cells[i]}" $((widths[i] - ${#cells[i]})) ''; done
    printf '|\n'
    ((line_number++ == 0)) || continue
    for i in "${!cells[@]}"; do printf '|%s' "$(printf '%*s' $((widths[i] + 2)) '' | tr ' ' -)"; done
    printf '|\n'
  done
  printf '\n%d run, %d failed, %d skipped\n' "$run" "$failed" "$skipped"
}

# ---- the checks ------------------------------------------------------------------------------------------------------

check_kernels() {
  tests 'every kernel against its host twin' 90 "$dir/kernels"
}

# The rates that the project asks for need the device alone, so nothing runs beside them.
check_rates() {
  local size=(--mib 1024) limit=120
  [[ $mode == rehearsal ]] && size=(--tiny --samples 1)
  rates_of 'rates' "$limit" "${size[@]}"
}

# Beyond 4 GiB, where 32 bits no longer count bytes: the same kernels, compared at that size.
check_sizes() {
  local free
  [[ $mode == device ]] || { skip 'beyond 4 GiB' 'a rehearsal is short'; return; }
  free=$(awk '/^MemAvailable/ { printf "%d", $2 / 1048576 }' /proc/meminfo)
  ((free >= 18)) || { skip 'beyond 4 GiB' "takes 18 GiB of memory, $free are there"; return; }
  ((device_gib >= 12)) || { skip 'beyond 4 GiB' "takes 12 GiB of the device's $device_gib"; return; }
  local pattern
  for pattern in placement 'rows W31PERM' 'swizzle in place, W31PERM'; do
    rates_of "beyond 4 GiB, $pattern" 60 --mib 4608 --samples 3 "$pattern"
  done
}

# rates_of CHECK SECONDS ARGUMENTS...: a row for each that the benchmark prints
rates_of() {
  local check=$1 cells before=${#rows[@]} different='' what figure limit ratio wanted bytes verdict
  step "$1" "$2" "$dir/rates" "${@:3}" || return 0
  while IFS='|' read -ra cells; do
    [[ ${#cells[@]} -ge 8 && ${cells[1]} != ' what ' && ${cells[1]} != ---* ]] || continue
    what="$(trim "${cells[1]}") $(trim "${cells[2]}")"
    figure=$(trim "${cells[3]}") limit=$(trim "${cells[4]}") ratio=$(trim "${cells[5]}")
    wanted=$(trim "${cells[6]}") bytes=$(trim "${cells[7]}")
    [[ $what == 'host to device, one pinned copy '* ]] && host_to_device=$figure
    [[ $what == 'page cache to pinned memory '* ]] && page_cache=$figure
    [[ $what == 'placement, one run '* ]] && place_rate=${place_rate:-$figure}
    [[ $limit == – ]] && limit=- || limit="$limit GB/s"
    [[ $ratio == – ]] && ratio=-
    case $bytes,$wanted in
      DIFFERENT,*) verdict=FAILED different=yes ;;
      *,–) verdict=- ;;
      *) verdict=$(judged "$ratio" "$wanted") ;;
    esac
    [[ $wanted == – ]] && wanted=-
    [[ $bytes == – ]] && bytes=-
    row "$what" "$bytes" "$figure GB/s" "$limit" "$ratio" "$wanted" "$verdict"
  done <"$out"
  # bytes that differ have their rows
  [[ $different ]] || ((status == 0 && ${#rows[@]} > before)) || fail "$check" "$why"
}

trim() { local text=${1# }; printf '%s' "${text% }"; }

load_step() { step "$1" "$2" "$dir/longshore" load --json --log-level error "${@:3}"; }

# A checkpoint of big tensors from the page cache to the device: how fast, what overlaps, how much memory it takes.
check_load() {
  local layers=(--scale full --layers 20) needed=12 rounds=5 checkpoint=$scratch/llama
  [[ $mode == rehearsal ]] && layers=(--scale small --layers 4) needed=1 rounds=1
  local free
  free=$(df -P -B 1G "$scratch" | awk 'NR == 2 { print $4 }')
  ((free >= needed)) || { skip 'load of 10 GiB' "takes $needed GB in $scratch, $free are free"; return; }
  ((device_gib >= needed)) || { skip 'load of 10 GiB' "takes $needed GiB of the device's $device_gib"; return; }
  [[ ${host_to_device:-} ]] || rates_of 'host to device' 60 --mib 1024 'host to device'
  step 'writing a checkpoint' 120 \
    "$dir/longshore" synth "$checkpoint" --model llama --quant bf16 "${layers[@]}" --json || return 0
  ((status == 0)) || { fail 'writing a checkpoint' "$why"; return; }
  # its pages are to be in memory and clean: writing them back takes bandwidth from the loads
  step 'writing it back' 60 sync -f "$checkpoint" || return 0
  rates_of 'reading the page cache' 60 --threads "$threads" --samples 5 --read "$checkpoint"/*.safetensors

  local round best='' samples=()
  for round in $(seq $((rounds + 1))); do
    load_step "load, round $round of $((rounds + 1))" 60 "$checkpoint" --tp 1 --device cuda --io buffered --no-digest \
      --concurrency "$threads" --memory-limit $memory_limit || return 0
    ((status == 0)) || { fail 'load' "$why"; return; }
    cp "$out" "$scratch/load-$round.json"
    # the first warms up
    ((round == 1)) || samples+=("$(value "$out" 6 seconds) $round")
  done
  best=$(printf '%s\n' "${samples[@]}" | sort -g | sed -n "$(((rounds + 1) / 2))p")
  load_rows "$scratch/load-${best#* }.json" "${best% *}"
  check_large_digest "$checkpoint"
  rm -rf "$checkpoint"
}

# load_rows JSON SECONDS: of the load in the middle, from its first read to the rank's being ready
load_rows() {
  local json=$1 ready=$2 bytes peak parameters all rate slower ratio gib sum
  bytes=$(value "$json" 2 needed_bytes) all=$(value "$json" 2 seconds)
  gib=$(calculate "printf \"%.1f GiB\", $bytes / 2^30")
  rate=$(calculate "printf \"%.1f\", $bytes / $ready / 1e9")
  if [[ ! ${page_cache:-} || ! ${host_to_device:-} ]]; then
    skip "load of $gib" 'the rates beside it are missing'
  else
    slower=$(calculate "print ($page_cache < $host_to_device) ? $page_cache : $host_to_device")
    ratio=$(calculate "printf \"%.2f\", $rate / $slower")
    row "load of $gib, page cache to device" - "$rate GB/s" "$slower GB/s" "$ratio" 0.85 "$(judged "$ratio" 0.85)"
    # each stage alone and one after the other; what a load takes less than that went on at the same time
    sum=$(calculate "printf \"%.3f\", $bytes / 1e9 * (1 / $page_cache + 1 / $host_to_device + 2 / ${place_rate:-1e9})")
    ratio=$(calculate "printf \"%.2f\", $sum / $ready")
    row 'stages one after the other, beside the load' - "$sum s" "$(printf '%.3f s' "$ready")" "$ratio" 1.00 \
      "$(judged "$ratio" 1)"
  fi
  row 'the same with opening the device and its memory' - "$(printf '%.3f s' "$all")" - - - -
  peak_row "$json" "device memory of the load of $gib" 0
}

# peak_row JSON CHECK WORKSPACE: parameters, staging within its limit, and the workspace of a layer
peak_row() {
  local peak parameters most ratio verdict
  peak=$(value "$1" 6 peak_device_bytes) parameters=$(value "$1" 6 parameter_bytes)
  # gaps between parameters
  most=$((parameters + memory_limit + $3 + 512 * $(value "$1" 6 parameters)))
  ratio=$(calculate "printf \"%.2f\", $peak / $most")
  verdict=$( ((peak <= most)) && echo ok || echo FAILED)
  row "$2" - "$((peak >> 20)) MiB" "$((most >> 20)) MiB" "$ratio" '≤ 1' "$verdict"
}

# same_digest CHECK SECONDS CHECKPOINT -- OPTIONS...: what the device holds is what the host would
same_digest() {
  local check=$1 limit=$2 checkpoint=$3 options=("${@:5}") digest
  load_step "$check, host" "$limit" "$checkpoint" --device cpu "${shape[@]}" || return 1
  digest=$(text "$out" 2 digest)
  # where the host's memory is short, there is nothing to compare with
  ((status != 2)) || { skip "$check" "$(sed 's/^longshore: //' "$err" | head -1 | cut -c1-100)"; return 1; }
  ((status == 0)) && [[ $digest ]] || { fail "$check" "on the host: $why"; return 1; }
  load_step "$check, device" "$limit" "$checkpoint" --device cuda "${shape[@]}" "${options[@]}" || return 1
  ((status == 0)) || { fail "$check" "$why"; return 1; }
  [[ $(text "$out" 2 device) == cuda ]] || { fail "$check" 'it was not on the device'; return 1; }
  [[ $(text "$out" 2 digest) == "$digest" ]] || { fail "$check" 'digests differ'; return 1; }
}

check_large_digest() {
  local shape=(--tp 1)
  same_digest 'load, by digest' 60 "$1" -- --memory-limit $memory_limit || return 0
  row 'the same load, by digest beside the host' equal "$took" - - - ok
}

# With finishes of all kinds in its way: 1 GiB of experts.
check_finishes() {
  local checkpoint=$scratch/nvfp4 scale=small shape=(--tp 1 --kernel-layout trtllm)
  [[ $mode == rehearsal ]] && scale=tiny
  step 'writing NVFP4' 60 \
    "$dir/longshore" synth "$checkpoint" --model deepseek_v3 --quant nvfp4 --scale $scale --json || return 0
  ((status == 0)) || { fail 'writing NVFP4' "$why"; return; }
  same_digest 'load of NVFP4, finished for TensorRT-LLM' 60 "$checkpoint" -- --memory-limit $memory_limit || return 0
  row 'load of NVFP4, finished for TensorRT-LLM' equal "$took" - - - ok
  peak_row "$out" 'its device memory' $workspace_max
  rm -rf "$checkpoint"
}

check_conformance() {
  tests 'all conformance cases on the device' 150 "$dir/stories" --exact every_public_case_is_byte_exact_on_a_device
  tests 'reload in place, addresses unchanged' 60 "$dir/stories" --exact \
    a_reload_on_devices_gives_what_a_fresh_load_gives_at_the_same_addresses
}

check_nccl() {
  if [[ $mode == device ]]; then
    find_nccl || { skip NCCL 'no libnccl.so.2; LONGSHORE_NCCL_LIB can name one'; return; }
    result='in order' tests 'NCCL, its binding' 60 "$dir/nccl"
  fi
  local ranks source shape count
  for ranks in 2 4; do
    shape=(--tp "$ranks" --exchange on)
    count=0
    for source in synth:llama-bf16 synth:deepseek_v3-fp8 synth:kimi_k25-nvfp4; do
      same_digest "NCCL, $ranks ranks on one device, ${source#synth:}" 45 "$source" -- \
        --ranks processes --transport nccl || continue 2
      count=$((count + 1))
    done
    row "NCCL, $ranks ranks on one device" equal "$count checkpoints" - - - ok
  done
  tests 'all conformance cases over NCCL' 120 "$dir/stories" --exact every_public_case_is_byte_exact_over_nccl
}

check_stories() {
  tests 'conformance cases, ranks as processes' 90 "$dir/stories" --exact \
    every_public_case_is_byte_exact_on_the_devices_of_processes
  tests 'counters and digests, all families' 120 "$dir/stories" --exact devices_hold_and_count_what_the_host_does
  tests 'handing over to another process' 60 "$dir/handover" device another_process
}

check_sanitizer() {
  if [[ $mode == rehearsal ]]; then
    skip 'compute-sanitizer' 'nothing for it on an emulated driver'
    return
  fi
  find_sanitizer || { skip 'compute-sanitizer' 'not installed'; return; }
  # whether it can watch this device at all: under some sandboxes it cannot
  step 'compute-sanitizer, a look' 60 "$sanitizer" --tool memcheck --error-exitcode 86 \
    "$dir/kernels" --exact bytes_get_to_the_device_and_back || return 0
  if ((status != 0)); then
    why=$(grep -hi 'not supported\|error\|fail' "$out" "$err" | head -1 | cut -c1-100)
    skip 'compute-sanitizer' "it does not work here: $why"
    return
  fi
  # a test asks for more memory than there is, which is an error of the API's and none of the kernels'
  local tool of=(--error-exitcode 86 --report-api-errors no --print-limit 20)
  for tool in memcheck racecheck; do
    clean "$tool, kernels" 120 "$sanitizer" --tool $tool "${of[@]}" "$dir/kernels"
  done
  clean 'memcheck, a load' 90 "$sanitizer" --tool memcheck "${of[@]}" "$dir/longshore" load synth:kimi_k25-nvfp4 \
    --tp 2 --device cuda --kernel-layout trtllm --log-level error
}

# clean CHECK SECONDS COMMAND...
clean() {
  step "$@" || return 0
  local summary
  summary=$(grep -ho '\(ERROR\|RACECHECK\) SUMMARY: .*' "$out" "$err" | tail -1)
  if ((status == 0)) && [[ $summary == *' 0 '* ]]; then
    row "$1" clean "$took" - - - ok
  elif ((status == 124 || status == 137)); then
    skip "$1" "$why"
  else
    fail "$1" "${summary:-$why}"
  fi
}

# ---- from here -------------------------------------------------------------------------------------------------------

mode=device results='' scratch_in=${TMPDIR:-/tmp} seconds=570 dir='' only_build=''
checks=kernels,rates,load,conformance,nccl,finishes,sizes,sanitizer,stories
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --rehearse) mode=rehearsal; shift ;;
    --out) results=${2:?--out takes a directory}; shift 2 ;;
    --scratch) scratch_in=${2:?--scratch takes a directory}; shift 2 ;;
    --seconds) seconds=${2:?--seconds takes a number}; shift 2 ;;
    --only) only=${2:?--only takes a list}; shift 2 ;;
    -*) refuse "no option $1 (--help shows them)" ;;
    build) only_build=yes; shift ;;
    *) [[ ! $dir ]] || refuse "one directory, not $dir and $1"; dir=$1; shift ;;
  esac
done
has_cargo() { command -v cargo >/dev/null; }
for check in $(tr , ' ' <<<"${only:-}"); do
  [[ ,$checks, == *",$check,"* ]] || refuse "no check $check, of $checks"
done
named=$dir dir=$(realpath -m "${dir:-$root/target/gpu-check}")

if [[ $only_build ]]; then
  has_cargo || refuse 'building takes cargo'
  build
  exit
fi
if [[ ! -e $dir/built ]] || { [[ ! $named ]] && has_cargo; }; then
  [[ $mode == rehearsal ]] || shows_gpu || no_gpu 'neither nvidia-smi nor /dev shows one'
  has_cargo || refuse "nothing is built in $dir, and there is no cargo to build it with"
  build >&2 || refuse 'it does not build'
fi
results=$(realpath -m "${results:-$dir/results}")
mkdir -p "$results" || refuse "no directory can be made at $results"
scratch=$(mktemp -d "$scratch_in/gpu-check-XXXXXX") || refuse "no directory can be made in $scratch_in"
trap 'rm -rf "$scratch"' EXIT
log=$results/log.txt out=$scratch/out err=$scratch/err
: >"$log"

if [[ $mode == rehearsal ]]; then
  has_cargo || refuse 'a rehearsal takes cargo and a C++ compiler, for the emulated driver'
  example=(--package longshore-emulator --example library)
  emulated=$(cd "$root" && cargo run --quiet --release --locked "${example[@]}" -- target/tmp) ||
    refuse 'the emulated driver cannot be made'
  export LD_LIBRARY_PATH=$emulated${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} EMULATED_CUDA_DEVICES=1
  unset CUDA_VISIBLE_DEVICES LONGSHORE_NCCL_LIB
else
  find_driver
fi

device=$("$dir/rates" --describe 2>"$err")
case $? in
  0) ;;
  3) no_gpu "$(sed 's/^no CUDA device: //' "$err")" ;;
  *) echo "gpu_check.sh: the device cannot be opened: $(cat "$err")" >&2; exit 1 ;;
esac
device_gib=$(sed -n '1s/.*, \([0-9]*\) GiB$/\1/p' <<<"$device")
if [[ $mode == rehearsal ]]; then
  heading="REHEARSAL on an emulated driver: no device was used, and rates mean nothing."
else
  heading="$(head -1 <<<"$device"); driver $(driver_version), $(tail -1 <<<"$device")."
fi
heading+=" longshore $(cat "$dir/built"); $(nproc) × $(cpu), $(gib_of_memory) GiB; Linux $(uname -r);"
heading+=" $(stat -f -c %T "$scratch") under the checkpoints; $(date -u +%F\ %H:%MZ)"

# everything reaches the device that there is, finds what lies beside this script, and keeps what it makes to itself
export LONGSHORE_TEST_CUDA=device LONGSHORE_BIN=$dir/longshore LONGSHORE_TEST_FIXTURES=$root/tests/fixtures
export TMPDIR=$scratch XDG_CACHE_HOME=$scratch/cache CUDA_CACHE_PATH=$scratch/cuda

# the table comes whatever ends this, and nothing else stays
finish() {
  trap - EXIT INT TERM
  [[ ! $child ]] || kill "$child" 2>/dev/null
  print_table | tee "$results/table.md"
  rm -rf "$scratch"
  exit $((failed > 0))
}
trap finish EXIT
trap 'row "all of it" "failed: ended by a signal" - - - - FAILED; exit' INT TERM

# what counts most comes first, as time may run out
for check in ${checks//,/ }; do
  [[ ,${only:-$checks}, != *",$check,"* ]] || "check_$check"
done
