#!/usr/bin/env bash
# One ImageNet cell on several machines under SLURM, to be adapted: sbatch scripts/slurm_imagenet.sh CONFIG [key=value ...]
#
#   sbatch scripts/slurm_imagenet.sh configs/imagenet/apollo_cosine.yaml precision=bf16
#
# Submitted from the root of the repository, after `bash scripts/setup.sh`, with data.root on a disk that every machine
# sees (docs/data.md says what to mind there). The global batch stays the config's whatever the number of GPUs: here
# 2 machines x 4 GPUs take 32 images each, as in the published runs. Two minutes before its time is up, and when it is
# preempted, the job saves and is put back into the queue; there it goes on where it was.
#SBATCH --job-name=imagenet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=imagenet-%j.log
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch scripts/slurm_imagenet.sh CONFIG [key=value ...]" >&2; exit 2; }
: "${SLURM_JOB_ID:?this script is for sbatch; on one machine use torchrun (docs/reproduction.md)}"

cd "$SLURM_SUBMIT_DIR"
PYTHON=$(bash scripts/setup.sh --print-python)
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a machine, one rank a GPU; the first machine is where they meet.
srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-4}" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD_NODE:29500" --rdzv_id "$SLURM_JOB_ID" \
  -m classification.train "$@" &
step=$!

# sbatch sends TERM to this shell alone: it is handed on, and the shell stays until the ranks have saved.
stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' TERM
status=0
wait "$step" || status=$?
while [ -n "$stopped" ] && kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done
[ -z "$stopped" ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
