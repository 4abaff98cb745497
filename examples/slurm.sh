#!/bin/bash
# Train on several nodes under Slurm:  sbatch examples/slurm.sh
#
#SBATCH --job-name=tinyunet
#SBATCH --nodes=2
# One rank for each NUMA node of a machine is a good start: its threads share a memory, and its
# memory is near. Here: machines with 4 NUMA nodes of 16 cores.
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=16
# Threads on one core share its vector units: they add nothing here.
#SBATCH --hint=nomultithread
#SBATCH --time=12:00:00
# Two minutes before the time is over the ranks get SIGTERM. They finish the step they are in, write a
# checkpoint and end; the job is put back into the queue, and goes on from there.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

# Folders of the program, the data and the runs, on file systems that all nodes share.
PROGRAM=${PROGRAM:-$HOME/tinyunet}
DATA=${DATA:-$HOME/Task01_BrainTumour}
RUNS=${RUNS:-$HOME/runs}

# A disk of each node's own. Shared file systems are slow at thousands of small reads from many ranks, so
# data, compiled kernels and measurements are kept here.
LOCAL=${TMPDIR:-/tmp}/tinyunet-$SLURM_JOB_ID
export NUMBA_CACHE_DIR=$LOCAL/numba        # compiled kernels: the first rank of each node makes them
export TINYUNET_CACHE=$LOCAL/measurements  # which algorithms are fastest here
export MPLCONFIGDIR=$LOCAL/matplotlib

# Since Slurm 22.05 srun reads --cpus-per-task from this variable only.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Each node reads the data once from the shared file system.
srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'mkdir -p "$1" && cp -r "$2" "$1/data"' _ "$LOCAL" "$DATA"

# Each rank is bound to cores of its own, and takes as many threads as it has cores: no --threads, no
# OMP_NUM_THREADS. --kill-on-bad-exit ends all ranks if one ends badly. --mpi names the way in which
# the ranks of your MPI find each other: "srun --mpi=list" shows what there is.
#
# --resume goes on with the latest run in RUNS, or begins one if there is none: the same line serves
# the first start and every later one. RUNS should be this job's own folder.
status=0
srun --cpu-bind=cores --kill-on-bad-exit=1 --mpi="${MPI:-pmix}" \
    "$PROGRAM/.venv/bin/python" -m tinyunet.train \
    --data-path "$LOCAL/data" --output "$RUNS/$SLURM_JOB_ID" \
    --epochs 100 --patch-size 96 --batch-size 16 --sync-batch-norm \
    --checkpoint-every 500 --resume || status=$?

srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 rm -rf "$LOCAL"

# 143: ended by SIGTERM, with a checkpoint.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
