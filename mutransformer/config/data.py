"""Settings of the data: where text comes from, and how it becomes tokens, rows and batches."""

import re
from dataclasses import dataclass, fields
from typing import Literal, Optional

from mutransformer.config.setting import check_settings, setting
from mutransformer.errors import check

FILES = ("text", "jsonl", "parquet", "arrow")  # sources that read `files`
# The sources that a key applies to.
NEEDED = {"files": FILES, "validation_files": FILES, "test_files": FILES, "max_parts": (*FILES, "hub")}
NEEDED |= {"path": ("hub", "tokens"), "subset": ("hub",), "revision": ("hub",)}


@dataclass(frozen=True)
class FilesConfig:
    """Files of documents, read as one text."""

    source: Literal["text", "jsonl", "parquet", "arrow"] = setting(
        "text", "text: a document per file of `files`; jsonl: per line (also .gz, .zst); parquet, arrow: per row"
    )
    files: list[str] = setting(list, "paths, globs or URLs (gs://, s3://, ...)", path="url")
    column: str = setting("text", "the field or column that holds the text")
    max_parts: Optional[int] = setting(None, "use only the first files, this many", min=1)

    def check(self, at: str) -> None:
        """Raises ConfigError, naming the key below `at`, if a setting is out of bounds."""
        check_settings(self, f"{at}.")
        check(bool(self.files), f"{at}.files is empty: name at least one file or glob")
        check(bool(self.column), f"{at}.column is empty: name the column that holds the text")


@dataclass(frozen=True)
class SourceConfig(FilesConfig):
    """A source of documents. Without train, validation and test splits of its own it is divided into them by a hash."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "arrow", "hub", "tokens"] = setting(  # pyright: ignore[reportIncompatibleVariableOverride]  # wider, and never assigned
        "stdlib",
        "where text comes from. stdlib: the source code of Python's standard library; text: a document per file of `files`; "
        "jsonl: per line (also .gz, .zst); parquet, arrow: per row; hub: the Hugging Face data set `path`; tokens: the folder "
        "`path`, which prepare-data has written",
    )
    files: list[str] = setting(list, "paths, globs or URLs (gs://, s3://, ...) for text, jsonl, parquet, arrow", path="url")
    validation_files: list[str] = setting(list, "likewise; with test_files they make `files` the train split", path="url")
    test_files: list[str] = setting(list, "likewise", path="url")
    column: str = setting("text", "the field or column that holds the text")
    path: Optional[str] = setting(
        None, "hub: a data set's id or a folder in the Hub's layout; tokens: a folder or URL", path="url"
    )
    subset: Optional[str] = setting(None, "hub: the configuration of the data set, e.g. en")
    split: str = setting("train", "hub: the split to divide by hash if the data set lacks train, validation or test")
    revision: Optional[str] = setting(None, "hub: a commit, tag or branch, pinned to its commit at first use; null: main")
    max_parts: Optional[int] = setting(None, "use only the first files (hub: shards) of each split, this many", min=1)

    def check(self, at: str) -> None:
        """Raises ConfigError, naming the key below `at`, if a setting is out of bounds or contradicts another."""
        check_settings(self, f"{at}.")
        for key, sources in NEEDED.items():
            unset = getattr(self, key) in (None, [])
            check(unset or self.source in sources, f"{at}.{key} is set: it needs {at}.source={'|'.join(sources)}")
        needs = f"{at}.source = {self.source} needs"
        check(bool(self.files) or self.source not in FILES, f"{at}.files is empty: {needs} at least one file or glob")
        check(bool(self.path) or self.source not in NEEDED["path"], f"{at}.path is not set: {needs} it")
        both = f"{at}.validation_files, {at}.test_files: give both, or neither for a split by hash"
        check(bool(self.validation_files) == bool(self.test_files), both)
        check(bool(self.column), f"{at}.column is empty: name the column that holds the text")


@dataclass(frozen=True)
class MixedSourceConfig(SourceConfig):
    """One source of a mixture."""

    weight: float = setting(1.0, "share of the rows, relative to the other sources' weights", above=0)


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Documents, a tokenizer, and rows of seq_len tokens. One source, or several in `sources`."""

    sources: dict[str, MixedSourceConfig] = setting(dict, "a mixture of sources by name, instead of the settings above")
    tokenizer: Literal["sentencepiece", "bytes", "hf"] = setting("sentencepiece", "the tokenizer")
    tokenizer_file: Optional[str] = setting(
        None, "a SentencePiece .model (null: one is trained); hf: a folder or Hub id", path="local"
    )
    vocab_size: int = setting(4096, "pieces of the SentencePiece model that is trained: 256 bytes and some pieces", min=300)
    eos_token: Optional[str] = setting(None, "hf: the token that ends a document; null: the one that the tokenizer names")
    add_bos: bool = setting(False, "also begin each document with the tokenizer's bos")
    on_bad_record: Literal["error", "skip"] = setting("error", "invalid JSON, no such field, not UTF-8: stop, or count and go on")
    validation_fraction: float = setting(0.05, "of documents, by a hash of name (stdlib, text) or text", above=0, below=0.5)
    test_fraction: float = setting(0.05, "likewise", above=0, below=0.5)
    packing: Literal["concat", "pad"] = setting(
        "concat", "rows are cut from documents joined by eos; pad: one document per row, truncated or padded", resume="fixed"
    )
    intra_document_mask: bool = setting(False, "packing=concat: no attention or loss across documents", resume="fixed")
    truncated_eos: bool = setting(False, "packing=pad: a truncated document's last token becomes eos (T5)", resume="fixed")
    seq_len: int = setting(256, "tokens per row", min=2, resume="fixed")
    batch_size: int = setting(16, "rows per step, over all devices and processes", min=1, resume="fixed")
    cache_dir: str = setting("~/.cache/mutransformer", "tokenizers and tokens: a folder, or a URL all hosts reach", path="url")
    cache_is_shared: bool = setting(True, "all processes of the run see the same cache_dir; false: each fills its own")
    local_dir: str = setting("~/.cache/mutransformer/local", "local copies of what is read from a URL", path="local")
    tokenize_workers: Optional[int] = setting(None, "processes that tokenize; null: one per core", min=1, max=1024)
    threads: int = setting(2, "threads that read ahead, in each process that reads ahead", min=1, max=1024)
    workers: int = setting(0, "processes that read ahead; 0: threads of the main process", min=0, max=1024)
    prefetch: int = setting(8, "batches read ahead; 0: none, the main thread reads", min=0, max=10_000)

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        for key, packing in (("truncated_eos", "pad"), ("intra_document_mask", "concat")):
            check(not getattr(self, key) or self.packing == packing, f"data.{key} = true: it needs data.packing={packing}")
        for name, source in self.sources.items():
            valid = re.fullmatch(r"[\w-]+", name) is not None
            check(valid, f"data.sources.{name}: a source's name must consist of letters, digits, _ and -")
            source.check(f"data.sources.{name}")
        if self.sources:
            unset = SourceConfig()
            set_too = [field.name for field in fields(unset) if getattr(self, field.name) != getattr(unset, field.name)]
            check(not set_too, f"data.{''.join(set_too[:1])} is set: with data.sources put it below a source's name")
        else:
            self.check("data")
        file, tokenizer = self.tokenizer_file, self.tokenizer
        check(tokenizer != "hf" or bool(file), "data.tokenizer_file is not set: data.tokenizer = hf needs it")
        check(file is None or tokenizer != "bytes", "data.tokenizer_file is set: it needs data.tokenizer=sentencepiece or hf")
        check(self.eos_token is None or tokenizer == "hf", "data.eos_token is set: it needs data.tokenizer=hf")

    @property
    def mixture(self) -> dict[str, MixedSourceConfig]:
        """The sources by name, in the order of their names; a single one is called "data"."""
        if self.sources:
            return dict(sorted(self.sources.items()))
        return {"data": MixedSourceConfig(**{field.name: getattr(self, field.name) for field in fields(SourceConfig)})}

    def key(self, name: str) -> str:
        """The key of a source of the mixture: data, or data.sources.NAME."""
        return f"data.sources.{name}" if self.sources else "data"
