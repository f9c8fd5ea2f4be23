"""Preparing data for large runs: rows -> packed, tokenised shards (`training/shard_files.py`), in many processes."""
