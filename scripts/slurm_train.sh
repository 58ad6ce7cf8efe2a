#!/usr/bin/env bash
# Train on the nodes of a Slurm job; started anew by Slurm it goes on where it was. All arguments are main.py's:
#
#     sbatch --nodes=4 --gpus-per-node=8 scripts/slurm_train.sh --model detr_resnet50 --coco_path /data/coco \
#         --output_dir /shared/runs/detr --global_batch_size 64
#
# The output folder has to be one that all nodes see. Options typed after sbatch win over those below.
#
# One task a node: torchrun starts the processes of a node, one for each GPU, and starts them again when one dies.
#SBATCH --job-name=detr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# A node that fails, or a job of higher priority that takes the nodes, puts this job back into the queue.
#SBATCH --requeue
# Three minutes before the time is over this script, and nothing else (B), is sent USR1: see "save" below.
#SBATCH --signal=B:USR1@180
# The log of a job that was started again goes on.
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Without Slurm it trains on this machine. What can be set from outside: PROCESSES of a node (default: its GPUs), RESTARTS
# on the same nodes before the job fails, PORT where the nodes meet, PYTHON, GRACE, the seconds that processes have to save;
# DRY_RUN=1 prints the command line and ends.
set -euo pipefail

# Slurm runs a copy of this file, so it has to be submitted from the checkout.
main="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}/main.py"
[[ -f "$main" ]] || { echo "no $main: submit from the folder that main.py is in" >&2; exit 2; }
case " $* " in
    *" --output_dir "* | *" --output_dir="*) ;;
    *) echo "name the folder of the training with --output_dir: a job that is started again goes on from there" >&2; exit 2 ;;
esac

nodes="${SLURM_NNODES:-1}"
gpus="${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}"
processes="${PROCESSES:-$gpus}"
[[ "$processes" -ge 1 ]] || { echo "no GPU was found: say how many processes with PROCESSES=N, and --device cpu" >&2; exit 2; }

# Where the nodes meet (c10d): at the first of them, at a port that two jobs hardly share.
port="${PORT:-$((20000 + ${SLURM_JOB_ID:-$$} % 20000))}"
launch=()
rendezvous=(--standalone)
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    # One task a node, and the job ends if one of them does.
    launch=(srun --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
    rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="${hosts%%$'\n'*}:$port" --rdzv-id="$SLURM_JOB_ID")
fi

# Processes that read images are main.py's --num_workers; each process computes with its share of the cores besides.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# How long torchrun waits for processes that save, before it kills them; an older PyTorch, such as 2.6,
# waits 30 seconds whatever this says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-150}"

# --max-restarts: when a process dies, all are started again, and --resume auto goes on from the newest whole checkpoint.
# It begins where there is none, so that first start, restart and requeue are one command.
command=("${launch[@]}" "${PYTHON:-python}" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$processes"
         "${rendezvous[@]}" --max-restarts="${RESTARTS:-3}" "$main" "$@" --resume auto)
printf '%q ' "${command[@]}"; echo
[[ -z "${DRY_RUN:-}" ]] || exit 0

# "save": SIGTERM goes to torchrun on every node, and from there to all processes of main.py, which finish their step, save
# and leave. Under Slurm scancel sends it to the tasks: srun itself would kill them on SIGTERM. At the end of the time the job
# then asks to be queued again; of a preemption Slurm knows that itself.
running='' stopped=''
save() {
    stopped="$1"
    [[ -n "$running" ]] || return 0
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then scancel --signal=TERM "$SLURM_JOB_ID"; else kill -TERM "$running"; fi || true
}
trap 'save USR1' USR1
trap 'save TERM' TERM
"${command[@]}" & running=$!
status=0
wait "$running" || status=$?
while kill -0 "$running" 2>/dev/null; do                  # a trap ends the first wait, before the processes have saved
    status=0
    wait "$running" || status=$?
done
if [[ "$stopped" == USR1 && -n "${SLURM_JOB_ID:-}" && "$status" -ne 0 ]]; then
    echo "the time is over: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
