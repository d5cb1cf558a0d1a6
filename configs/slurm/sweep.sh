#!/bin/bash
# A sweep over learning rates whose jobs share one plan: the first streams the tiles; the others wait for it or, if started later,
# load the plan from plan_cache.
#   sbatch configs/slurm/sweep.sh CONFIG [settings as terratorch fit takes them]
#SBATCH --job-name=simpler-sweep
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source configs/slurm/environment.sh

rates=(1.0e-4 3.0e-4 1.0e-3 3.0e-3)

exec srun terratorch fit --config "$@" \
  --trainer.num_nodes 1 --trainer.devices 1 --trainer.strategy auto \
  --trainer.default_root_dir "runs/${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" \
  --optimizer.init_args.lr "${rates[$SLURM_ARRAY_TASK_ID]}"
