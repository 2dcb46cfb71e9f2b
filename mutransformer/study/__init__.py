"""Empirical tests of a parametrization: coordinate checks, hyperparameter sweeps, and reports with verdicts."""
