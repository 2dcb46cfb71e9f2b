"""mutransformer: the muP training stack for JAX. Tune small, train large."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mutransformer")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.1.0"
