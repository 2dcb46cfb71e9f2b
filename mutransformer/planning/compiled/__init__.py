"""The step's schedule from the real compiler, read from its HLO text and simulated."""
