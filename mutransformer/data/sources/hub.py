"""The Hugging Face Hub: data sets in shards, tokenizers, and what went wrong with either in one line.

Nothing is run that was downloaded, nobody is asked anything, and HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they mean to
Hugging Face's own libraries. Those read a token from the environment; this code looks at it only to keep it out of messages.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from mutransformer.config.data import SourceConfig
from mutransformer.data.cache.store import describe, first_line
from mutransformer.data.sources.readers import SPLITS, Part, Record, Split, encoded
from mutransformer.errors import ConfigError, check


@dataclass(frozen=True)
class HubPart:
    """A shard of a data set, streamed."""

    shard: Any  # a datasets.IterableDataset
    index: int
    path: str
    column: str
    split: Optional[Split]
    key: str  # of the source's settings
    remote: bool
    size: int = 0  # not known

    @property
    def place(self) -> str:
        return f"{self.path}, {self.split or 'split'} shard {self.index}"

    def identity(self) -> list[Any]:
        return [self.index, self.column, self.split]

    def records(self) -> Iterator[Record]:
        shard, names = self.shard, self.shard.column_names
        if names is not None:  # known before a row is read; a broken image beside the text is then not looked at
            self._check(names)
            shard = shard.select_columns([self.column])
        for row, fields in enumerate(shard):
            self._check(fields)
            yield encoded(f"{self.place}, row {row}", self.column, fields[self.column], self.split)

    def _check(self, names: Collection[str]) -> None:
        if self.column not in names:
            raise ConfigError(f"{self.key}.column = {self.column}: no such column; {self.path} has {', '.join(names)}")


def newest_commit(path: str, key: str, revision: str | None = None) -> str:
    """The commit that a branch or tag of a data set is at, None for its main branch.

    Raises:
        ConfigError: the Hub does not tell.
    """
    import huggingface_hub

    with told(f"{key}.path = {path}"):
        commit = huggingface_hub.HfApi().dataset_info(path, revision=revision).sha
    assert commit is not None, "the Hub gave no commit"
    return commit


def is_folder(path: str) -> bool:
    return Path(path).expanduser().is_dir()


def identity(config: SourceConfig) -> list[Any]:
    """What decides the records of a data set, known without asking the Hub: its commit, or the files of the folder."""
    assert config.path is not None
    version: Any = config.revision
    if is_folder(config.path):
        files = sorted(p for p in Path(config.path).expanduser().rglob("*") if p.is_file())
        version = [[str(p.relative_to(Path(config.path).expanduser())), describe(p)] for p in files]
    name = None if is_folder(config.path) else config.path
    return ["hub", name, config.subset, version, config.split, config.column, config.max_parts]


def parts(config: SourceConfig, key: str) -> list[Part]:
    """The shards of a data set: of all three splits if it has them, else of config.split, to be divided by hash.

    Raises:
        ConfigError: there is no such data set, subset, split or revision, or the Hub cannot be reached.
    """
    path, folder = config.path or "", is_folder(config.path or "")
    datasets = _datasets(key)
    given: dict[str, Any] = {"path": str(Path(path).expanduser()) if folder else path, "name": config.subset, "streaming": True}
    if not folder:
        given["revision"] = config.revision
    with told(f"{key}.path = {path}"):
        loaded = datasets.load_dataset(**given)
    own = set(SPLITS) <= set(loaded)
    check(own or config.split in loaded, f"{key}.split = {config.split}: {path} has the splits {', '.join(loaded)}")
    found: list[Part] = []
    for split in SPLITS if own else (config.split,):
        dataset = loaded[split]
        n = dataset.num_shards
        for i in range(min(n, config.max_parts or n)):
            shard = dataset.shard(num_shards=n, index=i)
            found.append(HubPart(shard, i, path, config.column, _split(split) if own else None, key, remote=not folder))
    return found


def _split(name: str) -> Split:
    return next(split for split in SPLITS if split == name)


def _datasets(key: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{key}.source = hub: needs datasets: pip install 'mutransformer[hf]'") from None
    datasets.disable_progress_bars()
    return datasets


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns what the Hub's libraries raise into a ConfigError that begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they raise errors of many packages, and ValueError among them
        raise ConfigError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """One line, without a token."""
    text, seen = first_line(error), error
    while seen is not None:  # the cause is often more telling than what was made of it
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if status == 429:
            text = "the Hub asks to come back later (429: too many requests)"
        elif status in (401, 403):
            text = f"the Hub refuses access ({status}): a private or gated one needs HF_TOKEN in the environment"
        elif status == 404:
            text = "the Hub has none of that name (404); a private one needs HF_TOKEN in the environment"
        elif type(seen).__name__ == "OfflineModeIsEnabled":
            text = "HF_HUB_OFFLINE is set, and it is not in the cache"
        elif type(seen).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError", "NameResolutionError"):
            text = f"the Hub cannot be reached: {first_line(seen)}"
        seen = seen.__cause__ or seen.__context__
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token, "***")
    return text
