"""Data sets and tokenizers of the Hugging Face Hub: the real code, against folders in its layout and a server that fails."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, Hub
from hf import t5
from test_sources import TEXTS, texts_of, write

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.sources.source import SPLITS, Fractions, split_of
from mutransformer.errors import ConfigError

ROOT = Path(__file__).parents[1]
TOKEN = "hf_thisIsASecretOfTheUser"
ENGLISH = "configs:\n- config_name: en\n  data_files:\n"


def c4(folder: Path, splits: dict[str, list[list[str]]]) -> Path:
    """A data set in the Hub's layout, with C4's names, subset, columns and compression: files of texts by split."""
    card = ENGLISH
    for split, files in splits.items():
        card += f"  - split: {split}\n    path: en/c4-{split}.*.json.gz\n"
        for i, texts in enumerate(files):
            write(folder / "en/new.jsonl.gz", texts)
            (folder / "en/new.jsonl.gz").rename(folder / f"en/c4-{split}.{i:05d}-of-{len(files):05d}.json.gz")
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub").serving() as hub:
        c4(hub.repo("datasets", "allenai/c4"), {"train": [TEXTS[:40], TEXTS[40:80]], "validation": [TEXTS[80:100]]})
        t5(hub.repo("models", "google-t5/t5-base"))
        yield hub


def run(hub: Hub, folder: Path, *args: str, script: str = "prepare_data.py", **env: str) -> subprocess.CompletedProcess[str]:
    """A script on configs/paper/width128.yaml, with that Hub for all it knows."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN, "JAX_PLATFORMS": "cpu"} | env
    given = [str(ROOT / "configs/paper/width128.yaml"), "data.validation_fraction=0.2", f"data.cache_dir={folder}/cache", *args]
    command = [sys.executable, str(ROOT / "scripts" / script), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.glob("cache/**/*") if path.is_file())
    return done


def fails_with(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(f"error: {message}", last), done.stderr[-2000:]


def test_a_folder_in_the_hubs_layout_and_its_own_splits(tmp_path: Path) -> None:
    own: dict[str, list[list[str]]] = {"train": [TEXTS[:30], TEXTS[30:50]], "validation": [TEXTS[50:60]], "test": [TEXTS[60:70]]}
    folder = c4(tmp_path / "own", own)
    given: dict[str, Any] = {
        "source": "hub",
        "subset": "en",
        "tokenizer": "bytes",
        "cache_dir": str(tmp_path / "cache"),
        "tokenize_workers": 1,
    }
    assert texts_of(DataConfig(path=str(folder), **given)) == {split: sum(files, []) for split, files in own.items()}
    two = c4(tmp_path / "two", {key: own[key] for key in ("train", "validation")})
    shares = Fractions(0.05, 0.05)
    expected = {split: [text for text in TEXTS[:50] if split_of(text.encode(), shares) == split] for split in SPLITS}
    assert texts_of(DataConfig(path=str(two), **given)) == expected
    for settings, message in (
        ({"subset": "fr"}, r"data\.path = .*two: .*'fr'.*"),
        ({"split": "tset"}, r"data\.split = tset: .*two has the splits train, validation"),
        ({"column": "content"}, r"data\.column = content: no such column; .*two has id, text"),
        ({"path": str(tmp_path / "none")}, r"data\.path = .*none: .*"),
    ):
        changed: dict[str, Any] = {**given, "path": str(two), **settings}
        with pytest.raises(ConfigError, match=message) as error:
            prepare(DataConfig(**changed))
        assert "\n" not in str(error.value)


def test_only_the_column_of_text_is_decoded(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"no image", "path": None}] * len(TEXTS), pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    table = pa.table({"text": TEXTS, "image": images})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "own").mkdir()
    pq.write_table(table, tmp_path / "own/train.parquet")
    given: dict[str, Any] = {"source": "hub", "path": f"{tmp_path}/own", "tokenizer": "bytes", "tokenize_workers": 1}
    found = texts_of(DataConfig(**given, cache_dir=f"{tmp_path}/cache"))
    assert sorted(sum(found.values(), [])) == sorted(TEXTS)
    with pytest.raises(ConfigError, match=r"data\.column = content: no such column; .*own has text, image$"):
        prepare(DataConfig(**given, cache_dir=f"{tmp_path}/cache", column="content"))


@pytest.mark.slow
def test_c4_and_t5_as_the_papers_config_names_them(hub: Hub, tmp_path: Path) -> None:
    dry = run(hub, tmp_path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"data: hub path allenai/c4, subset en, revision {COMMIT}, column text" in dry.stdout
    assert "tokenizer: hf google-t5/t5-base" in dry.stdout and "2 shards to tokenize" in dry.stdout
    assert "rows: pad of 256 tokens" in dry.stdout and "splits: by hash, validation 20.0000%, test 0.0280%" in dry.stdout
    assert not (tmp_path / "cache").exists()
    done = run(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    counts = {split: int(n) for split, n in re.findall(r"data (\w+): (\d+) documents", done.stdout)}
    assert sum(counts.values()) == 80 and counts["validation"] > 5
    assert (f"GET /datasets/allenai/c4/resolve/{COMMIT}/en/c4-train.00001-of-00002.json.gz", f"Bearer {TOKEN}") in hub.asked
    # What is in the cache needs no network, and no Hub is asked.
    n_asked = len(hub.asked)
    offline = run(hub, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other home"))
    assert offline.returncode == 0 and len(hub.asked) == n_asked
    assert done.stdout.endswith(offline.stdout) and "tokenized 80 documents" in done.stdout


@pytest.mark.slow
def test_a_stand_in_trains_by_one_override(hub: Hub, tmp_path: Path) -> None:
    texts = [text.replace("fox", f"fox {i}") for i in range(20) for text in TEXTS]
    stand_in = c4(tmp_path / "stand-in", {"train": [texts[::2], texts[1::2]], "validation": [TEXTS]})
    smaller = [
        "model.n_layer=2",
        "data.batch_size=8",
        "steps=3",
        "eval.batches=1",
        "eval.final_batches=1",
        "log.tensorboard=false",
    ]
    done = run(hub, tmp_path, f"data.path={stand_in}", f"workdir={tmp_path}/runs", *smaller, script="train.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"tokenizer.json", "special_ids.json"} <= {path.name for path in (tmp_path / "runs/width128").iterdir()}
    shown = run(hub, tmp_path, f"data.path={stand_in}", "data.batch_size=8", script="inspect_data.py")
    assert "padding, does not count" in shown.stdout and "eos" in shown.stdout


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        (r"api/datasets", 404, r"data\.path = allenai/c4: not found on the Hub \(404\); .* HF_TOKEN .*"),
        pytest.param(
            r"api/datasets",
            401,
            r"data\.path = allenai/c4: the Hub refuses access \(401\): .* HF_TOKEN .*",
            marks=pytest.mark.slow,
        ),
        (r"", 429, r"data\.path = allenai/c4: rate-limited by the Hub \(429: too many requests\); try again later"),
        (r"google-t5", 404, r"data\.tokenizer_file = google-t5/t5-base: .*"),
    ],
)
def test_a_hub_that_refuses(pattern: str, status: int, message: str, hub: Hub, tmp_path: Path) -> None:
    hub.statuses = {pattern: [status] * 1000}
    start = time.monotonic()
    fails_with(run(hub, tmp_path), message)
    assert time.monotonic() - start < 10 + 5  # and somewhat for a loaded machine


def test_no_network_and_offline(hub: Hub, tmp_path: Path) -> None:
    start = time.monotonic()
    fails_with(
        run(hub, tmp_path, HF_HUB_OFFLINE="1"), r"data\.path = allenai/c4: HF_HUB_OFFLINE is set, and it is not in the cache"
    )
    fails_with(run(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:1"), r"data\.path = allenai/c4: the Hub cannot be reached: .*")
    assert time.monotonic() - start < 20 + 10 and not hub.asked


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["429", "500", "cut"])
def test_a_hub_that_fails_for_a_moment(fault: str, hub: Hub, tmp_path: Path) -> None:
    """It is waited for, and what comes is what comes without the fault; a file that breaks off is not taken as complete."""
    good = run(hub, tmp_path)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("tokens-*/*.bin")}
    if fault == "cut":
        hub.cut = {r"c4-train.00001": 2}
    else:
        hub.statuses = {r"resolve/.*/en/c4-train": [int(fault)] * 3}
    again = tmp_path / "again"
    done = run(hub, again)
    assert done.returncode == good.returncode == 0, done.stderr[-2000:]
    assert {path.name: path.read_bytes() for path in (again / "cache").glob("tokens-*/*.bin")} == whole and whole
    assert not any(hub.statuses.values()) and not any(hub.cut.values()), "the fault did not happen"


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", TEXTS)
    write(tmp_path / "a.jsonl.zst", TEXTS)
    for name in ("datasets", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, name, None)
    cache: dict[str, Any] = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"source": "hub", "path": str(tmp_path)}, r"data\.source = hub: needs datasets: pip install 'mutransformer\[hf\]'"),
        ({"source": "parquet", "files": [f"{tmp_path}/a.parquet"]}, r"a\.parquet: needs pyarrow: pip install .*\[data\]"),
        ({"source": "jsonl", "files": [f"{tmp_path}/a.jsonl.zst"]}, r"a\.jsonl\.zst: needs pyarrow: pip install .*\[data\]"),
    ]
    for settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            prepare(DataConfig(**settings, **cache))
