"""The CUDA reference path: the same model, data, noise and configs in PyTorch, for runs on many GPUs.

Nothing in here imports mlx. Configs, sequences, TrigFlow, random draws, rows and pixels are the package's own
modules, shared with the MLX side; model, losses, training and checkpoints are written again. Parameters have the
names, shapes and layouts of the MLX model, so a model folder passes from one to the other bit for bit.

    torchrun --nproc-per-node 8 -m mlx_transfusion.torch.train CONFIG.toml
    python -m mlx_transfusion.torch.export runs/x/torch/step-00001000 my-model
"""
