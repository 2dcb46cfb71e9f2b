"""Text that is lost on its way to tokens: counted, said at each start, and an error where nothing is left."""

import bz2
import gzip
import io
import json
import logging
import lzma
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers
import zstandard
from hf import FAMILIES, gpt2
from tokenizers import models, normalizers, pre_tokenizers

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.cache.store import from_json, to_json
from mutransformer.data.sources.formats import format_of
from mutransformer.data.tokenizers.round_trip import RoundTrip
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer, SentencePieceTokenizer
from mutransformer.errors import ConfigError

TEXTS = [f"Document {i}:\nthe quick brown fox jumps over {i * i} lazy dogs\n" for i in range(200)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]


def config(folder: Path, files: str, source: Any = "jsonl", **settings: Any) -> DataConfig:
    given: dict[str, Any] = {
        "source": source,
        "files": [f"{folder}/{files}"],
        "tokenizer": "bytes",
        "cache_dir": f"{folder}/cache",
        "on_bad_record": "skip",
    }
    return DataConfig(**given | settings)


def said(c: DataConfig, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What two starts say that is the same, the second one from the cache."""
    both = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            prepare(c)
        lines = [record.getMessage() for record in caplog.records]
        both.append([line for line in lines if not re.match(r"(data: )?(tokeniz|training a)", line)])
    first, again = both
    assert again and again == first, "a start from the cache says something else"
    return again


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", data)
    return buffer.getvalue()


def tarred(data: bytes) -> bytes:
    buffer, member = io.BytesIO(), tarfile.TarInfo("a.jsonl")
    member.size = len(data)
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def parquet(data: bytes) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [data.decode()]}), buffer)
    return buffer.getvalue()


FORMATS = {
    "gzip": gzip.compress,
    "Zstandard": zstandard.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": zipped,
    "tar": tarred,
    "Parquet": parquet,
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_a_name_that_hides_the_format_is_an_error(kind: str, source: str, tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.data").write_bytes(b"".join(LINES))
    (tmp_path / "x.data").write_bytes(FORMATS[kind](b"".join(LINES)))
    with pytest.raises(ConfigError, match=rf"^data\.files: .*/x\.data: holds {kind} data, not text; \w+"):
        prepare(config(tmp_path, "*.data", source))


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32", "UTF-32-LE", "UTF-32-BE"])
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_text_that_is_not_utf_8_is_an_error(encoding: str, source: str, tmp_path: Path) -> None:
    """Without a byte-order mark it is valid UTF-8, half of it NULs, and would be trained on."""
    for i in range(9):
        (tmp_path / f"{i}.data").write_bytes(b"".join(LINES))
    (tmp_path / "x.data").write_bytes(b"".join(LINES).decode().encode(encoding))
    with pytest.raises(ConfigError, match=rf"^data\.files: .*/x\.data: holds {encoding[:6]} text, not UTF-8; convert it$"):
        prepare(config(tmp_path, "*.data", source))


def test_compressed_files_that_are_damaged_are_errors(tmp_path: Path) -> None:
    """Whatever is to be done with bad records: nobody knows how many are lost."""
    whole, name = gzip.compress(b"".join(LINES)), "d.jsonl.gz"
    for data in (whole[: len(whole) // 2], whole[:-8] + bytes(8), whole + b"something else", whole[:1]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"^data: .*/{re.escape(name)}: cannot read it: "):
            prepare(config(tmp_path, name))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(tarred(b"".join(LINES))))
    with pytest.raises(ConfigError, match=r"/d\.jsonl\.gz: holds tar data, not text; unpack it$"):
        prepare(config(tmp_path, name))


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst"])
@pytest.mark.parametrize("data", [b"".join(LINES), bz2.compress(b"".join(LINES))], ids=["plain", "bzip2"])
def test_a_name_that_claims_a_format_is_an_error(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"/{name}: its name ends as that of a (gzip|Zstandard) file, but it holds .* data"):
        prepare(config(tmp_path, name))


def test_compressed_twice_and_tables_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(gzip.compress(b"".join(LINES))))
    with pytest.raises(ConfigError, match=r"d\.jsonl\.gz: holds gzip data, not text; decompress it"):
        prepare(config(tmp_path, "d.jsonl.gz"))
    (tmp_path / "d.parquet").write_bytes(gzip.compress(b"".join(LINES)))
    with pytest.raises(ConfigError, match=r"d\.parquet: holds gzip data, not Parquet; decompress it"):
        prepare(config(tmp_path, "d.parquet", "parquet"))
    with pytest.raises(ConfigError, match=r"d\.parquet: holds gzip data, not Arrow; decompress it"):
        prepare(config(tmp_path, "d.parquet", "arrow"))


def test_ordinary_text_has_no_format() -> None:
    heads = [b"BZh is a word", b"PAR1 and more", b"PK", b"P*M", b"7z", "é\u2581".encode(), b"", b"\xef\xbb\xbf{", b"ARROW1: a"]
    heads += [b"\0" * 264, b"a\0b\0", b"a" * 257 + b"ustar", b"\n" * 264]
    assert [format_of(head) for head in heads] == [None] * len(heads)


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        ([b'{"text": ""}\n'] * 1000, r"1,000 records read, 1,000 empty, 0 skipped"),
        ([b"no json\n"] * 20, r"20 records read, 0 empty, 20 skipped \(the first: .*d\.jsonl:1: not JSON \(.*\)\)"),
        ([b'{"text": ""}\n', b'{"body": "a"}\n'], r"2 records read, 1 empty, 1 skipped \(the first: .*:2: no field 'text'; .*\)"),
        ([b"\n"] * 9, r"0 records read, 0 empty, 0 skipped"),
        ([], r"0 records read, 0 empty, 0 skipped"),
    ],
    ids=["empty", "bad", "both", "blank", "nothing"],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_nothing_left_is_an_error(lines: list[bytes], counts: str, tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"".join(lines))
    purpose = "" if tokenizer == "bytes" else " to train a tokenizer on"
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"^data: no text is left{purpose}: {counts}$"):
            prepare(config(tmp_path, "d.jsonl", tokenizer=tokenizer))


def test_a_train_split_of_bad_records_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"bad\n" * 5)
    (tmp_path / "held.jsonl").write_bytes(b"".join(LINES[:5]))
    (tmp_path / "out.jsonl").write_bytes(b"".join(LINES[5:]))
    own: dict[str, Any] = {"validation_files": [f"{tmp_path}/held.jsonl"], "test_files": [f"{tmp_path}/out.jsonl"]}
    with pytest.raises(
        ConfigError, match=r"^data: no text is left to train on: 205 records read, 0 empty, 5 skipped \(the first"
    ):
        prepare(config(tmp_path, "train.jsonl", **own))


def test_counts_are_said_at_each_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"".join(LINES) + b'{"text": ""}\n' * 2 + b"bad\n" * 3)
    counts, skipped = said(config(tmp_path, "d.jsonl"), caplog)
    assert re.match(r"data: 205 records read, 2 empty, 3 skipped; 200 documents, [\d,]+ tokens, 0 unknown$", counts)
    assert re.match(r"data: 3 of 205 records skipped, the first: .*/d\.jsonl:203: not JSON \(.*\)$", skipped)


@pytest.mark.parametrize("array", ["indented", "of lines", "in one line"])
def test_an_array_is_not_json_lines(array: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"text": text} for text in TEXTS]
    lines = "[" + ",\n".join(json.dumps(record) for record in records) + "]"
    data = {"indented": json.dumps(records, indent=1), "of lines": lines, "in one line": json.dumps(records)}[array]
    (tmp_path / "array.jsonl").write_text(data)
    (tmp_path / "good.jsonl").write_bytes(b"".join(LINES))
    _, skipped = said(config(tmp_path, "*.jsonl"), caplog)
    assert re.search(r"the first: .*/array\.jsonl:1: a .*JSON array, not JSON lines; write one record a line$", skipped)


@pytest.mark.parametrize("end", [b"", b"\r", b" "])
def test_records_in_one_line_are_said(end: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One bad record by its line, and in truth all of the file: the reason must tell."""
    (tmp_path / "one.jsonl").write_bytes(b"".join(LINES).replace(b"\n", end))
    (tmp_path / "good.jsonl").write_bytes(b"".join(LINES))
    _, skipped = said(config(tmp_path, "*.jsonl"), caplog)
    assert re.search(r"/one\.jsonl:1: more than one JSON value in a line, the second at .*; write one record a line$", skipped)


def test_files_without_a_record_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "full.jsonl").write_bytes(b"".join(LINES))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "ends.jsonl").write_bytes(b"\r\n" * 9)
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "none.jsonl.gz").write_bytes(gzip.compress(b"\n"))
    _, files = said(config(tmp_path, "*.jsonl*"), caplog)
    assert files == f"data: 4 of 5 files hold no record, the first: {tmp_path}/empty.jsonl"
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "full.parquet")
    pq.ParquetWriter(tmp_path / "empty.parquet", pa.schema({"text": pa.string()})).close()  # without a row group
    text = "data.files: 1 of 2 files are empty, the first: "
    assert said(config(tmp_path, "*.parquet", "parquet"), caplog)[0] == f"{text}{tmp_path}/empty.parquet"
    (tmp_path / "full.txt").write_text("a line\n" * 400)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    assert said(config(tmp_path, "*.txt", "text"), caplog)[0] == f"{text}{tmp_path}/bom.txt"


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.nulls(3), r"b\.parquet, row 0: 'text' is null, not text"),
        (pa.array([1, 2, 3]), r"data\.column = text: holds int64, not text; .*b\.parquet has 'text'"),
        (pa.array([["a"], ["b"], ["c"]]), r"data\.column = text: holds list<.*>, not text; .*b\.parquet has 'text'"),
        (None, r"data\.column = text: no such column; .*b\.parquet has 'other'"),
    ],
    ids=["null", "int", "list", "none"],
)
def test_a_part_without_text_in_its_column(column: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"other": [1, 2, 3]} if column is None else {"text": column}), tmp_path / "b.parquet")
    _, skipped = said(config(tmp_path, "*.parquet", "parquet"), caplog)
    assert re.match(rf"data: 3 of 203 records skipped, the first: .*{reason}$", skipped)
    with pytest.raises(ConfigError, match=reason):
        prepare(config(tmp_path, "*.parquet", "parquet", on_bad_record="error", cache_dir=f"{tmp_path}/other"))


def model(folder: Path, **settings: Any) -> str:
    """A SentencePiece model of the library's defaults, but for these settings."""
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter("".join(TEXTS).splitlines()),
        model_prefix=f"{folder}/given",
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 400, "model_type": "bpe"} | settings,
    )
    return f"{folder}/given.model"


@pytest.mark.parametrize(
    ("settings", "texts", "message"),
    [
        ({}, TEXTS, r"3\.35% of the characters of a sample are lost, 'Document 0:\\nthe quick b' comes back as 'Document 0: the"),
        (
            {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
            ["the 中文 brown fox"] * 200,
            r"12\.50% of the characters .* '.* unknown$",
        ),
        (
            {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False},
            ["The Fox"] * 200,
            r"28\.57% of the char.*'the",
        ),
    ],
    ids=["line breaks", "other scripts", "case"],
)
def test_what_sentencepiece_loses_is_said(
    settings: dict[str, Any], texts: list[str], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = config(tmp_path, "d.jsonl", tokenizer="sentencepiece", tokenizer_file=model(tmp_path, **settings))
    _, lost = said(given, caplog)
    assert re.match(rf"data: the tokenizer does not give its text back: {message}", lost), lost


def lossy(kind: str, folder: Path) -> Path:
    if kind == "lowercase":
        gpt2(folder)
        changed = json.loads((folder / "tokenizer.json").read_text())
        changed["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        return folder
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "</s>", "the", "quick", "fox"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [("lowercase", r"1\.67% of the .* 'Document 0:\\n' comes back as 'document 0:\\n'$"), ("words", r".* tokens are unknown$")],
)
def test_what_a_tokenizer_of_hugging_face_loses_is_said(
    kind: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"".join(LINES))
    _, lost = said(config(tmp_path, "d.jsonl", tokenizer="hf", tokenizer_file=str(lossy(kind, tmp_path / "hf"))), caplog)
    assert re.match(rf"data: the tokenizer does not give its text back: {message}", lost), lost


@pytest.mark.parametrize("kind", ["trained", "dummy prefix", "bytes", "gpt2"])
def test_a_tokenizer_that_loses_nothing_is_not_warned_of(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [*TEXTS, " leading", "two  spaces", "\u2581", "中文 😀 e\u0301", "x\r\n\ty\0z", "wörd " * 20_000]
    texts = TEXTS if kind == "dummy prefix" else texts
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings: dict[str, Any] = {"tokenizer": "sentencepiece", "vocab_size": 400}
    if kind == "bytes":
        settings = {}
    elif kind == "dummy prefix":
        identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
        settings["tokenizer_file"] = model(tmp_path, **identity)
    elif kind != "trained":
        settings = {"tokenizer": "hf", "tokenizer_file": str(FAMILIES[kind](tmp_path / "hf"))}
    (counts,) = said(config(tmp_path, "d.jsonl", **settings), caplog)
    assert counts.startswith(f"data: {len(texts)} records read, 0 empty, 0 skipped; ") and counts.endswith(" 0 unknown")


def test_much_text_is_sampled(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(Path(model(tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False)))
    sample, text = RoundTrip(tokenizer), "the quick brown fox " * 5000
    (ids,) = tokenizer.encode([text])
    for _ in range(40):
        sample.add(text, ids)
    compared = sample.facts()["compared"]
    assert 1 << 18 <= compared < 1 << 19
    exact = RoundTrip(ByteTokenizer())
    exact.add(text, ids)
    assert exact.facts() == {"compared": 0}


def test_a_cache_without_counts_stays_valid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As it was written before there were counts."""
    (tmp_path / "d.jsonl").write_bytes(b"".join(LINES) + b"bad\n")
    made = prepare(config(tmp_path, "d.jsonl"))
    (manifest,) = tmp_path.glob("cache/tokens-*/manifest.json")
    entry = from_json("manifest.json", manifest.read_bytes())
    entry["shards"] = [
        {name: shard[name] for name in ("splits", "skipped", "first_skipped", "file", "bytes", "sha256")}
        for shard in entry["shards"]
    ]
    manifest.write_bytes(to_json(entry))
    (skipped,) = said(config(tmp_path, "d.jsonl"), caplog)
    assert re.match(r"data: 1 records skipped, the first: .*:201: not JSON", skipped)
    assert prepare(config(tmp_path, "d.jsonl")).fingerprints == made.fingerprints
    assert from_json("manifest.json", manifest.read_bytes()) == entry, "it was built again"
