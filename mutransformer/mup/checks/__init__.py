"""Empirical tests of a parametrization, as numbers and verdicts: coordinate checks, and transfer of the learning rate. Pure."""
