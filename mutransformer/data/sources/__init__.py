"""Where text comes from, and which documents are held out."""
