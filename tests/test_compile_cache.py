"""Compiled programs are found by the next process, and a damaged one is never executed."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from short_runs import ROOT

from mutransformer.sharding.compile_cache import SealedCache, keep_compiled


def test_what_was_put_is_found(tmp_path: Path) -> None:
    SealedCache(tmp_path).put("a", b"value")
    assert SealedCache(tmp_path).get("a") == b"value" and SealedCache(tmp_path).get("b") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("at", [0, 31, 32, 500, 1031])
def test_a_flipped_bit_is_noticed(tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture) -> None:
    cache, path = SealedCache(tmp_path), tmp_path / "a"
    cache.put("a", bytes(1000))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert cache.get("a") is None and not path.exists()
    assert [record.message for record in caplog.records] == [f"{path}: damaged; the program is compiled again"]


@pytest.mark.parametrize("length", [0, 10, 32, 1031])
def test_half_an_entry_is_noticed(tmp_path: Path, length: int) -> None:
    cache, path = SealedCache(tmp_path), tmp_path / "a"
    cache.put("a", bytes(1000))
    os.truncate(path, length)
    assert cache.get("a") is None and not path.exists()


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = SealedCache(tmp_path, limit=3000)
    for second, key in enumerate("abc"):
        cache.put(key, bytes(900))
        os.utime(tmp_path / key, (second, second))
    assert cache.get("a") is not None  # now b was used longest ago
    cache.put("d", bytes(900))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_folder_that_is_gone_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = SealedCache(tmp_path / "gone")
    for key in "ab":
        cache.put(key, b"value")
        assert cache.get(key) is None
    (text,) = [record.message for record in caplog.records]
    assert text.startswith(f"{tmp_path / 'gone'}: compiled programs are not kept: ")


COMPILE = """
import jax, jax.monitoring
from mutransformer.config.load import load
from mutransformer.sharding.processes import prepare_jax

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
prepare_jax(load([f"compile_cache={FOLDER}"]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda a: a @ a + 1)(jax.numpy.ones((2, 2)))[0, 0], events.count("cache_hits"), events.count("cache_misses"))
"""


def compiled(folder: Path | str, **env: str) -> tuple[str, str]:
    """Standard output and error of a process that compiles with this folder."""
    inherited = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    program = [sys.executable, "-W", "error", "-c", COMPILE.replace("{FOLDER}", str(folder))]
    done = subprocess.run(program, env={**inherited, **env}, capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout, done.stderr


def test_the_next_process_finds_the_program_and_compiles_a_damaged_one_again(tmp_path: Path) -> None:
    (first, _), (second, _) = compiled(tmp_path), compiled(tmp_path)
    value, hits, misses = first.split()
    assert float(value) == 3 and int(hits) == 0 and int(misses) >= 1
    assert second.split() == [value, misses, "0"]
    for path in tmp_path.glob("*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    third, errors = compiled(tmp_path)
    assert third.split() == [value, "0", misses] and errors.count("damaged; the program is compiled again") == int(misses)


def test_without_a_folder_or_with_another_nothing_is_written(tmp_path: Path) -> None:
    assert compiled("null")[0].split()[1:] == ["0", "0"]
    hits = compiled(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))[0].split()[1]
    assert hits == "0" and not (tmp_path / "ours").exists() and list((tmp_path / "theirs").glob("*/*"))


def test_the_second_run_of_a_process_looks_where_the_first_did(tmp_path: Path) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]
    assert Path(before).is_dir(), "set by conftest.py"
    keep_compiled(str(tmp_path / "another"))
    assert jax.config.values["jax_compilation_cache_dir"] == before and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out, errors = compiled(tmp_path / "file")
    assert out.split()[1:] == ["0", "0"] and errors.count("\n") == 1 and "compiled programs are not kept" in errors
