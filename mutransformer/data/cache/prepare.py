"""What a run trains and is evaluated on: its tokenizer, and the tokens of its sources, from the cache or made now."""

import logging
import os
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from mutransformer.config.data import DataConfig, MixedSourceConfig
from mutransformer.data.cache import build
from mutransformer.data.cache import store as cache
from mutransformer.data.cache.build import Host
from mutransformer.data.cache.shards import Tokens, dtype_for, first_outside, join, sections
from mutransformer.data.cache.store import MANIFEST, Damaged, Store, seal, unseal
from mutransformer.data.cache.tokenize_shard import Job
from mutransformer.data.sources import hub
from mutransformer.data.sources.readers import SPLITS, Part, Split
from mutransformer.data.sources.registry import Source, open_source
from mutransformer.data.sources.splits import shares_of
from mutransformer.data.tokenizers.registry import open_tokenizer, training_texts
from mutransformer.data.tokenizers.sentencepiece import Tokenizer, train_sentencepiece
from mutransformer.errors import ConfigError, check

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mixture:
    """A split: that of each source, in the order of their names."""

    split: Split
    sources: tuple[Tokens, ...]
    weights: tuple[float, ...]  # of the sources' rows in training

    @property
    def n_tokens(self) -> int:
        return sum(tokens.n_tokens for tokens in self.sources)

    @property
    def n_documents(self) -> int:
        return sum(tokens.n_documents for tokens in self.sources)

    @property
    def n_bytes(self) -> int:
        return sum(tokens.n_bytes for tokens in self.sources)

    @property
    def fingerprint(self) -> str:
        """Of the tokens, and where there are several sources of their names and weights."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return cache.digest([[t.source, w, t.fingerprint] for t, w in zip(self.sources, self.weights, strict=True)])

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.sources[0].tokenizer_fingerprint

    def first(self, n: int) -> Integer[np.ndarray, " m"]:
        """The first n tokens, or what there is, of the sources one after another."""
        parts = []
        for tokens in self.sources:
            parts.append(tokens.read(0, n))
            n -= len(parts[-1])
        return np.concatenate(parts)


@dataclass(frozen=True)
class Corpus:
    """What a run trains and is evaluated on."""

    tokenizer: Tokenizer
    splits: dict[Split, Mixture]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of all that a process trains on: another process with the same has the same tokens."""
        return {"tokenizer": self.tokenizer.fingerprint} | {split: text.fingerprint for split, text in self.splits.items()}


def prepare(config: DataConfig, n_process: int = 1, process: int = 0) -> Corpus:
    """The tokenizer and the tokens for config, from data.cache_dir or put there.

    Any number of processes may call it at once; those of one job share the work if they say which they are. Reads all local text
    each time, to notice a change, and all tokens, to notice damage.

    Args:
        config: of the data.
        n_process: hosts of the job.
        process: the index of this one.

    Raises:
        ConfigError: something is wrong with the sources, the tokenizer, its size, or the cache.
    """
    host, store = Host(n_process, process), Store(config.cache_dir, config.local_dir)
    sources = {name: _source(config, name, store, host) for name in config.mixture}
    tokenizer = open_tokenizer(config, store, host, [s for s in sources.values() if s])
    opened = {
        name: _made_elsewhere(config, name, tokenizer)
        if source is None
        else _tokens(config, name, source, tokenizer, store, host)
        for name, source in sources.items()
    }
    weights = tuple(source.weight for source in config.mixture.values())
    return Corpus(tokenizer, {split: Mixture(split, tuple(t[split] for t in opened.values()), weights) for split in SPLITS})


def prepare_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a config, from data.cache_dir or put there. Tokenizes no text.

    Raises:
        ConfigError: as prepare().
    """
    store = Store(config.cache_dir, config.local_dir)
    sources = [source for name in config.mixture if (source := _source(config, name, store, Host()))]
    return open_tokenizer(config, store, Host(), sources)


def train_tokenizer(config: DataConfig, path: Path) -> None:
    """Trains a SentencePiece model of data.vocab_size pieces on the train splits, and writes it to path.

    Raises:
        ConfigError: something is wrong with the sources or the vocabulary's size.
        OSError: path cannot be written.
    """
    store = Store(config.cache_dir, config.local_dir)
    sources = [source for name in config.mixture if (source := _source(config, name, store, Host()))]
    train_sentencepiece(training_texts(config, sources), config.vocab_size, path)


def plan(config: DataConfig) -> list[str]:
    """Lines that tell what prepare() would do, without doing it but for reading what there is.

    Raises:
        ConfigError: as prepare().
    """
    store, lines = Store(config.cache_dir, config.local_dir, read_only=True), []
    sources = {name: _source(config, name, store, Host(), pin=False) for name in config.mixture}
    trained = config.tokenizer == "sentencepiece" and config.tokenizer_file is None
    what = f"trained here, {config.vocab_size} pieces" if trained else config.tokenizer_file or ""
    lines.append(f"tokenizer: {config.tokenizer} {what}".rstrip())
    try:
        tokenizer = open_tokenizer(config, store, Host(), [source for source in sources.values() if source])
    except Damaged:
        tokenizer = None  # it is still to be made, and so are all tokens
    for name, source in sources.items():
        settings = config.mixture[name] if source is None else source.config
        told = {key: getattr(settings, key) for key in ("path", "subset", "revision", "files", "max_parts", "column")}
        lines.append(f"{config.key(name)}: {settings.source} " + ", ".join(f"{k} {v}" for k, v in told.items() if v))
        if source is not None:
            parts = source.parts()
            done = _job(config, name, source, tokenizer, store, parts).done() if tokenizer else set()
            size = sum(part.size for i, part in enumerate(parts) if i not in done)
            own = bool(settings.validation_files) or (bool(parts) and isinstance(getattr(parts[0], "split", None), str))
            lines.append(f"  {len(parts) - len(done)} shards to tokenise" + (f", {size:,} bytes of text" if size else ""))
            if done:
                lines[-1] += f"; {len(done)} are in the cache"
            lines.append("  splits: the source's own" if own else f"  splits: by hash, {_percent(config)}")
    lines.append(f"cache: {config.cache_dir}, copies in {config.local_dir}" if store.remote else f"cache: {config.cache_dir}")
    lines.append(f"rows: {config.packing} of {config.seq_len} tokens; {config.tokenize_workers or _cores()} processes")
    return lines


def _percent(config: DataConfig) -> str:
    return f"validation {config.validation_fraction:.4%}, test {config.test_fraction:.4%}"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _source(config: DataConfig, name: str, store: Store, host: Host, pin: bool = True) -> Source | None:
    """None for tokens made elsewhere. pin: the commit that a data set's branch or tag is at is written down."""
    settings, key = config.mixture[name], config.key(name)
    if settings.source == "tokens":
        return None
    commit = re.fullmatch("[0-9a-f]{40}", settings.revision or "")
    if settings.source == "hub" and not commit and not hub.is_folder(settings.path or ""):
        settings = replace(settings, revision=_pinned(settings, key, store, host, pin))
    return open_source(settings, key, shares_of(config))


def _pinned(settings: MixedSourceConfig, key: str, store: Store, host: Host, pin: bool) -> str:
    """The commit of a data set that this cache holds on to, so that a run never changes its data and needs no network later."""
    assert settings.path is not None
    of = [settings.path] if settings.revision is None else [settings.path, settings.revision]
    name = f"pins/{cache.name_of(of)}.json"
    host.after_first(lambda: store.read(name) is not None)
    try:
        return unseal(name, store.read(name))["commit"]
    except Damaged:
        commit = hub.newest_commit(settings.path, key, settings.revision)
        if pin:
            store.write(name, seal({"path": settings.path, "revision": settings.revision, "commit": commit}))
        return commit


def _folder(config: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    decides = [source.identity, tokenizer.fingerprint, config.add_bos, *shares_of(config), config.on_bad_record]
    return f"tokens-{cache.name_of(decides)}"


def _job(config: DataConfig, name: str, source: Source, tokenizer: Tokenizer, store: Store, parts: list[Part]) -> Job:
    folder, shares = _folder(config, source, tokenizer), shares_of(config)
    return Job(store, folder, config.key(name), len(parts), tokenizer, config.add_bos, shares, config.on_bad_record)


def _tokens(config: DataConfig, name: str, source: Source, tokenizer: Tokenizer, store: Store, host: Host) -> dict[Split, Tokens]:
    folder, listed, damaged = _folder(config, source, tokenizer), list[Part](), set[int]()
    for _ in range(3):
        manifest = _manifest(store, folder)
        if manifest is None or damaged:
            listed = listed or source.parts()
            job = _job(config, name, source, tokenizer, store, listed)
            manifest = build.build(job, listed, damaged, config.tokenize_workers or _cores(), host.n_process, host.process)
            manifest |= {
                "source": config.mixture[name].source,
                "identity": cache.digest(source.identity),
                "tokenizer": tokenizer.fingerprint,
                "add_bos": config.add_bos,
                "n_vocab": tokenizer.n_vocab,
                "dtype": dtype_for(tokenizer.n_vocab),
            }
            store.write(f"{folder}/{MANIFEST}", seal(manifest))
        tokens, damaged = _open(store, folder, name, manifest, tokenizer.eos_id)
        if not damaged:
            return tokens
    raise ConfigError(f"data.cache_dir = {store.root}: what was just written there, {folder}, is damaged")


def _manifest(store: Store, folder: str) -> dict[str, Any] | None:
    data = store.read(f"{folder}/{MANIFEST}")
    try:
        return None if data is None and not store.names(folder) else unseal(MANIFEST, data)
    except Damaged as error:
        if data is not None:
            _log.warning("the cache %s/%s is damaged and is built again: %s", store.root, folder, error)
        return None


def _open(store: Store, folder: str, name: str, manifest: dict[str, Any], eos_id: int) -> tuple[dict[Split, Tokens], set[int]]:
    """The tokens in a folder; and which of its shards are damaged, of which the first is told of."""
    shards: list[dict[str, Any]] = manifest["shards"]

    def fetch(shard: dict[str, Any]) -> Path | Damaged:
        try:
            return store.fetch(f"{folder}/{shard['file']}", shard["bytes"], shard["sha256"])
        except Damaged as error:
            return error

    with ThreadPoolExecutor(4) as pool:  # hashing and copying leave Python
        fetched = list(pool.map(fetch, shards))
    damaged = {i: found for i, found in enumerate(fetched) if isinstance(found, Damaged)}
    if damaged:
        first = next(iter(damaged.values()))
        _log.warning("the cache %s/%s is damaged and is built again: %s", store.root, folder, first)
        return {}, set(damaged)
    paths = [path for path in fetched if isinstance(path, Path)]
    _allow_open_files(len(paths))
    opened = [sections(path, manifest["dtype"], shard["splits"]) for path, shard in zip(paths, shards, strict=True)]
    tokens: dict[Split, Tokens] = {
        split: Tokens(
            source=name,
            split=split,
            sections=tuple(shard[split] for shard in opened),
            n_bytes=sum(shard["splits"][split]["bytes"] for shard in shards),
            fingerprint=join([shard["splits"][split]["sha256"] for shard in shards]),
            tokenizer_fingerprint=manifest["tokenizer"],
            eos_id=eos_id,
        )
        for split in SPLITS
    }
    return tokens, set()


def _allow_open_files(more: int) -> None:
    """Raises the soft limit where many shards would reach it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + more + 256 if os.path.isdir("/proc/self/fd") else more + 1024
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted, hard))


def _made_elsewhere(config: DataConfig, name: str, tokenizer: Tokenizer) -> dict[Split, Tokens]:
    """The tokens in a folder that the settings name; every id is looked at."""
    path, key = config.mixture[name].path or "", f"{config.key(name)}.path"
    root, _, folder = path.rstrip("/").rpartition("/")
    store = Store(root or ("/" if path.startswith("/") else "."), config.local_dir)
    try:
        manifest = unseal(MANIFEST, store.read(f"{folder}/{MANIFEST}"))
    except Damaged as error:
        raise ConfigError(f"{key} = {path}: not a folder of tokens: {error}") from None
    check({"tokenizer", "shards"} <= set(manifest), f"{key} = {path}: not a folder of tokens: its {MANIFEST} tells of none")
    check(
        manifest["tokenizer"] == tokenizer.fingerprint,
        f"{key} = {path}: made with another tokenizer than data.tokenizer = {config.tokenizer} "
        f"({manifest['n_vocab']} ids, fingerprint {manifest['tokenizer'][:8]} and not {tokenizer.fingerprint[:8]})",
    )
    bos = manifest.get("add_bos", config.add_bos)  # older ones do not tell
    check(bos == config.add_bos, f"data.add_bos = {config.add_bos}: {key} = {path} was made with data.add_bos = {bos}")
    tokens, damaged = _open(store, folder, name, manifest, tokenizer.eos_id)
    check(not damaged, f"{key} = {path}: {len(damaged)} of its shards are damaged or missing; copy or make them again")
    for split in SPLITS:
        for section in tokens[split].sections:
            if found := first_outside(section, tokenizer.n_vocab):
                where = f"{section.reader.path}, {split} token {found[0]}"
                raise ConfigError(f"{key}: {where}: id {found[1]} is outside the vocabulary of {tokenizer.n_vocab}")
    return tokens
