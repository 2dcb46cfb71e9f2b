"""The Python API: every public function has an example that runs, and importing it does not start JAX."""

import doctest
import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import mutransformer


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one session in an empty folder, in the order of the module: later examples use the run of earlier ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of tokens
    monkeypatch.setattr(logging.getLogger("mutransformer"), "handlers", [])  # of a test before, in the same process
    (tmp_path / "notes.txt").write_text("\n".join(f"note {i}: {i * i} is the square of {i}" for i in range(400)))
    names = [name for name in mutransformer.__all__ if name[0].islower() and name != "mup"]
    functions = [getattr(mutransformer, name) for name in names]
    functions.sort(key=lambda function: inspect.unwrap(function).__code__.co_firstlineno)
    assert len(functions) >= 7
    for function in functions:
        (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=dict(vars(mutransformer)))
        assert test.examples, f"{function.__name__} has no example"
        report: list[str] = []
        failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert not failed, "".join(report)


def test_importing_does_not_start_jax() -> None:
    code = "import sys, mutransformer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_name_is_there() -> None:
    assert all(getattr(mutransformer, name) is not None for name in mutransformer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        mutransformer.tran  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
