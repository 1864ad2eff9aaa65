#!/usr/bin/env bash
#SBATCH --job-name=loom
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
# Training on a Slurm cluster: one torchrun for each node, which starts one process for each GPU.
#
#   sbatch scripts/launch/slurm.sh run.name=my_run stage=pretrain model=llama3_8b engine=zero3 ...
#   sbatch --nodes 4 --gpus-per-node 4 scripts/launch/slurm.sh ...        options of sbatch overrule the lines above
#
# Submit from this project's folder, on a file system all nodes share. Give run.name: a requeued job then goes on from
# its latest checkpoint. On nodes without GPUs pass --gpus-per-node 0 and set PROCESSES_PER_NODE.
set -euo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then sed -n '10,17s/^# \{0,1\}//p' "$0"; exit 0; fi
: "${SLURM_JOB_ID:?slurm.sh: submit this with sbatch (sbatch scripts/launch/slurm.sh run.name=... ...)}"
cd "$SLURM_SUBMIT_DIR"
if [[ ! -f train.py ]]; then
    echo "slurm.sh: $PWD has no train.py; submit from the project's folder" >&2
    exit 1
fi
if [[ -x .venv/bin/torchrun ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi
if [[ " $* " != *" run.name="* && " $* " != *" run="* ]]; then
    echo "slurm.sh: no run.name given: a requeued job would begin a new run instead of resuming" >&2
fi

gpus="${SLURM_GPUS_ON_NODE:-0}"
per_node="${PROCESSES_PER_NODE:-$gpus}"
if ! [[ "$per_node" =~ ^[1-9][0-9]*$ ]]; then
    echo "slurm.sh: no GPUs were granted on this node; ask for --gpus-per-node N or set PROCESSES_PER_NODE" >&2
    exit 1
fi
# Read whole: a reader that leaves after one line may kill scontrol, and with it, under pipefail, this job.
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
head_node="${nodes%%$'\n'*}"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a head node do not meet
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$per_node} / per_node > 0 ? ${SLURM_CPUS_PER_TASK:-$per_node} / per_node : 1))}"

echo "slurm.sh: $SLURM_JOB_NUM_NODES nodes x $per_node processes, rendezvous at $head_node:$port"
# --kill-on-bad-exit: one failed node ends the job, so that no node waits for it until the time limit.
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$per_node" \
    --rdzv_backend c10d --rdzv_endpoint "$head_node:$port" --rdzv_id "$SLURM_JOB_ID" \
    train.py "$@"
