"""mutransformer: the muP training stack for JAX. Tune small, train large."""
