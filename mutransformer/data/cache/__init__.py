"""Tokenized text in shards, on disk or in an object store."""
