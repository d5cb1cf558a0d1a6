#!/bin/bash
# A job that outlives its time limit: it is told two minutes before, saves, queues itself again, and goes on.
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

# The folder has to be the job's own: Lightning looks there for the checkpoint it saved (hpc_ckpt_*.ckpt), and takes any it
# finds. The number of a job stays the same when it is queued again.
exec srun terratorch fit --config "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.default_root_dir "runs/$SLURM_JOB_ID"
