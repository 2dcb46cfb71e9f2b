"""Devices: the mesh, what moves between them, and the processes of a run."""
