"""The step's schedule from the TPU compiler, read from its HLO text and simulated."""
