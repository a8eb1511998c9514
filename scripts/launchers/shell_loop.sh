#!/usr/bin/env bash
# A checkpoint loaded by ranks that a plain loop starts: all that a launcher has to do.
#
#   scripts/launchers/shell_loop.sh SOURCE N [OPTIONS OF load]
#
#   LONGSHORE     the binary (default: longshore)
#   MASTER_PORT   the first of four ports that rank 0 tries (default 29500)
set -euo pipefail
(($# >= 2)) || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
source=$1 count=$2
shift 2

export WORLD_SIZE=$count LOCAL_WORLD_SIZE=$count
export MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29500}
LONGSHORE_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export LONGSHORE_SECRET

ranks=()
# whatever ends this script ends the ranks
trap '((${#ranks[@]})) && kill "${ranks[@]}" 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for ((rank = 0; rank < count; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "${LONGSHORE:-longshore}" rank "$source" "$@" &
  ranks+=("$!")
done

# the first that fails ends the loop, and so the others
for ((left = count; left > 0; left--)); do
  wait -n
done
ranks=()
