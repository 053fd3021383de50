#!/bin/bash
#SBATCH --job-name=pixelgrow
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1200
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains a recipe on all machines of a SLURM job, in jobs of a day, until it is done:
#
#     sbatch examples/slurm.sh photos --runs /shared/runs --set data.source=/shared/shards
#
# Everything after the script is for `pixelgrow run`. The folder of the runs and the data are on a disk of all machines.
# Twenty minutes before the time is up, SLURM signals this script. It asks the processes to save, and puts the job back
# into the queue; the next one goes on. So does one whose machines were taken away (--requeue). An error ends the job.
set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch slurm.sh RECIPE [options of pixelgrow run]" >&2
    exit 2
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
ending=""
trap 'ending=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # to the steps of the job, not to this script

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" \
    --shutdown-timeout 600 \
    -m pixelgrow run "$@" &
step=$!

status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not the step
    status=0
    wait "$step" || status=$?
done

if [ -n "$ending" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
