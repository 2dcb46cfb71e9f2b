"""The science of muP: coordinate checks, sweeps of many runs at once, and reports that give a verdict."""
