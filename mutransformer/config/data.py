"""The settings of the data: where text comes from, how it becomes tokens, rows and batches. Part of config.py's tree."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, Optional

from mutransformer.errors import check, check_path

FILES = ("text", "jsonl", "parquet", "arrow")  # sources that read `files`


@dataclass(frozen=True)
class SourceConfig:
    """Documents. They are divided into train, validation and test by the source itself where it has all three, else by a hash."""

    # stdlib: the source code of Python's own library; text (a document a file), jsonl (a line; also .gz, .zst), parquet, arrow
    # (a row): `files`; hub: the Hugging Face data set `path`; tokens: the folder `path`, made by prepare_data.py elsewhere
    source: Literal["stdlib", "text", "jsonl", "parquet", "arrow", "hub", "tokens"] = "stdlib"  # where text comes from
    files: list[str] = field(default_factory=list)  # paths, globs or URLs (gs://, s3://, ...) for text, jsonl, parquet, arrow
    validation_files: list[str] = field(default_factory=list)  # likewise; with test_files they make `files` the train split
    test_files: list[str] = field(default_factory=list)
    column: str = "text"  # the field or column that holds the text
    path: Optional[str] = None  # hub: a data set's id, or a folder in the Hub's layout; tokens: a folder or URL
    subset: Optional[str] = None  # hub: the configuration of the data set, e.g. en
    split: str = "train"  # hub: what is divided by hash where the data set does not have train, validation and test
    revision: Optional[str] = None  # hub: a commit; a tag or branch, None: the main one, as it was when the cache first asked
    max_parts: Optional[int] = None  # only so many files (hub: shards) of each split, the first ones

    def check(self, at: str) -> None:
        """Raises ConfigError, naming the key below `at`, if the settings contradict each other."""
        reads_files, reads_path = self.source in FILES, self.source in ("hub", "tokens")
        check(
            not reads_files or bool(self.files),
            f"{at}.files is empty: {at}.source = {self.source} needs at least one file or glob",
        )
        given = [key for key in ("files", "validation_files", "test_files") if getattr(self, key)]
        check(reads_files or not given, f"{at}.{given[0] if given else ''} is set: it needs {at}.source={'|'.join(FILES)}")
        check(
            bool(self.validation_files) == bool(self.test_files),
            f"{at}.validation_files, {at}.test_files: give both, or neither for a split by hash",
        )
        check(not reads_path or bool(self.path), f"{at}.path is not set: {at}.source = {self.source} needs it")
        check(reads_path or self.path is None, f"{at}.path is set: it needs {at}.source=hub or tokens")
        for key in ("subset", "revision"):
            check(self.source == "hub" or getattr(self, key) is None, f"{at}.{key} is set: it needs {at}.source=hub")
        check(bool(self.column), f"{at}.column is empty: name the column that holds the text")
        check(self.max_parts is None or self.max_parts >= 1, f"{at}.max_parts = {self.max_parts}: must be at least 1")
        in_parts = (*FILES, "hub")
        check(
            self.source in in_parts or self.max_parts is None,
            f"{at}.max_parts is set: it needs {at}.source={'|'.join(in_parts)}",
        )
        for key in given:
            for pattern in getattr(self, key):
                check_path(f"{at}.{key}", pattern, urls=True)
        check_path(f"{at}.path", self.path or "", urls=True)


@dataclass(frozen=True)
class MixedSourceConfig(SourceConfig):
    weight: float = 1.0  # share of the rows, relative to the other sources'


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """What is trained on: documents, a tokenizer, and rows of seq_len tokens. One source, or several in `sources`."""

    sources: dict[str, MixedSourceConfig] = field(default_factory=dict)  # a mixture, by name, in place of the settings above
    tokenizer: Literal["sentencepiece", "bytes", "hf"] = "sentencepiece"
    tokenizer_file: Optional[str] = None  # a SentencePiece .model (None: one is trained on train); for hf a folder or a Hub id
    vocab_size: int = 4096  # pieces of the SentencePiece model that is trained
    eos_token: Optional[str] = None  # for hf: the token that ends a document; None: the one that the tokenizer names
    add_bos: bool = False  # also begin each document with the tokenizer's bos
    on_bad_record: Literal["error", "skip"] = "error"  # broken JSON, no such field, not UTF-8, ...: stop, or count and go on
    validation_fraction: float = 0.05  # of the documents, by a hash: of the name for stdlib and text, else of the text itself
    test_fraction: float = 0.05
    packing: Literal["concat", "pad"] = (
        "concat"  # cut from the documents joined by eos; or one document each, cut off or filled up
    )
    intra_document_mask: bool = False  # with packing=concat: neither attention nor loss from one document to the next
    truncated_eos: bool = False  # with packing=pad: the last token of a document that is cut off becomes an eos, as with T5
    seq_len: int = 256  # tokens a row
    batch_size: int = 16  # rows a step, over all devices and processes
    cache_dir: str = "~/.cache/mutransformer"  # tokenizers and tokens: a folder, or a URL that all hosts see (gs://, s3://, ...)
    local_dir: str = "~/.cache/mutransformer/local"  # copies of what lies at a URL
    tokenize_workers: Optional[int] = None  # that tokenise; None: one per core
    threads: int = 2  # that read ahead, in each process that does
    workers: int = 0  # processes that read ahead; 0: threads of the main process do
    prefetch: int = 8  # batches read ahead; 0: none, in the main thread

    def __post_init__(self) -> None:
        for key in ("batch_size", "threads"):
            check(getattr(self, key) >= 1, f"data.{key} = {getattr(self, key)}: must be at least 1")
        check(
            self.tokenize_workers is None or self.tokenize_workers >= 1,
            f"data.tokenize_workers = {self.tokenize_workers}: must be at least 1",
        )
        check(self.seq_len >= 2, f"data.seq_len = {self.seq_len}: must be at least 2")
        for key in ("prefetch", "workers"):
            check(getattr(self, key) >= 0, f"data.{key} = {getattr(self, key)}: must not be negative")
        check(self.vocab_size >= 300, f"data.vocab_size = {self.vocab_size}: must be at least 300 (256 bytes and some pieces)")
        for key in ("validation_fraction", "test_fraction"):
            check(0 < getattr(self, key) < 0.5, f"data.{key} = {getattr(self, key)}: must lie between 0 and 0.5")
        check(not self.truncated_eos or self.packing == "pad", "data.truncated_eos = true: it needs data.packing=pad")
        check(
            not self.intra_document_mask or self.packing == "concat",
            "data.intra_document_mask = true: it needs data.packing=concat; a row of pad holds one document",
        )
        for name, source in self.sources.items():
            check(
                re.fullmatch(r"[\w-]+", name) is not None,
                f"data.sources.{name}: a source's name must be of letters, digits, _ and -",
            )
            check(0 < source.weight < math.inf, f"data.sources.{name}.weight = {source.weight}: must be positive and finite")
            source.check(f"data.sources.{name}")
        if self.sources:
            alone = SourceConfig()
            set_too = [key for key in SourceConfig.__dataclass_fields__ if getattr(self, key) != getattr(alone, key)]
            check(not set_too, f"data.{''.join(set_too[:1])} is set: with data.sources put it below a source's name")
        else:
            self.check("data")
        check_path("data.cache_dir", self.cache_dir, urls=True)
        check_path("data.local_dir", self.local_dir)
        check(self.tokenizer != "hf" or bool(self.tokenizer_file), "data.tokenizer_file is not set: data.tokenizer = hf needs it")
        check(
            self.tokenizer_file is None or self.tokenizer != "bytes",
            "data.tokenizer_file is set: it needs data.tokenizer=sentencepiece or hf",
        )
        check(self.eos_token is None or self.tokenizer == "hf", "data.eos_token is set: it needs data.tokenizer=hf")
        check_path("data.tokenizer_file", self.tokenizer_file or "")

    @property
    def mixture(self) -> dict[str, MixedSourceConfig]:
        """The sources by name, in the order of their names; a single one is called "data"."""
        if self.sources:
            return dict(sorted(self.sources.items()))
        plain = {key: getattr(self, key) for key in SourceConfig.__dataclass_fields__}
        return {"data": MixedSourceConfig(**plain)}

    def key(self, name: str) -> str:
        """Where the settings of a source of the mixture stand."""
        return f"data.sources.{name}" if self.sources else "data"
