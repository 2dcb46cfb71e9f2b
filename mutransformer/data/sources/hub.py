"""The Hugging Face Hub: data sets in shards, and its errors as one line.

No downloaded code is run and no question is asked. HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT have the meaning that Hugging Face's
libraries give them. Those read a token from the environment; this code reads it only to keep it out of messages.
"""

import os
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mutransformer.config.data import SourceConfig
from mutransformer.data.cache.store import checksum
from mutransformer.data.sources.source import SPLITS, Record, SourceShard, Split, text_record
from mutransformer.errors import ConfigError, check, first_line, translate_errors


def latest_commit(path: str, key: str, revision: str | None = None) -> str:
    """The present commit of a branch or tag of a data set; of its main branch if revision is None.

    Raises ConfigError if the Hub cannot be reached, or has no such data set or revision.
    """
    import huggingface_hub

    with translate_errors(f"{key}.path = {path}", describe=describe_error):
        commit = huggingface_hub.HfApi().dataset_info(path, revision=revision).sha
    assert commit is not None, "the Hub gave no commit"
    return commit


def local_folder(path: str) -> Path | None:
    """The folder in the Hub's layout that a path names; None if it is the id of a data set."""
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else None


def identity(config: SourceConfig) -> list[Any]:
    """What determines the records of a data set, known without a request to the Hub: its commit, or the files of the folder."""
    assert config.path is not None
    which: list[Any] = [config.path, config.subset, config.revision]
    if root := local_folder(config.path):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        which = [None, config.subset, [[str(path.relative_to(root)), checksum(path)] for path in files]]
    return ["hub", *which, config.split, config.column, config.max_parts]


def hub_shards(config: SourceConfig, key: str) -> Iterator[SourceShard]:
    """The shards of a data set: of all three splits if it has them, else of config.split, to be divided by a hash.

    Raises ConfigError if there is no such data set, subset, split or revision, or the Hub cannot be reached.
    """
    path, folder = config.path or "", local_folder(config.path or "")
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{key}.source = hub: needs datasets: pip install 'mutransformer[hf]'") from None
    datasets.disable_progress_bars()
    revision = None if folder else config.revision
    renamed = "rename the folder, or name its files with data.source=jsonl or parquet"
    readable = folder is None or "[" not in str(folder.resolve())
    check(readable, f"{key}.path = {path}: the library datasets takes a [ for a pattern; {renamed}")
    with translate_errors(f"{key}.path = {path}", describe=describe_error):
        loaded: Any = datasets.load_dataset(str(folder or path), config.subset, revision=revision, streaming=True)
    own = set(SPLITS) <= set(loaded)
    check(own or config.split in loaded, f"{key}.split = {config.split}: {path} has the splits {', '.join(loaded)}")
    names: list[tuple[str, Split | None]] = [(split, split) for split in SPLITS] if own else [(config.split, None)]
    for name, split in names:
        n = loaded[name].num_shards
        for i in range(min(n, config.max_parts or n)):
            place = f"{path}, {split or 'split'} shard {i}"
            records = partial(_read, loaded[name].shard(num_shards=n, index=i), place, config, key)
            yield SourceShard(place, not folder, 0, [i, config.column, split], records, split)


def _read(shard: Any, place: str, config: SourceConfig, key: str) -> Iterator[Record]:
    """The records of a datasets.IterableDataset, streamed."""

    def check_column(names: Collection[str]) -> None:
        if config.column not in names:
            raise ConfigError(f"{key}.column = {config.column}: no such column; {config.path} has {', '.join(names)}")

    if shard.column_names is not None:  # known before a row is read; other columns, such as a broken image, are then not decoded
        check_column(shard.column_names)
        shard = shard.select_columns([config.column])
    for row, fields in enumerate(shard):
        check_column(fields)
        yield text_record(f"{place}, row {row}", config.column, fields[config.column])


def describe_error(error: BaseException) -> str:
    """What an error of the Hub's libraries means, in one line and without the access token."""
    text, cause = first_line(error), error
    while cause is not None:  # a cause further down is often more specific
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 429:
            text = "rate-limited by the Hub (429: too many requests); try again later"
        elif status in (401, 403):
            text = f"the Hub refuses access ({status}): a private or gated repository needs HF_TOKEN in the environment"
        elif status == 404:
            text = "not found on the Hub (404); a private repository needs HF_TOKEN in the environment"
        elif type(cause).__name__ == "OfflineModeIsEnabled":
            text = "HF_HUB_OFFLINE is set, and it is not in the cache"
        elif type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError", "NameResolutionError"):
            text = f"the Hub cannot be reached: {first_line(cause)}"
        cause = cause.__cause__ or cause.__context__
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token, "***")
    return text
