"""Converters of foreign checkpoints; installed as `mlx_transfusion.convert`."""
