"""The configuration of a run: what can be set, and how it is read. Imports no JAX."""
