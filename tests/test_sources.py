"""Files of every kind to documents: the same text in whichever form it lies, and what is wrong with it, by file and line."""

import argparse
import gzip
import hashlib
import json
import logging
import os
import re
import runpy
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.registry import _registry
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hf import gpt2

from mutransformer.config.data import DataConfig, MixedSourceConfig, SourceConfig
from mutransformer.data.cache import build, dataset
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.cache.store import to_json
from mutransformer.data.sources import files, records
from mutransformer.data.sources import text as text_module
from mutransformer.data.sources.files import find
from mutransformer.data.sources.records import read_lines, read_rows
from mutransformer.data.sources.registry import SOURCES
from mutransformer.data.sources.source import SPLITS, Fractions, assign_splits, split_of
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer
from mutransformer.errors import ConfigError

TEXTS = [f"document {i}: " + "the quick brown fox — 😀\n" * (i % 5 + 1) for i in range(120)]
KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "arrows"]


def write(path: Path, texts: list[Any], column: str = "text") -> None:
    """Texts as a file of the kind that its suffix tells."""
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.partition(".")[2]
    match kind:
        case "jsonl":
            path.write_bytes(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.zst":
            path.write_bytes(zstandard.compress(lines))
        case _:
            table = pa.table({"id": range(len(texts)), column: pa.array(texts, pa.string())})
            if kind == "parquet":
                pq.write_table(table, path, row_group_size=17)
                return
            new = {"arrow": pa.ipc.new_file, "arrows": pa.ipc.new_stream}[kind]
            with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
                for batch in table.to_batches(max_chunksize=13):
                    writer.write_batch(batch)


def config(folder: Path, kind: str, pattern: str, **settings: Any) -> DataConfig:
    given: dict[str, Any] = {"source": "arrow" if kind == "arrows" else kind.partition(".")[0], "files": [str(folder / pattern)]}
    given |= {"tokenizer": "bytes", "cache_dir": str(folder / "cache"), "validation_fraction": 0.1, "test_fraction": 0.1}
    return DataConfig(**given | settings)


def texts_of(c: DataConfig) -> dict[str, list[str]]:
    """Every document of every split, read back from the tokens."""
    found = {}
    for split, text in prepare(c).splits.items():
        (tokens,) = text.sources
        found[split] = [bytes(tokens.read(*tokens.document(i))[:-1].astype("u1")).decode() for i in range(tokens.n_documents)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {split: [text for text in TEXTS if split_of(text.encode(), Fractions(0.1, 0.1)) == split] for split in SPLITS}
    assert all(len(texts) > 4 for texts in expected.values())
    write(tmp_path / f"a.{kind}", TEXTS[:50])
    write(tmp_path / f"b.{kind}", TEXTS[50:])
    assert texts_of(config(tmp_path, kind, f"*.{kind}")) == expected
    monkeypatch.setattr(records, "SHARD_BYTES", 700)  # so that files are cut in shards, within lines too
    again = config(tmp_path, kind, f"*.{kind}", cache_dir=str(tmp_path / "other"))
    assert texts_of(again) == expected
    n = len(list((tmp_path / "other").glob("tokens-*/*.bin")))
    assert n > 5 if kind in ("jsonl", "parquet") else n == 2


def test_lines_are_read_once_wherever_a_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, ["x" * (i % 7) for i in range(30)])
    file = find([str(path)], "key")[0]
    whole = [r.text for r in read_lines(file, "text", 0, file.size)]
    assert len(whole) == 30
    for cut in range(1, file.size):
        pieces = [read_lines(file, "text", 0, cut), read_lines(file, "text", cut, file.size)]
        assert [r.text for piece in pieces for r in piece] == whole


def test_split_of_a_text_is_decided_by_the_text_alone(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", TEXTS)
    write(tmp_path / "two.jsonl", TEXTS[::-1])
    one, two = (texts_of(config(tmp_path, "jsonl", name)) for name in ("one.jsonl", "two.jsonl"))
    assert {split: sorted(texts) for split, texts in one.items()} == {split: sorted(texts) for split, texts in two.items()}
    assert one != two


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_sources_own_splits_are_kept(kind: str, tmp_path: Path) -> None:
    own = {"train": TEXTS[:7], "validation": TEXTS[7:9], "test": TEXTS[9:10]}
    for split, texts in own.items():
        if kind == "text":
            for i, text in enumerate(texts):
                path = tmp_path / split / f"{i}.text"
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
        else:
            write(tmp_path / split / f"a.{kind}", texts)
    given: dict[str, Any] = {f"{split}_files": [f"{tmp_path}/{split}/*.{kind}"] for split in ("validation", "test")}
    assert texts_of(config(tmp_path, kind, f"train/*.{kind}", **given)) == own
    twice = given | {"test_files": [f"{tmp_path}/*t*/*.{kind}"]}  # of all three
    for pattern, settings, message in (
        (f"*/*.{kind}", given, rf"^data\.validation_files: .*/validation/\w+\.{kind} is also one of data\.files$"),
        (f"train/*.{kind}", twice, r"^data\.test_files: .* is also one of data\.\w*files$"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(config(tmp_path, kind, pattern, **settings))
    with pytest.raises(ConfigError, match=r"data\.validation_files, data\.test_files: give both, or neither"):
        config(tmp_path, kind, "train/*", validation_files=["a"])


def test_a_column_is_named_or_the_error_names_what_there_is(tmp_path: Path) -> None:
    for kind in KINDS:
        write(tmp_path / f"a.{kind}", TEXTS, column="content")
        found = texts_of(config(tmp_path, kind, f"a.{kind}", column="content"))
        assert sum(map(len, found.values())) == len(TEXTS)
        message = (
            r"a\.jsonl.*:1: no field 'text'; it has 'id', 'content'"
            if kind.startswith("jsonl")
            else r"data\.column = text: no such column; .*a\..* has 'id', 'content'"
        )
        with pytest.raises(ConfigError, match=message):
            prepare(config(tmp_path, kind, f"a.{kind}"))
    with pytest.raises(ConfigError, match=r"data\.column = id: holds int64, not text"):
        prepare(config(tmp_path, "parquet", "a.parquet", column="id"))


def test_a_column_of_any_type_of_text(tmp_path: Path) -> None:
    """A list of texts is none."""
    strings = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    for kind in [*strings, pa.list_(pa.string()), pa.dictionary(pa.int32(), pa.binary())]:
        table = pa.table({"text": pa.array([["a"]] if pa.types.is_list(kind) else ["a"], kind)})
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as opened, pa.ipc.new_file(opened, table.schema) as writer:
            writer.write_table(table)
        rows = read_rows(find([str(tmp_path / "a.arrow")], "key")[0], "text", "data.column")
        if kind in strings:
            assert [record.text for record in rows] == [b"a"]
        else:
            with pytest.raises(ConfigError, match=rf"data\.column = text: holds {re.escape(str(kind))}, not text; "):
                next(rows)


BAD_LINES = {
    b'{"text": "cut off': r"not JSON \(Unterminated string.*\)",
    b"no json at all": r"not JSON \(Expecting value.*\)",
    b'{"other": 1}': r"no field 'text'; it has 'other'",
    b"{}": r"no field 'text'; it has none",
    b"[1, 2]": r"a JSON array, not JSON lines; write one record a line",
    b'["cut off': r"a part of a JSON array, not JSON lines; write one record a line",
    b'{"text": "a"},': r"a part of a JSON array, not JSON lines; write one record a line",
    b"{": r"a JSON object over several lines, not JSON lines; write one record a line",
    b"12": r"a JSON int, not an object with the field 'text'",
    b'{"text": null}': r"'text' is null, not text",
    b'{"text": 7}': r"'text' is a int, not text",
    b'{"text": "\xff\xfe"}': r"not UTF-8 \(invalid start byte at byte 10\)",
    b'{"text": "\\ud800"}': r"not Unicode \(surrogates not allowed at character 0\)",
    b'{"text": ' + b"[" * 100_000: r"not JSON \(nested too deep\)",
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=[reason for reason in BAD_LINES.values()])
def test_bad_lines_are_reported_by_place_or_counted(
    line: bytes, reason: str, compressed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    data = b"\n".join([*good[:60], line, b"", *good[60:], line]) + b"\n"
    name = "a.jsonl.gz" if compressed else "a.jsonl"
    (tmp_path / name).write_bytes(gzip.compress(data) if compressed else data)
    with pytest.raises(ConfigError) as error:
        prepare(config(tmp_path, "jsonl", name))
    assert re.match(rf"^data: .*{re.escape(name)}:61: {reason}; data\.on_bad_record=skip skips bad records$", str(error.value))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("cache/*"))
    with caplog.at_level(logging.WARNING):
        found = texts_of(config(tmp_path, "jsonl", name, on_bad_record="skip"))
        assert texts_of(config(tmp_path, "jsonl", name, on_bad_record="skip")) == found  # from the cache
    assert sum(map(len, found.values())) == len(TEXTS)
    first, again = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.match(rf"^data: 2 of 122 records skipped, the first: .*{re.escape(name)}:61: {reason}$", first)
    assert again == first


def test_the_line_is_right_in_every_part_of_a_file(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * (i % 9)}) if i != 77 else "bad" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    file = find([str(tmp_path / "a.jsonl")], "key")[0]
    for size in (50, 333, 1000, file.size):
        found = [read_lines(file, "text", at, min(at + size, file.size)) for at in range(0, file.size, size)]
        bad = [record.place for lines in found for record in lines if record.text is None]
        assert bad == [f"{tmp_path}/a.jsonl:78"]


def test_bad_rows_of_tables_are_reported(tmp_path: Path) -> None:
    column = pa.array([*TEXTS[:20], None, *TEXTS[20:]], pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=6)
    with pytest.raises(ConfigError, match=r"data: .*a\.parquet, row 20: 'text' is null, not text"):
        prepare(config(tmp_path, "parquet", "a.parquet"))
    invalid = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")])
    pq.write_table(pa.table({"text": invalid}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"data: .*b\.parquet, row 1: not UTF-8 \(invalid start byte at byte 0\)"):
        prepare(config(tmp_path, "parquet", "b.parquet"))
    file = find([str(tmp_path / "a.parquet")], "key")[0]
    late = read_rows(file, "text", "data.column", (3,), 18)
    assert [r.place for r in late if r.text is None] == [f"{tmp_path}/a.parquet, row 20"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_that_are_truncated_or_of_another_kind(kind: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{kind}", TEXTS)
    whole = (tmp_path / f"a.{kind}").read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not such a file, but text of some length"):
        (tmp_path / f"a.{kind}").write_bytes(data)
        with pytest.raises(ConfigError, match=rf"a\.{kind}: not a complete {kind.capitalize()} file: ") as error:
            prepare(config(tmp_path, kind, f"a.{kind}"))
        assert "\n" not in str(error.value)
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        write(tmp_path / name, [str(hash(text)) * 300 for text in TEXTS])
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ConfigError, match=rf"data: .*{name}: cannot read it: |data: .*{name}:\d+: not JSON"):
            prepare(config(tmp_path, "jsonl", name))


@pytest.mark.parametrize("n", [1, 20_000])
def test_truncated_zstandard_files_are_errors(n: int, tmp_path: Path) -> None:
    """Cut off at any place, where a large one has given whole lines; frames one after another, also empty and to be skipped."""
    lines = [json.dumps({"text": hashlib.sha256(b"%d" % i).hexdigest()}).encode() + b"\n" for i in range(n)]
    path, frame = tmp_path / "a.jsonl.zst", zstandard.compress(b"".join(lines))

    def texts(data: bytes) -> list[bytes | None]:
        path.write_bytes(data)
        return [record.text for record in read_lines(find([str(path)], "key")[0], "text")]

    whole = [line[10:-3] for line in lines]
    assert texts(frame) == whole
    skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    assert texts(skipped + frame + zstandard.compress(b"") + frame + skipped) == whole * 2
    for kept in (0, 3, len(frame) // 2, len(frame) - 1):
        for before in (b"", frame) if kept else (b"",):
            with pytest.raises((EOFError, OSError), match="Truncated compressed stream|empty, not a Zstandard file"):
                texts(before + frame[:kept])


def test_odd_but_good_text_passes(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, NUL, a line of five megabytes, no line end at the end, blank lines, empty texts."""
    odd = ["first\0second", "x" * 5_000_000, "a\r\nb", "", "last"] + [f"filler {i}" for i in range(60)]
    body = b"\r\n".join(json.dumps({"text": text}).encode() for text in odd)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + body + b"\r\n\r\n" + json.dumps({"text": "no end"}).encode())
    found = texts_of(config(tmp_path, "jsonl", "a.jsonl"))
    assert sorted(sum(found.values(), [])) == sorted([*(text for text in odd if text), "no end"])


def test_text_files_that_are_not_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n")
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo \xe9t\xe9\n")
    with pytest.raises(ConfigError, match=r"data: .*bad\.txt, line 2, byte 8: not UTF-8 \(invalid continuation byte\)"):
        prepare(config(tmp_path, "text", "*.txt"))
    found = texts_of(config(tmp_path, "text", "*.txt", on_bad_record="skip"))
    assert sum(map(len, found.values())) == 40
    assert "1 of 41 records skipped, the first: " in caplog.text


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet"])
def test_urls_give_what_local_files_give(kind: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    if kind == "text":
        for i, text in enumerate(TEXTS):
            (tmp_path / f"{i}.text").write_text(text)
    else:
        write(tmp_path / f"a.{kind}", TEXTS)
    local = config(tmp_path, kind, f"*.{kind}")
    for path in tmp_path.glob(f"*.{kind}"):
        fs.pipe_file(f"/{tmp_path.name}/deep/{path.name}", path.read_bytes())
    url = config(
        tmp_path, kind, "", files=[f"memory://{tmp_path.name}/deep/*.{kind}"], cache_dir=str(tmp_path / "b"), tokenize_workers=1
    )
    assert texts_of(url) == texts_of(local)
    names = [file.name for file in find([f"memory://{tmp_path.name}/**/*.{kind}"], "key")]
    assert names == sorted(f"deep/{path.name}" for path in tmp_path.glob(f"*.{kind}"))
    with pytest.raises(ConfigError, match=r"data\.files: memory://none/\*\.x matches no file"):
        prepare(config(tmp_path, kind, "", files=["memory://none/*.x"]))
    with pytest.raises(ConfigError, match=r"data\.files: nosuch://bucket/a: "):
        prepare(config(tmp_path, kind, "", files=["nosuch://bucket/a"]))


@pytest.mark.parametrize("own", [False, True])
def test_no_document_is_longer_than_a_shard(own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the file; where none is, the shards are what they are without the limit."""
    text = b"".join(b"line %d\n" % i for i in range(30_000))
    given = {}
    for split in SPLITS:
        (tmp_path / f"{split}.text").write_bytes(text)
        given[f"{split}_files"] = [f"{tmp_path}/{split}.text"]
    files = given.pop("train_files")
    settings = SourceConfig(source="text", files=files, **given if own else {})

    def documents(limit: int) -> list[list[Any]]:
        monkeypatch.setattr(text_module, "SHARD_BYTES", limit)
        return [document for part in SOURCES["text"](settings, "data", Fractions(0.1, 0.1)) for document in part.identity]

    cut = documents(1000)
    assert max(stop - start for *_, start, stop in cut) <= 1000 and len(cut) < 3 * 1.3 * len(text) / 750
    for split in SPLITS if own else (None,):
        spans = [(start, stop) for _, of, _, start, stop in cut if split in (of, None)]
        assert b"".join(text[start:stop] for start, stop in spans) == text
    whole = documents(1 << 40)
    assert documents(-(-len(text) // 4) * 4) == whole


def test_a_shard_is_written_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever split its tokens are of, and what is to be tokenized is not all cut before the first is."""
    monkeypatch.setattr(dataset, "_BLOCK", 1 << 14)
    monkeypatch.setattr(dataset, "_BUFFER", 1 << 16)
    tokens, before = np.arange(1 << 14, dtype=np.uint16), set(tmp_path.iterdir())
    tracemalloc.start()
    with closing(dataset.ShardWriter(tmp_path / "shard", "<u2")) as writer:
        for _ in range(200):
            for split in SPLITS:
                writer.add(split, [tokens], len(tokens), ends=True)
        facts = writer.finish()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3 << 20 < tokens.nbytes * 200 and set(tmp_path.iterdir()) - before == {tmp_path / "shard"}
    found = dataset.open_shard(tmp_path / "shard", "<u2", facts)
    assert all((found[split].tokens(0, 200 << 14).reshape(200, -1) == tokens).all() for split in SPLITS)


def test_a_long_document_is_cut_as_it_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} word" * 2000}) + "\n" for i in range(9)))
    whole = texts_of(config(tmp_path, "jsonl", "a.jsonl"))
    ahead, most = 0, 0

    def cut(data: bytes, size: int) -> Iterator[bytes]:
        nonlocal ahead, most
        for piece in text_module.cut(data, size):
            ahead += 1
            most = max(most, ahead)
            yield piece

    def encode(self: ByteTokenizer, texts: list[str], threads: int) -> list[Any]:
        nonlocal ahead
        ahead -= len(texts)
        return encoded(self, texts, threads)

    encoded = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    for name, value in {"_SEGMENT": 100, "_CHUNK": 400, "cut": cut}.items():
        monkeypatch.setattr(build, name, value)
    assert texts_of(config(tmp_path, "jsonl", "a.jsonl", cache_dir=str(tmp_path / "other"), tokenize_workers=1)) == whole
    assert 0 < most < 20


class InBlocks(AbstractFileSystem):
    """Gives files as most stores do: in blocks. Notes how many bytes it was asked for."""

    protocol = "blocks"
    contents: dict[str, bytes] = {}
    fetched: list[int] = []

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = str(self._strip_protocol(path))
        if name.startswith("refused"):
            raise PermissionError("403, Forbidden")
        if name not in self.contents:
            raise FileNotFoundError(name)
        return {"name": name, "size": len(self.contents[name]), "type": "file"}

    def _open(self, path: str, *_: Any, **__: Any) -> Any:
        return Blocks(self, path, block_size=1 << 12)  # pyright: ignore[reportArgumentType]


class Blocks(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        InBlocks.fetched.append(end - start)
        return InBlocks.contents[self.path][start:end]


def test_lines_at_a_url_are_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry, "blocks", InBlocks)
    lines = [json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(10_000)]
    monkeypatch.setitem(InBlocks.contents, "a.jsonl", b"".join(lines))
    (file,) = find(["blocks://a.jsonl"], "key")
    for start in (0, file.size // 2):
        InBlocks.fetched.clear()
        texts = [record.text for record in read_lines(file, "text", start, file.size)]
        assert texts == [f"text {i}".encode() for i in range(10_000 - len(texts), 10_000)] and len(texts) > 4000
        assert sum(InBlocks.fetched) < 1.1 * (file.size - start)


class Web(InBlocks):
    """As fsspec's for HTTP, which takes whatever fails for a file that is not there."""

    protocol = "https"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        status = 200 if path in self.contents else 403 if "refused" in path else 404
        if status != 200:
            error = ValueError(f"{status}, message='...'")
            error.status = status  # pyright: ignore[reportAttributeAccessIssue]
            raise FileNotFoundError(path) from error
        return {"name": path, "size": len(self.contents[path]), "type": "file"}


def test_urls_that_fail_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there, what is refused, and URLs that are none of a file."""
    for name, store in {"blocks": InBlocks, "https": Web}.items():
        monkeypatch.setitem(_registry, name, store)
    for url, message in {
        "blocks://none.txt": "blocks://none.txt matches no file",
        "blocks://refused.txt": "cannot list blocks://refused.txt: 403, Forbidden",
        "https://host/none.txt": "https://host/none.txt matches no file",
        "https://host/refused.txt": "cannot list https://host/refused.txt: 403, message='...'",
        "zip://x.txt": "zip://x.txt: .+",
        f"zip://x.txt::{tmp_path}": rf"zip://x.txt::{tmp_path}: Is a directory",
        f"zip://x.txt::{tmp_path}/none.zip": rf"zip://x.txt::{tmp_path}/none.zip: No such file or directory",
        "dir://x.txt": "dir://x.txt: .+",
    }.items():
        with pytest.raises(ConfigError, match=f"^data.files: {message}$"):
            find([url], "data.files")


def test_the_suffix_of_a_file_decides_how_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name: not that of what a link leads to, nor the query of a URL; nor is the rest of a URL lost."""
    monkeypatch.setitem(_registry, "https", Web)
    lines = json.dumps({"text": "a text"}).encode()
    (tmp_path / "blobs").mkdir()
    for name, data in {"a.jsonl.gz": gzip.compress(lines), "b.jsonl.zst": zstandard.compress(lines), "c.jsonl": lines}.items():
        (tmp_path / "blobs" / f"{name[0]}0123").write_bytes(data)
        (tmp_path / name).symlink_to(f"blobs/{name[0]}0123")
        monkeypatch.setitem(InBlocks.contents, f"https://host/data/{name}?sig=a/b.gz", data)
        with zipfile.ZipFile(tmp_path / "all.zip", "a") as archive:
            archive.writestr(f"data/{name}", data)
    patterns = [f"{tmp_path}/*.json*", f"zip://data/*::{tmp_path}/all.zip", f"zip://data/c.jsonl::{tmp_path}/all.zip"]
    found = find([*patterns, *(url for url in InBlocks.contents if url.startswith("https"))], "key")
    names = ["a.jsonl.gz", "b.jsonl.zst", "c.jsonl"]
    assert sorted(file.name for file in found) == sorted([*names, *names, *(f"{name}?sig=a/b.gz" for name in names)])
    for file in found:
        assert [record.text for record in read_lines(file, "text")] == [b"a text"]


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_files_are_examined_in_parallel(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        write(tmp_path / f"{i}.parquet", TEXTS[:1]) if kind == "parquet" else (tmp_path / f"{i}.text").write_text("text")
    two, opened = threading.Barrier(2), files.File.open

    def meets(self: files.File) -> Any:
        two.wait(timeout=10)
        return opened(self)

    monkeypatch.setattr(files.File, "open", meets)
    settings = config(tmp_path, kind, f"*.{kind}")
    found = SOURCES[kind](settings, "data", Fractions(0.1, 0.1))
    names = [entry[0] for part in found for entry in (part.identity if kind == "text" else [part.identity])]
    assert names == [f"{i}.{kind}" for i in range(4)]


def test_the_bytes_of_a_name_decide_its_split() -> None:
    names = [os.fsdecode(name) for name in (b"\xe9.txt", b"a.txt", b"b.txt", "é.txt".encode())]
    place = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") for name in names]
    (validation,) = (k for k, split in enumerate(assign_splits(names, 1e-9, 1e-9)) if split == "validation")
    assert place[validation] == min(place)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows", "-1"], "--rows -1: must not be negative"),
        (["--batch", "-1"], "--batch -1: must not be negative"),
        (["--batch", str(1 << 70)], f"--batch {1 << 70}: so many batches are never drawn"),
    ],
)
def test_rows_that_cannot_be_shown(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    settings = ["data.source=jsonl", f"data.files=[{tmp_path}/a.jsonl]", f"data.cache_dir={tmp_path}", "data.tokenizer=bytes"]
    script = str(Path(__file__).parents[1] / "scripts/inspect_data.py")
    monkeypatch.setattr(sys, "argv", [script, *settings, "data.tokenize_workers=1", *given])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


@pytest.mark.parametrize(
    "settings",
    [
        [
            "data.source=hub",
            "data.path=a",
            "data.subset=b",
            "data.revision=c",
            "data.split=d",
            "data.column=e",
            "data.max_parts=1",
        ],
        ["data.source=text", "data.files=[a]", "data.validation_files=[b]", "data.test_files=[c]"],
        ["data.sources.a.source=hub", "data.sources.a.path=b"],
    ],
)
def test_the_benchmark_reads_its_own_text(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = runpy.run_path(str(Path(__file__).parents[1] / "scripts/benchmark_data.py"))["run"]
    seen: list[DataConfig] = []
    monkeypatch.setitem(run.__globals__, "write_text", lambda *_: ["own.jsonl"])
    monkeypatch.setitem(run.__globals__, "tokenize_text", lambda config, _: seen.append(config) or {})
    monkeypatch.setitem(run.__globals__, "load_batches", lambda *_: {})
    run(argparse.Namespace(settings=settings, megabytes=1, repeats=1, batches=1))
    assert seen[0].mixture == {"data": MixedSourceConfig(source="jsonl", files=["own.jsonl"])}


def test_sources_are_mixed_and_their_caches_shared(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    write(tmp_path / "b.parquet", [text.upper() for text in TEXTS])
    one: dict[str, Any] = {"source": "jsonl", "files": [f"{tmp_path}/a.jsonl"]}
    two: dict[str, Any] = {"source": "parquet", "files": [f"{tmp_path}/b.parquet"], "weight": 2.0}
    given: dict[str, Any] = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    mixed = prepare(DataConfig(sources={"low": MixedSourceConfig(**one), "high": MixedSourceConfig(**two)}, **given))
    train = mixed.splits["train"]
    assert [t.source for t in train.sources] == ["high", "low"] and train.weights == (2.0, 1.0)
    alone = prepare(DataConfig(**one, **given)).splits["train"]
    assert alone.sources[0].fingerprint == train.sources[1].fingerprint
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 2
    assert train.n_tokens == sum(t.n_tokens for t in train.sources) == len(train.first(10**9))
    bad: dict[str, Any] = {"low": MixedSourceConfig(**one), "high": MixedSourceConfig(**{**two, "column": "nothing"})}
    with pytest.raises(ConfigError, match=r"data\.sources\.high\.column = nothing: no such column"):
        prepare(DataConfig(sources=bad, **given))


def test_tokens_made_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    made = prepare(config(tmp_path, "jsonl", "a.jsonl"))
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    folder = folder.rename(tmp_path / "made")
    (tmp_path / "a.jsonl").unlink()
    given: dict[str, Any] = {"source": "tokens", "path": str(folder), "cache_dir": str(tmp_path / "unused")}
    again = prepare(DataConfig(**given, tokenizer="bytes"))
    for split in SPLITS:
        assert again.splits[split].fingerprint == made.splits[split].fingerprint
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ConfigError, match=r"data\.path = .*made: made with another tokenizer than data\.tokenizer = hf"):
        prepare(DataConfig(**given, tokenizer="hf", tokenizer_file=str(gpt2(tmp_path / "gpt2"))))
    data = bytearray((folder / "00000-of-00001.bin").read_bytes())
    data[100] ^= 4
    (folder / "00000-of-00001.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=r"data\.path = .*made: 1 of its 1 shards are corrupt or missing"):
        prepare(DataConfig(**given, tokenizer="bytes"))
    with pytest.raises(ConfigError, match=r"data\.path = .*nowhere: not a folder of tokens: manifest\.json: No such file"):
        prepare(DataConfig(**{**given, "path": str(tmp_path / "nowhere")}, tokenizer="bytes"))


def test_an_id_beyond_the_vocabulary_in_tokens_made_elsewhere(tmp_path: Path) -> None:
    """Whole by its hashes, and yet wrong: refused before any row is drawn, with shard, index and id."""
    write(tmp_path / "a.jsonl", TEXTS)
    (tokens,) = prepare(config(tmp_path, "jsonl", "a.jsonl")).splits["train"].sources
    path = tokens.sections[0].reader.path
    data = bytearray(path.read_bytes())
    data[2 * 123 : 2 * 124] = np.array([60_000], "<u2").tobytes()
    path.write_bytes(data)
    entry = json.loads((path.parent / "manifest.json").read_bytes())["entry"]
    entry["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (path.parent / "manifest.json").write_bytes(to_json(entry))
    with pytest.raises(ConfigError, match=r"00000-of-00001\.bin, train token 123: id 60000 is outside the vocabulary of 259"):
        prepare(DataConfig(source="tokens", path=str(path.parent), tokenizer="bytes"))
