"""Sweeps over widths, learning rates and seeds."""
