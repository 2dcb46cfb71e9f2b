"""Text to batches: sources of documents, tokenizers, token files, and the pipeline that serves them."""
