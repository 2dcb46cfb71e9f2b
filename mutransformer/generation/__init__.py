"""Sampling text from a run's model: prompts and continuations on the host, one pass over the prompts, then token by token."""
