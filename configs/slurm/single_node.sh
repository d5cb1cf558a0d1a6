#!/bin/bash
# One node, four GPUs.
#   sbatch configs/slurm/single_node.sh CONFIG [settings as terratorch fit takes them]
#SBATCH --job-name=simpler
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source configs/slurm/environment.sh

# srun starts one process per GPU; Lightning detects its rank.
exec srun terratorch fit --config "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.default_root_dir "runs/$SLURM_JOB_ID"
