"""Mistakes as a user meets them: one line on standard error, exit code 2, and nothing touched.

Most run in this process, which has eight devices; a few as a process of its own, for what only a new process shows.
"""

import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from short_runs import free_port

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.config.run import DistributedConfig
from mutransformer.data.batches.pipeline import fingerprint
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.cache.store import to_json
from mutransformer.errors import USAGE_ERROR, ConfigError
from mutransformer.sharding import devices as hardware
from mutransformer.sharding.processes import join_processes
from mutransformer.training import metrics
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.checkpoint_storage import CHECKSUMS, _checksums
from mutransformer.training.program import build_with_data
from mutransformer.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"line {i} of a small text, number {i * i}\n" for i in range(60))
EIGHT = "--xla_force_host_platform_device_count=8"
# Processor time until a mistake is reported, relative to that of starting JAX, measured beside it: a loaded machine slows both.
MOST_STARTS = 4


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@pytest.fixture
def settings(tmp_path):
    """The settings of the smallest run; a later setting of the same key wins."""
    (tmp_path / "text.txt").write_text(TEXT)
    return small_run(tmp_path)


def small_run(folder: Path) -> list[str]:
    return [
        "data.source=text",
        f"data.files=[{folder}/text.txt]",
        "data.tokenizer=bytes",
        f"data.cache_dir={folder}/cache",
        f"workdir={folder}/runs",
        "model.d_model=64",
        "model.n_layer=1",
        "data.seq_len=16",
        "data.batch_size=8",
        "steps=2",
        "log.tensorboard=false",
    ]


def new_process(folder: Path, *args: str, xla_flags: str = "") -> Outcome:
    """Trains by the user's command in an empty folder, in which it must leave nothing."""
    cwd = folder / "cwd"
    cwd.mkdir(exist_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    start, start_cpu = time.perf_counter(), children_cpu_seconds()
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=50
    )
    seconds, cpu_seconds = time.perf_counter() - start, children_cpu_seconds() - start_cpu
    assert not list(cwd.iterdir())
    return Outcome(done.returncode, done.stdout, done.stderr, seconds, cpu_seconds)


def children_cpu_seconds() -> float:
    """The processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def train(tmp_path, capsys, monkeypatch) -> Callable[..., Outcome]:
    """The same command in this process, in the same empty folder."""
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: None)  # a setting of the whole process
    monkeypatch.setattr(metrics, "setup_logging", lambda: None)  # likewise
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*args: str) -> Outcome:
        code = main(["train", *args])
        captured = capsys.readouterr()
        assert not list((tmp_path / "cwd").iterdir())
        return Outcome(code, captured.out, captured.err)

    return run


def check_refused(outcome: Outcome, message: str) -> None:
    assert "Traceback" not in outcome.out + outcome.err
    assert re.fullmatch(r"error: .+\n", outcome.err), outcome.err
    assert re.search(message, outcome.err), outcome.err
    assert outcome.code == USAGE_ERROR == 2


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file below the folder, and the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model.d_modle=64"], r"model.d_modle: no such key; did you mean model.d_model\?"),
        (["steps=many"], r"steps=many: must be an integer in decimal digits"),
        (["optim.lr=-1"], r"optim.lr = -1.0: must be above 0"),
        (["optim.accumulate=2"], r"optim.accumulate: renamed to optim.grad_accumulation_steps"),
        (["model.d_head=48"], r"model.d_model = 64: not divisible by model.d_head = 48; the nearest that fit are 48 and 96"),
        (["none.yaml"], r"none.yaml: cannot read it: No such file or directory"),
        (["twice.yaml"], r"twice.yaml:2: not valid YAML: found duplicate key steps"),
        (["distributed.coordinator=localhost"], r"distributed.coordinator = localhost: must be host:port"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings(args, message, settings, tmp_path, train):
    (tmp_path / "twice.yaml").write_text("steps: 3\nsteps: 4\n")
    args = [str(tmp_path / arg) if arg.endswith(".yaml") else arg for arg in args]
    check_refused(train(*settings, *args), message)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("args", "flags", "message"),
    [
        ("optim.lr=-1", "", r"optim.lr = -1.0: must be above 0"),
        ("mesh.x=3", "", r"mesh.x = 3, mesh.y = 1: need 3 devices, here are 1"),
        pytest.param("data.batch_size=12", EIGHT, r"data.batch_size = 12 .*not divisible by mesh.x = 8", marks=pytest.mark.slow),
    ],
)
def test_a_process_answers_in_time(args, flags, message, settings, tmp_path):
    before = children_cpu_seconds()
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env={**os.environ, "XLA_FLAGS": flags}, check=True)
    start_of_jax = children_cpu_seconds() - before
    outcome = new_process(tmp_path, *settings, *args.split(), xla_flags=flags)
    check_refused(outcome, message)
    assert outcome.cpu_seconds < MOST_STARTS * start_of_jax
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("mesh.y=3", r"mesh.y = 3: does not divide the 8 devices"),
        ("mesh.y=16", r"mesh.y = 16: does not divide the 8 devices"),
        ("mesh.x=4 mesh.y=1", r"mesh.x = 4, mesh.y = 1: need 4 devices, here are 8"),
        ("mesh.y=2 model.d_model=64", r"model.d_model / model.d_head: heads = 1: not divisible by mesh.y = 2"),
        (
            "data.batch_size=16 mesh.overlap_groups=3",
            r"mesh.overlap_groups = 3: must divide the 2 rows that a device has at a time",
        ),
        (
            "data.batch_size=8 optim.grad_accumulation_steps=8",
            r"optim.grad_accumulation_steps = 8: rows at a time = 1: not divisible by mesh.x = 8",
        ),
        ("model.d_model=60 model.d_head=60", r"model.d_model = 60: not divisible by mesh.x = 8"),
        ("mesh.x=1 mesh.y=8 model.d_head=8 model.ff_multiple=0.8", r"feed-forward .* = 51: not divisible by mesh.y = 8"),
        ("model.vocab_multiple=1", r"vocabulary padded to model.vocab_multiple = 259: not divisible by mesh.x = 8"),
    ],
)
def test_meshes(args, message, settings, tmp_path, train):
    check_refused(train(*settings, *args.split()), message)
    assert not (tmp_path / "runs").exists()


FOLDER = "<folder>"  # stands for the test's own
DATA = [
    (f"data.files=[{FOLDER}/none.txt]", r"data.files: .*/none.txt matches no file"),
    (f"data.files=[{FOLDER}/latin.txt]", r"data: .*/latin.txt, line 2, byte 9: not UTF-8 \(invalid"),
    (f"data.files=[{FOLDER}/*.none]", r"data.files: .*/\*.none matches no file"),
    (f"data.files=[{FOLDER}]", r"data.files: .* is a folder; name its files"),
    (f"data.files=[{FOLDER}/empty.txt]", r"empty.txt'\]: 0 bytes of text are too few"),
    (f"data.files=[{FOLDER}/tiny.txt]", r"tiny.txt'\]: 1 bytes of text are too few"),
    ("data.seq_len=4096", r"data.batch_size = 8, data.seq_len = 4096: the train split has \d+ tokens, a batch needs 32768"),
    ("model.n_vocab=258", r"model.n_vocab = 258: the tokenizer gives ids up to 258; set 259, or leave it out"),
    (f"data.tokenizer_file={FOLDER}/text.txt", r"data.tokenizer_file is set: it needs data.tokenizer=sentencepiece or hf"),
    (f"data.cache_dir={FOLDER}/text.txt", r"data.cache_dir = .*/text.txt: cannot write there: (Not a directory|File exists)"),
    (
        f"data.tokenizer=sentencepiece data.tokenizer_file={FOLDER}/none",
        r"data.tokenizer_file = .*/none: cannot read it: No such",
    ),
    (
        f"data.tokenizer=sentencepiece data.tokenizer_file={FOLDER}/text.txt",
        r"data.tokenizer_file = .*: not a SentencePiece model",
    ),
    (f"data.tokenizer=sentencepiece data.tokenizer_file={FOLDER}/empty.txt", r"data.tokenizer_file = .*: an empty file"),
    ("data.tokenizer=sentencepiece data.vocab_size=9000", r"data.vocab_size = 9000: the train split gives at most \d+ pieces"),
]


@pytest.mark.parametrize(("args", "message"), DATA, ids=[args for args, _ in DATA])
def test_data_and_tokenizers(args, message, settings, tmp_path, train):
    (tmp_path / "latin.txt").write_bytes(b"line one\n\xe9t\xe9\n" + b"and more\n" * 30)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tiny.txt").write_text("x")
    check_refused(train(*settings, *args.replace(FOLDER, str(tmp_path)).split()), message)
    assert not (tmp_path / "runs").exists()
    if (tmp_path / "cache").exists():
        assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]  # half an entry


def test_token_outside_the_vocabulary(settings, tmp_path, train):
    """A token file whose checksums fit and that is wrong nevertheless: refused with file, token and id when the row is read."""
    (tokens,) = prepare(load(settings).data).splits["train"].sources
    file = tokens.sections[0].reader.path
    data = bytearray(file.read_bytes())
    data[: 2 * tokens.n_tokens] = np.full(tokens.n_tokens, 259, "<u2").tobytes()
    file.write_bytes(data)
    manifest = file.with_name("manifest.json")
    entry = json.loads(manifest.read_bytes())["entry"]
    entry["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    manifest.write_bytes(to_json(entry))
    outcome = train(*settings)
    check_refused(outcome, r"00000-of-00001.bin, train token \d+: id 259 is outside the vocabulary of 259")
    assert not list((tmp_path / "runs/run/checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoint of a run that has ended, made without the time to compile a step; only to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    program, corpus = build_with_data(load(small_run(folder)))
    config, state = program.config, program.init_state()
    with closing(Checkpoints(config, RunFolder(config.rundir))) as checkpoints:
        data = fingerprint(corpus.splits["train"], config.data, config.seed)
        checkpoints.save(dataclasses.replace(state, step=state.step + config.steps), {"next_index": config.steps}, data)
        checkpoints.record_loss(config.steps, 5.5)
        checkpoints.wait()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run's folder, which `goes_on` goes on from."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path / "runs/run"


@pytest.fixture
def goes_on(finished, settings):
    return [*settings, f"data.files=[{finished}/text.txt]"]  # its place is a setting that must agree


def write_checksums(checkpoint):
    """Makes the checksums fit the files as they are now."""
    seal = {"step": int(checkpoint.name), "files": _checksums(checkpoint)}
    (checkpoint / CHECKSUMS).write_text(json.dumps(seal))


def corrupt_step(run: Path, what: str) -> None:
    latest = run / "checkpoints/2"
    match what:
        case "an empty checkpoint":
            shutil.rmtree(latest)
            (run / "checkpoints/5").mkdir()
        case "a file instead of the checkpoints":
            shutil.rmtree(latest.parent)
            latest.parent.touch()
        case "an emptied state":
            shutil.rmtree(latest / "state")
            (latest / "state").mkdir()
        case "a state that lacks a file":
            largest = max(
                (path for path in latest.joinpath("state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
            )
            largest.unlink()
        case "a state cut in half":
            for path in latest.joinpath("state/d").iterdir():
                os.truncate(path, path.stat().st_size // 2)
            for path in latest.joinpath("state/ocdbt.process_0/d").iterdir():
                os.truncate(path, path.stat().st_size // 2)
        case "a broken run record":
            (latest / "run/metadata").write_text('{"config": ')
        case "a run record that is no record":
            (latest / "run/metadata").write_text("[1, 2]")
            write_checksums(latest)
        case "a run record without its parts":
            (latest / "run/metadata").write_text("{}")
            write_checksums(latest)
        case "a run record without a position":
            record = json.loads((latest / "run/metadata").read_bytes())
            (latest / "run/metadata").write_text(json.dumps(record | {"position": {}}))
            write_checksums(latest)
        case "no run record":
            shutil.rmtree(latest / "run")
        case _:
            raise AssertionError(what)


CORRUPTION = {
    "an empty checkpoint": r"checkpoints: every checkpoint here is corrupt",
    "a file instead of the checkpoints": r"checkpoints: not a folder, the run needs one there",
    "an emptied state": r"checkpoints: every checkpoint here is corrupt",
    "a state that lacks a file": r"checkpoints: every checkpoint here is corrupt",
    "a state cut in half": r"checkpoints: every checkpoint here is corrupt",
    "a broken run record": r"checkpoints: every checkpoint here is corrupt",
    "a run record that is no record": r"checkpoints/2: cannot be read",
    "a run record without its parts": r"checkpoints/2: cannot be read",
    "a run record without a position": r"checkpoints/2: cannot be read",
    "no run record": r"checkpoints: every checkpoint here is corrupt",
}


@pytest.mark.parametrize(("what", "message"), CORRUPTION.items())
def test_corrupt_checkpoints(what, message, run, goes_on, train):
    corrupt_step(run, what)
    before = contents(run)
    check_refused(train(*goes_on), message)
    assert contents(run) == before


def test_checkpoint_of_another_run(run, settings, tmp_path, train):
    """All that differs is listed, old and new, and what may differ is not."""
    (tmp_path / "text.txt").write_text(TEXT + "one more line\n")  # the command's own, not that of the checkpoint
    before = contents(run)
    changed = ["model.n_layer=2", "optim.lr=0.5", "data.seq_len=8", "eval.every=7", "data.prefetch=1", "log.every=3"]
    outcome = train(*settings, *changed)
    check_refused(outcome, r"checkpoints/2 belongs to another run: .*checkpoint.allow")
    for difference in (
        r"model.n_layer was 1, is 2",
        r"optim.lr was 0.015625, is 0.5",
        r"data.seq_len was 16, is 8",
        r"fingerprint.tokens differs \(data.files was \[.*\], is \[.*\], data.seq_len",
    ):
        assert re.search(difference, outcome.err)
    assert not re.search(r"eval.every|prefetch|log.every|workdir|cache_dir|optim.beta1|fingerprint.seed", outcome.err)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["steps=3"], r"another run: steps was 2, is 3\. "),
        (["seed=1"], r"another run: seed was 0, is 1\. "),
        (["data.intra_document_mask=true"], r"another run: data.intra_document_mask was False, is True\. "),
        (["optim.lr=0.5", "seed=1", "checkpoint.allow=[seed]"], r"run: optim.lr was 0.015625, is 0.5\. "),
        (["model.n_kv_head=1"], r"another run: model.n_kv_head was None, is 1\. "),
        (["checkpoint.allow=[sede]"], r"checkpoint.allow: no such key: sede$"),
        (["data.validation_fraction=0.1"], r"fingerprint.tokens differs \(data.validation_fraction was 0.05, is 0.1\)\. "),
        (["data.test_fraction=0.2"], r"fingerprint.tokens differs \(data.test_fraction was \S+, is 0.2\)\. "),
        (["optim.name=lion"], r"another run: optim.name was adamw, is lion\. "),
        (["checkpoint.resume=false"], r"checkpoint.resume = false: .*/runs/run holds a run; choose another name="),
    ],
)
def test_other_differences_to_a_checkpoint(args, message, goes_on, run, train):
    before = contents(run)
    check_refused(train(*goes_on, *args), message)
    assert contents(run) == before


@pytest.mark.parametrize("blocked", ["runs", "runs/run"])
def test_work_directory_that_cannot_be_written(blocked, settings, tmp_path, train):
    """A file in its place: permissions would not stop root, whom tests may run as."""
    path = tmp_path / blocked
    path.parent.mkdir(exist_ok=True)
    path.touch()
    check_refused(train(*settings), rf"{path}: not a folder, the run needs one there")
    assert path.read_bytes() == b""


def test_coordinator_that_cannot_be_reached(settings, tmp_path):
    """Port 1 is reserved and never listened on."""
    other = ["distributed.coordinator=127.0.0.1:1", "distributed.n_process=2", "distributed.process_id=1"]
    outcome = new_process(tmp_path, *settings, *other, "distributed.timeout=2")
    message = r"distributed.coordinator = 127.0.0.1:1: not reached within distributed.timeout = 2 s: Connection refused"
    check_refused(outcome, message)
    assert outcome.seconds > 2 and not (tmp_path / "runs").exists()


def test_coordinator_that_is_not_known(settings, tmp_path):
    outcome = new_process(tmp_path, *settings, "distributed.enabled=true")
    check_refused(outcome, r"distributed: cannot join the other processes: coordinator_address should be defined")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens there is not process 0 of a run, but something else"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what listens there is not process 0 of a run, but something else"),
        (b"", "not reached within distributed.timeout = 2 s: Connection reset by peer"),
        (None, "not reached within distributed.timeout = 2 s: timed out"),
    ],
    ids=["web", "ssh", "closed", "silent"],
)
def test_something_else_at_the_place_of_the_coordinator(answer, message):
    """JAX alone would abort with a stack trace of C++."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):  # the server was closed
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"^distributed.coordinator = {address}: {message}$"):
            join_processes(DistributedConfig(coordinator=address, n_process=2, process_id=1, timeout=2))
        with pytest.raises(ConfigError, match="process 0 cannot listen at its port: Address already in use$"):
            join_processes(DistributedConfig(coordinator=address, n_process=2, process_id=0, timeout=2))
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


def test_processes_that_never_come(settings, tmp_path):
    other = [f"distributed.coordinator=127.0.0.1:{free_port()}", "distributed.n_process=2", "distributed.process_id=0"]
    outcome = new_process(tmp_path, *settings, *other, "distributed.timeout=2")
    check_refused(outcome, r"distributed.coordinator = 127.0.0.1:\d+: 2 processes did not join within distributed.timeout = 2 s$")
