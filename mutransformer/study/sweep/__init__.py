"""Sweeps over widths, learning rates and seeds, with many runs trained at once."""
