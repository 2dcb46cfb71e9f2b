"""mutransformer: the muP training stack for JAX. Tune small, train large."""

from importlib.metadata import version

__version__ = version("mutransformer")
