# Environment of a job, sourced by the batch scripts. Adapt it to your cluster.

# Compute nodes rarely have internet access: download weights once on a login node, into a folder that all nodes see.
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
export HF_HUB_OFFLINE=1

# One thread per core, shared by the processes of a node; data loader workers add their own.
export OMP_NUM_THREADS=1

# GDAL: megabytes of decoded blocks in each process (the default is a twentieth of the node's memory, in every one of them), and
# no listing of folders with a hundred thousand files.
export GDAL_CACHEMAX=512
export GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR

# NCCL (training) and gloo (selection) select a network automatically. If it is the wrong one, set it:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
