"""The parametrization: how a weight is initialised and trained, by its role and the size of the model."""
