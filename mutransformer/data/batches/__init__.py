"""Rows of tokens, and batches of them."""
