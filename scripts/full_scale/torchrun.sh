#!/usr/bin/env bash
# One node, all of its GPUs: scripts/full_scale/torchrun.sh CONFIG.toml [flags of mlx_transfusion.torch.train]
# Several nodes: the same command on each, with NODES, NODE_RANK and MASTER (host:port of the first node) set.
set -euo pipefail

gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# Less fragmentation; and a process that lost its peers ends instead of waiting.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

if [ "${NODES:-1}" = 1 ]; then
    where=(--standalone)
else
    where=(--nnodes "$NODES" --node-rank "$NODE_RANK" --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id transfusion)
fi
# A run goes on from its newest whole checkpoint by itself, so starting it again is all that a fault needs.
exec torchrun "${where[@]}" --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-3}" -m mlx_transfusion.torch.train "$@"
