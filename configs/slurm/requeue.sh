#!/bin/bash
# A job that outlives its time limit: it gets a signal two minutes before, saves, requeues itself, and resumes.
#   sbatch configs/slurm/requeue.sh CONFIG [settings as terratorch fit takes them]
#SBATCH --job-name=simpler
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source configs/slurm/environment.sh

# Every job needs its own folder: Lightning resumes from any hpc_ckpt_*.ckpt in it. The job id stays the same when the job is
# requeued.
exec srun terratorch fit --config "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.default_root_dir "runs/$SLURM_JOB_ID"
