"""Hugging Face in and out: a run becomes a folder that `transformers` loads, and such a folder becomes a run."""
