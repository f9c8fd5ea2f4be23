"""How fast a model is on this machine: `mlx-transfusion bench`."""
