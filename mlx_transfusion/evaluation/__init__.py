"""Measures of a model: losses and perplexity, retrieval of pictures and captions."""
