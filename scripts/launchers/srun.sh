#!/usr/bin/env bash
# A checkpoint loaded by ranks that Slurm starts, one task each; rank, world size and local rank are Slurm's own.
#
#   sbatch --nodes 2 --ntasks-per-node 8 scripts/launchers/srun.sh SOURCE [OPTIONS OF load]
#
# SOURCE must be reachable under the same path on every node. The tensor-parallel size is the number of tasks.
#SBATCH --job-name=longshore
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
set -euo pipefail

# rank 0 is on the job's first node
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# jobs that share a node try ports of their own, four each, below those that the system hands out (from 32768)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 3000 * 4))
# made once, before the tasks: it is what they know each other by
LONGSHORE_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MASTER_ADDR MASTER_PORT LONGSHORE_SECRET

# Where a node's own name stands for 127.0.1.1 in its /etc/hosts, rank 0 would listen where no other node reaches it:
# export LONGSHORE_BIND=0.0.0.0

# ranks of one node need no address at all
if [[ $SLURM_JOB_NUM_NODES == 1 ]]; then
  export LOCAL_WORLD_SIZE=$SLURM_NTASKS
fi

# srun hands the environment down (--export=ALL is its default), and a rank that fails ends the others
exec srun --kill-on-bad-exit=1 longshore rank "$@"
