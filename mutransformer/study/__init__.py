"""Empirical tests of a parametrization on this project's model: coordinate checks, hyperparameter sweeps, reports, figures."""
