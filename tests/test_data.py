"""Sources, splits and the cache of token files."""

import errno
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mutransformer.config.data import DataConfig
from mutransformer.data.cache import build
from mutransformer.data.cache import prepare as preparation
from mutransformer.data.cache import store as cache
from mutransformer.data.cache.prepare import dry_run, prepare
from mutransformer.data.cache.store import Store
from mutransformer.data.sources import hub
from mutransformer.data.sources.registry import open_source
from mutransformer.data.sources.source import SPLITS, assign_splits, held_out_fractions
from mutransformer.data.sources.text import Document, cut
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer
from mutransformer.errors import ConfigError

PARAGRAPH = "Whan that Aprille with his shoures soote\r\n\tthe droghte of March hath perced — 😀\n\n"


def text_config(folder: Path, files: list[str], **settings: Any) -> DataConfig:
    settings = {"tokenizer": "bytes", "validation_fraction": 0.1, "test_fraction": 0.1} | settings
    return DataConfig(source="text", files=files, cache_dir=str(folder / "cache"), **settings)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Thirty small files in two folders, in UTF-8 with tabs, CRLF and emoji."""
    for k in range(30):
        path = tmp_path / "text" / ("a" if k % 2 else "b") / f"{k}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{k}: {PARAGRAPH * (k % 2 + 1)}".encode())
    return text_config(tmp_path, [f"{tmp_path}/text/**/*.txt"])


def documents(config: DataConfig) -> list[Document]:
    shards = open_source(config.mixture["data"], "data", held_out_fractions(config)).shards()
    return [d for shard in shards if isinstance(shard.records, partial) for d in shard.records.args[0]]


def only_entry(config: DataConfig, kind: str = "tokens") -> Path:
    (folder,) = Path(config.cache_dir).glob(f"{kind}-*")
    return folder


def tokens_of(config: DataConfig) -> dict[str, list[int]]:
    return {split: text.first(text.n_tokens).tolist() for split, text in prepare(config).splits.items()}


# Sources and splits


def test_stdlib_is_python_without_tests_and_build_settings() -> None:
    found = {d.name: d for d in documents(DataConfig())}
    root = Path(sysconfig.get_path("stdlib"))
    assert len(found) > 500
    assert list(found) == sorted(found)
    assert all(d.data == (root / d.name).read_bytes().removeprefix(b"\xef\xbb\xbf") for d in found.values())
    assert "json/decoder.py" in found and any(not d.data.isascii() for d in found.values())
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in found)
    assert {d.split for d in found.values()} == set(SPLITS)


def test_a_split_is_decided_by_the_name_alone() -> None:
    names = [f"{k}.txt" for k in range(400)]
    splits = dict(zip(names, assign_splits(names, 0.1, 0.2), strict=True))
    # Written down, since every machine and version must give the same.
    assert [name for name in names[:40] if splits[name] == "validation"] == ["1.txt", "18.txt", "20.txt", "27.txt", "39.txt"]
    assert [name for name in names[:40] if splits[name] == "test"] == ["2.txt", "24.txt", "28.txt", "34.txt"]
    fewer = names[100:][::-1]
    assert dict(zip(fewer, assign_splits(fewer, 0.1, 0.2), strict=True)) == {name: splits[name] for name in fewer}
    counts = {split: list(splits.values()).count(split) for split in SPLITS}
    assert 20 < counts["validation"] < 60 and 50 < counts["test"] < 110


@pytest.mark.parametrize("n", [3, 4, 10])
@pytest.mark.parametrize("share", [0.001, 0.499])
def test_no_split_is_empty_from_three_names_on(n: int, share: float) -> None:
    for start in range(20):
        assert set(assign_splits([f"{start + k}" for k in range(n)], share, share)) == set(SPLITS)


def test_names_and_splits_move_with_the_folder(config: DataConfig, tmp_path: Path) -> None:
    before = [(d.name, d.split, d.data) for d in documents(config)]
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    after = documents(text_config(tmp_path, [f"{tmp_path}/elsewhere/**/*.txt"]))
    assert before == [(d.name, d.split, d.data) for d in after]
    assert [d.name for d in after][:3] == ["a/1.txt", "a/11.txt", "a/13.txt"]
    assert len(before) == 30


def test_splits_and_tokens_stay_what_they_were(config: DataConfig, tmp_path: Path) -> None:
    """Written down, since runs are resumed on them: of thirty files, and of one long file that is cut."""
    lines = "".join(f"line {k} of the only file, été 😀\n" if k % 50 else "x€" * 400 for k in range(3000))
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    long = text_config(tmp_path, [f"{tmp_path}/long.txt"], add_bos=True)
    assert [d.name for d in documents(config) if d.split == "test"] == ["a/11.txt", "a/17.txt", "b/10.txt", "b/28.txt", "b/6.txt"]
    held_out = [(d.name, d.start) for d in documents(long) if d.split == "validation"]
    assert held_out[:4] == [("long.txt#6", 4247), ("long.txt#8", 5562), ("long.txt#12", 8458), ("long.txt#15", 10054)]
    assert held_out[-1] == ("long.txt#296", 206857) and len(held_out) == 30
    short = {"train": "9f1b642e9b69ada0", "validation": "f9908398a0523506", "test": "fcf7676ad8d1fde6"}
    one = {"train": "5fe96e8c5bc235dd", "validation": "3b30dbb77b415ce0", "test": "a290d668da465005"}
    for given, fingerprints in ((config, short), (long, one)):
        assert {split: text.fingerprint[:16] for split, text in prepare(given).splits.items()} == fingerprints


def test_identity_sees_contents_names_and_splits(config: DataConfig, tmp_path: Path) -> None:
    def identity(**settings: Any) -> str:
        changed = text_config(tmp_path, config.files, **settings)
        return cache.digest(open_source(changed.mixture["data"], "data", held_out_fractions(changed)).identity)

    prints = [identity(), identity(validation_fraction=0.4)]
    file = tmp_path / "text/a/1.txt"
    file.write_bytes(file.read_bytes().replace(b"soote", b"soota"))
    prints.append(identity())
    file.rename(file.with_name("100.txt"))
    prints.append(identity())
    assert len(set(prints)) == len(prints)


def test_one_long_file_is_divided_among_the_splits(tmp_path: Path) -> None:
    text = "".join(f"line {k} of the only file\n" for k in range(5000)).encode()
    (tmp_path / "one.txt").write_bytes(text)
    found = documents(text_config(tmp_path, [f"{tmp_path}/one.txt"]))
    assert b"".join(d.data for d in found) == text
    assert all(d.data.endswith(b"\n") for d in found)
    # Neighbouring pieces of one split are one document.
    assert all(a.split != b.split for a, b in zip(found, found[1:], strict=False))
    held_out = sum(len(d.data) for d in found if d.split != "train") / len(text)
    assert 0.1 < held_out < 0.3
    assert found[0].name == "one.txt#0" and {d.split for d in found} == set(SPLITS)


def test_a_file_that_dominates_is_cut_and_small_ones_stay_whole(tmp_path: Path) -> None:
    for k in range(200):
        (tmp_path / f"{k}.txt").write_text("short\n" * 50)
    (tmp_path / "big.txt").write_text("long line\n" * 10_000)
    names = [d.name for d in documents(text_config(tmp_path, [f"{tmp_path}/*.txt"]))]
    assert {f"{k}.txt" for k in range(200)} < set(names)
    assert sum(name.startswith("big.txt#") for name in names) > 3


@pytest.mark.parametrize("text", ["é😀" * 5000, "a\n" * 3000, "x" * 9999, "line of text\n" * 700 + "€" * 900, "", "€"])
@pytest.mark.parametrize("size", [1, 64, 1000])
def test_cut_keeps_all_text_and_every_character(text: str, size: int) -> None:
    pieces = list(cut(text.encode(), size))
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(size <= len(piece) <= 2 * size + 3 for piece in pieces[:-1])


def test_bom_is_stripped_and_files_count_once_unless_empty(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "text/a/bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "text/a/empty.txt").touch()
    again = text_config(tmp_path, [*config.files, f"{tmp_path}/text/a/*.txt"])
    found = documents(again)
    assert [d.data for d in found if d.name == "a/bom.txt"] == [b"marked"]
    assert len(found) == 31


def test_home_and_brackets_in_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes [1].txt").write_text("a line of notes\n" * 100)
    assert documents(text_config(tmp_path, ["~/notes [1].txt"]))[0].name == "notes [1].txt#0"


@pytest.mark.parametrize(
    ("make", "pattern", "message"),
    [
        (b"", "none/*.txt", r"data\.files: .*none/\*\.txt matches no file"),
        (b"", "missing.txt", r"data\.files: .*missing\.txt matches no file"),
        (b"", "", r"data\.files: .* is a folder; name its files, e\.g\. .*/\*\*/\*\.txt"),
        (b"", "file.txt", r"data\.files = .*file\.txt.*: 0 bytes of text are too few"),
        (b"one line\n", "file.txt", r"data\.files = .*file\.txt.*: 9 bytes of text are too few"),
        (b"one\ntwo\n" * 50 + b"\xff\n", "file.txt", r"data: .*file\.txt, line 101, byte 400: not UTF-8 \(invalid start byte\)"),
        (b"\xef\xbb\xbf" + b"a\n" * 200 + b"\xe2\x82", "file.txt", r"data: .*, line 201, byte 403: not UTF-8 \(unexpected end"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, make: bytes, pattern: str, message: str) -> None:
    (tmp_path / "file.txt").write_bytes(make)
    with pytest.raises(ConfigError, match=message) as error:
        prepare(text_config(tmp_path, [f"{tmp_path}/{pattern}"]))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


# Token files


def test_tokens_are_the_documents_each_with_its_eos(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_SEGMENT", 64)  # so that documents and calls are divided
    monkeypatch.setattr(build, "_CHUNK", 200)
    prepared = prepare(config)
    for split, text in prepared.splits.items():
        (file,) = text.sources
        mine = [d for d in documents(config) if d.split == split]
        expected = [[*d.data, prepared.tokenizer.eos_id] for d in mine]
        assert file.read(0, file.n_tokens).tolist() == sum(expected, [])
        assert [file.read(*file.document(i)).tolist() for i in range(len(mine))] == expected
        assert file.sections[0].dtype == "<u2"
        assert (text.n_tokens, text.n_documents) == (sum(map(len, expected)), len(mine))
        assert text.n_bytes == sum(len(d.data) for d in mine)
    assert len({file.fingerprint for file in prepared.splits.values()}) == 3


def test_a_bos_begins_each_document_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_SEGMENT", 64)
    plain, framed = tokens_of(config), tokens_of(text_config(tmp_path, config.files, add_bos=True))
    for split, ids in framed.items():
        assert [i for i in ids if i != ByteTokenizer.bos_id] == plain[split]
        ends = [-1, *(k for k, i in enumerate(ids) if i == ByteTokenizer.eos_id)]
        assert [k for k, i in enumerate(ids) if i == ByteTokenizer.bos_id] == [k + 1 for k in ends[:-1]]


def test_a_vocabulary_beyond_16_bits_takes_32(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = tokens_of(config)
    monkeypatch.setattr(ByteTokenizer, "n_vocab", 70_000)
    monkeypatch.setattr(ByteTokenizer, "eos_id", 69_999)
    monkeypatch.setattr(ByteTokenizer, "fingerprint", "wide")
    wide = prepare(config).splits["train"].sources[0]
    tokens = wide.read(0, wide.n_tokens)
    assert tokens.dtype == np.uint32 and tokens.max() == 69_999
    assert [257 if i == 69_999 else i for i in tokens.tolist()] == narrow["train"]


def test_a_tokenizer_that_leaves_its_vocabulary_is_refused(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "n_vocab", 257)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: it gave the ids 9 \.\.\. 257, outside its 257 ids"):
        prepare(config)
    assert list(Path(config.cache_dir).iterdir()) == []


def test_the_second_time_nothing_is_written(config: DataConfig) -> None:
    first = tokens_of(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.cache_dir).rglob("*")}
    assert tokens_of(config) == first
    assert {path: path.stat().st_mtime_ns for path in Path(config.cache_dir).rglob("*")} == before
    assert len(before) == 4


def test_changed_text_is_noticed(config: DataConfig, tmp_path: Path) -> None:
    before = tokens_of(config)
    (tmp_path / "text/a/1.txt").write_text("other")
    assert tokens_of(config) != before
    assert len(list(Path(config.cache_dir).iterdir())) == 2


@pytest.mark.parametrize("file", ["00000-of-00001.bin", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
def test_corruption_is_found_and_repaired(config: DataConfig, caplog: pytest.LogCaptureFixture, file: str, harm: str) -> None:
    good = tokens_of(config)
    path = only_entry(config) / file
    intact = path.read_bytes()
    at = intact.find(b'"documents": ') + 13 if file == "manifest.json" else len(intact) // 2
    corrupt = {
        "flip": intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :],
        "truncate": intact[:-2],
        "empty": b"",
        "remove": b"",
    }
    path.unlink() if harm == "remove" else path.write_bytes(corrupt[harm])
    assert tokens_of(config) == good
    assert path.read_bytes() == intact
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if file == "manifest.json" and harm == "remove":
        assert not lines  # the shards are there: a build that was killed just before its end looks the same
        return
    (line,) = lines
    assert "corrupt" in line and file in line
    assert ("bytes instead of" in line) == (file.endswith(".bin") and harm in ("truncate", "empty"))
    assert sorted(p.name for p in path.parent.iterdir()) == ["00000-of-00001.bin", "00000-of-00001.json", "manifest.json"]


@pytest.mark.parametrize("harm", ["metadata", "shard", "both"])
def test_shards_without_a_manifest_are_verified(config: DataConfig, harm: str) -> None:
    good = tokens_of(config)
    folder = only_entry(config)
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "manifest.json").unlink()
    for path in folder.iterdir():
        if harm == "both" or path.suffix == {"metadata": ".json", "shard": ".bin"}[harm]:
            path.write_bytes(path.read_bytes()[:-1])
    assert tokens_of(config) == good
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == intact


def test_scratch_files_of_a_killed_build_are_removed(config: DataConfig, tmp_path: Path) -> None:
    store = Store(config.cache_dir, config.cache_dir)
    mine = store.scratch("tokens-0/00000-of-00001")
    mine.write_bytes(b"half")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = mine.with_name(mine.name.replace(f"~{os.getpid()}~", f"~{ended.pid}~"))
    dead.write_bytes(b"half")
    folder = dead.with_name(dead.name + "0")
    folder.mkdir()
    assert tokens_of(config)
    assert mine.exists() and not dead.exists() and not folder.exists()


def test_cached_files_are_made_once_and_repaired(tmp_path: Path) -> None:
    calls = []

    def write(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        (folder / "file").write_text("contents")
        return {}

    store = Store(str(tmp_path / "cache"), str(tmp_path / "local"))
    (path,) = cache.cached_files(store, "kind", [1], ["file"], write)
    assert cache.cached_files(store, "kind", [1], ["file"], write) == [path] and path.read_text() == "contents"
    assert len(calls) == 1 and not calls[0].exists()
    path.write_text("contentz")
    assert cache.cached_files(store, "kind", [1], ["file"], write)[0].read_text() == "contents"
    assert len(calls) == 2
    assert cache.cached_files(store, "kind", [2], ["file"], write)[0] != path and len(calls) == 3


def test_processes_may_prepare_at_once(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"a line with the number {k}\n" for k in range(3000)))
    program = (
        "import sys; from mutransformer.config.schema import DataConfig; from mutransformer.data.cache.prepare import prepare\n"
        "c = DataConfig(source='text', files=[sys.argv[1]], cache_dir=sys.argv[2], vocab_size=300)\n"
        "sys.stdout.write(' '.join(f.fingerprint for f in prepare(c).splits.values()))"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "one.txt"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [(*process.communicate(timeout=60), process.returncode) for process in running]
    assert [code for *_, code in ended] == [0, 0, 0], ended
    assert len({out for out, *_ in ended}) == 1 and len(ended[0][0].split()) == 3
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "cache").iterdir()) == ["tokenizer", "tokens"]


def test_a_full_disk_is_one_line_and_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"^data\.cache_dir = .*cache: cannot write there: No space left on device$"):
            prepare(config)
    assert list(Path(config.cache_dir).iterdir()) == []
    assert prepare(config).splits["train"].n_tokens > 0


def test_a_cache_that_cannot_be_a_folder_is_one_line(config: DataConfig) -> None:
    Path(config.cache_dir).write_text("a file")
    with pytest.raises(ConfigError, match=r"^data\.cache_dir = .*cache: cannot write there: (Not a directory|File exists)$"):
        prepare(config)


def test_a_cache_may_be_a_file_url(config: DataConfig, tmp_path: Path) -> None:
    plain = tokens_of(config)
    assert tokens_of(replace(config, cache_dir=f"file://{tmp_path}/new/cache")) == plain
    assert list(tmp_path.glob("new/cache/tokens-*/manifest.json"))


# Dry run


def test_a_dry_run_says_what_is_in_the_cache(config: DataConfig, tmp_path: Path) -> None:
    given = text_config(tmp_path, config.files, tokenizer="sentencepiece", vocab_size=300)
    assert any(line.startswith("  1 shards to tokenize, ") and "cache" not in line for line in dry_run(given))
    assert not Path(given.cache_dir).exists()
    prepare(given)
    before = {path: path.stat().st_mtime_ns for path in Path(given.cache_dir).rglob("*")}
    assert "  0 shards to tokenize; 1 are in the cache" in dry_run(given)
    assert {path: path.stat().st_mtime_ns for path in Path(given.cache_dir).rglob("*")} == before


def test_a_dry_run_says_how_documents_are_held_out(config: DataConfig, tmp_path: Path) -> None:
    folder = f"{tmp_path}/text"
    own = text_config(tmp_path, [f"{folder}/a/*.txt"], validation_files=[f"{folder}/b/2.txt"], test_files=[f"{folder}/b/4.txt"])
    assert "  splits: the source's own" in dry_run(own)
    assert "  splits: by hash, validation 10.0000%, test 10.0000%" in dry_run(config)


# Tokens made elsewhere


def test_a_path_without_tokens_is_one_line(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(replace(config, tokenizer="sentencepiece", vocab_size=300))
    elsewhere = {"source": "tokens", "files": [], "tokenizer": "bytes"}
    with pytest.raises(ConfigError, match=r"^data\.path = .*tokenizer-\w+: not a folder of tokens: its manifest\.json lists"):
        prepare(replace(config, **elsewhere, path=str(only_entry(config, "tokenizer"))))
    prepare(replace(config, cache_dir=str(tmp_path / "other")))
    (made,) = (tmp_path / "other").glob("tokens-*")
    monkeypatch.chdir(tmp_path / "other")
    assert prepare(replace(config, **elsewhere, path=made.name)).splits["train"].n_tokens
    with pytest.raises(ConfigError, match=rf"^data\.path = /{made.name}: not a folder of tokens: "):
        prepare(replace(config, **elsewhere, path=f"/{made.name}"))


@pytest.mark.parametrize("made_with", [True, False])
def test_tokens_made_with_or_without_bos_differ(config: DataConfig, made_with: bool) -> None:
    prepare(replace(config, add_bos=made_with))
    folder = only_entry(config)
    elsewhere = replace(config, source="tokens", files=[], path=str(folder), add_bos=made_with)
    assert prepare(elsewhere).splits["train"].n_tokens
    with pytest.raises(ConfigError, match=rf"^data\.add_bos = {not made_with}: .* with data\.add_bos = {made_with}$"):
        prepare(replace(elsewhere, add_bos=not made_with))
    manifest = cache.from_json("", (folder / cache.MANIFEST).read_bytes())
    del manifest["add_bos"]  # as it was written before
    (folder / cache.MANIFEST).write_bytes(cache.to_json(manifest))
    assert prepare(replace(elsewhere, add_bos=not made_with)).splits["train"].n_tokens


def test_a_branch_is_pinned_to_its_commit_at_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, now = [], ["a" * 40]
    monkeypatch.setattr(hub, "latest_commit", lambda path, key, revision: (asked.append(revision), now[0])[1])
    store, given = Store(str(tmp_path), str(tmp_path)), DataConfig(source="hub", path="org/name", tokenizer="bytes")

    def version(revision: str | None) -> Any:
        config = preparation._pin_revisions(replace(given, revision=revision), store)
        (source,) = preparation._open_sources(config).values()
        assert config.revision in source.identity
        return config.revision

    assert [version("main"), version(None)] == ["a" * 40] * 2
    now[0] = "b" * 40
    assert [version("main"), version(None), version("v1"), version("c" * 40)] == ["a" * 40, "a" * 40, "b" * 40, "c" * 40]
    assert asked == ["main", None, "v1"]
