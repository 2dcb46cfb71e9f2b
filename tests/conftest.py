"""Eight simulated CPU devices, strict ranks, and the options of the test run."""

import atexit
import os
import shutil
import signal
import tempfile

from compiling import xla_flags

# Before JAX starts. The caches and any accelerator of the machine stay out of the tests. All processes of a test run share one
# folder of compiled programs, which is removed at its end.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8)
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mutransformer-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# A shell lets what it starts in the background ignore Ctrl-C, and processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

from mutransformer.sharding.compile_cache import keep_compiled

jax.config.update("jax_numpy_rank_promotion", "raise")
keep_compiled(None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--reference-dir", help="a folder of reference cases (.npz) to run besides those in tests/data")


# Files whose tests are few and long come first: otherwise one process of the test run is left alone with them at its end.
_FIRST = ("test_resume", "test_processes", "test_gcs", "test_api", "test_parallel_runs", "test_layer_log", "test_faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
