"""The decoder-only Transformer: its weights and its mathematics on one device of the mesh."""
