"""XLA's flags for tests. Compiling is most of the time of a test, so it is made quick; what comes out runs more slowly."""

from importlib.metadata import version

# LLVM's optimisation is skipped. Up to jaxlib 0.10 the code of a fusion can also be emitted without MLIR, in a third of the time.
# Later versions have no such flag, and abort at an unknown one.
_OLD_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10)
QUICK = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * _OLD_EMITTERS


def xla_flags(devices: int, quick: bool = True) -> str:
    """XLA_FLAGS for a process with this many simulated CPU devices; not quick: compiled as for a user."""
    return f"--xla_force_host_platform_device_count={devices}" + f" {QUICK}" * quick
