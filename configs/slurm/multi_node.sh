#!/bin/bash
# Four nodes with four GPUs each.
#   sbatch configs/slurm/multi_node.sh CONFIG [settings as terratorch fit takes them]
#SBATCH --job-name=simpler
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source configs/slurm/environment.sh

# --kill-on-bad-exit: if one process dies, the others are killed at once.
exec srun --kill-on-bad-exit=1 terratorch fit --config "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.default_root_dir "runs/$SLURM_JOB_ID"
