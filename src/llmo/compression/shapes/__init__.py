"""Smaller shapes of a trained encoder: each a model folder in the plain Hugging Face layout, made from another one."""
