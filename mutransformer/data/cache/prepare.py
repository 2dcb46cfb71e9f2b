"""The data of a run: opens its sources and its tokenizer, and takes its tokens from the cache or puts them there."""

import logging
import os
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

from mutransformer.config.data import DataConfig, FilesConfig, MixedSourceConfig
from mutransformer.data.cache.build import NOT_SHARED, TokenShards, build, collect
from mutransformer.data.cache.dataset import Corpus, TokenDataset, TokenSplit, combine_checksums, dtype_for, open_shard
from mutransformer.data.cache.store import MANIFEST, Corrupt, Store, cache_key, digest, from_json
from mutransformer.data.cache.summary import check_text_is_left, report
from mutransformer.data.sources import hub
from mutransformer.data.sources.files import map_parallel
from mutransformer.data.sources.registry import open_source
from mutransformer.data.sources.source import SPLITS, Source, Split, held_out_fractions
from mutransformer.data.tokenizers.registry import open_tokenizer, train_sentencepiece, training_texts
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import REDACTED, check, redact, translate_errors
from mutransformer.sharding.processes import SINGLE_PROCESS, Processes

_log = logging.getLogger(__name__)


def prepare(config: DataConfig, processes: Processes = SINGLE_PROCESS) -> Corpus:
    """The tokenizer and the tokens for config, from data.cache_dir or put there.

    Reads all local text each time, to notice a change, and all tokens, to notice corruption. Several runs may call it at once.
    All processes of a run call it; they share the work unless data.cache_is_shared is false.

    Raises ConfigError if the sources, the tokenizer, its size, or the cache cannot be used.
    """
    if not config.cache_is_shared:
        processes = SINGLE_PROCESS
    store = _store(config)
    with processes.first_in_process_0("the commits of data sets"):
        config = _pin_revisions(config, store)
    sources = _open_sources(config)
    with processes.first_in_process_0("the tokenizer"):
        tokenizer = open_tokenizer(config, store, list(sources.values()))
    opened = [
        _tokens(config, name, config.mixture[name].source, sources[name], tokenizer, store, processes)
        if name in sources
        else _tokens_made_elsewhere(config, name, tokenizer, processes.index)
        for name in config.mixture
    ]
    weights = tuple(source.weight for source in config.mixture.values())
    return Corpus(tokenizer, {split: TokenSplit(split, tuple(tokens[split] for tokens in opened), weights) for split in SPLITS})


def prepare_files(
    config: DataConfig, name: str, files: FilesConfig, tokenizer: Tokenizer, processes: Processes = SINGLE_PROCESS
) -> TokenSplit:
    """The tokens of all text of eval.sets.NAME as one split, from data.cache_dir or put there. All processes of a run call it.

    Raises ConfigError if the files, or the cache, cannot be used.
    """
    key, store = f"eval.sets.{name}", _store(config)
    check(
        REDACTED not in str(files.files), f"{key}.files: lacks a secret, which a run does not save; give it again as an override"
    )
    source = open_source(files, key, held_out_fractions(config))
    found = _tokens(config, name, files.source, source, tokenizer, store, processes if config.cache_is_shared else SINGLE_PROCESS)
    return TokenSplit("validation", (found["validation"],), (1.0,))


def prepare_tokenizer(config: DataConfig, processes: Processes = SINGLE_PROCESS) -> Tokenizer:
    """The tokenizer for config, from data.cache_dir or put there. Tokenizes nothing. Raises ConfigError as prepare() does."""
    store = _store(config)
    with processes.first_in_process_0("the tokenizer"):
        config = _pin_revisions(config, store)
        return open_tokenizer(config, store, list(_open_sources(config).values()))


def train_tokenizer(config: DataConfig, path: Path) -> None:
    """Trains a SentencePiece model of data.vocab_size pieces on the train splits, and writes it to path.

    Raises:
        ConfigError: the sources cannot be used, or the size of the vocabulary does not fit them.
        OSError: path cannot be written.
    """
    config = _pin_revisions(config, _store(config))
    train_sentencepiece(training_texts(config, list(_open_sources(config).values())), config.vocab_size, path)


def dry_run(config: DataConfig) -> list[str]:
    """Lines that describe what prepare() would do. Reads what prepare() would read first, and writes nothing.

    Raises ConfigError as prepare() does.
    """
    store = _store(config, read_only=True)
    config = _pin_revisions(config, store)
    sources = _open_sources(config)
    trained = config.tokenizer == "sentencepiece" and config.tokenizer_file is None
    what = f"trained here, {config.vocab_size} pieces" if trained else config.tokenizer_file or ""
    lines = [f"tokenizer: {config.tokenizer} {what}".rstrip()]
    try:
        tokenizer = open_tokenizer(config, store, list(sources.values()))
    except Corrupt:
        tokenizer = None  # not made yet, and so are all tokens
    for name, c in config.mixture.items():
        shown = {key: getattr(c, key) for key in ("path", "subset", "revision", "files", "max_parts", "column")}
        lines.append(f"{config.key(name)}: {c.source} " + ", ".join(f"{key} {value}" for key, value in shown.items() if value))
        if source := sources.get(name):
            shards = source.shards()
            done = _token_shards(config, source, tokenizer, store, len(shards)).present() if tokenizer else set[int]()
            size = sum(shard.size for i, shard in enumerate(shards) if i not in done)
            lines.append(f"  {len(shards) - len(done)} shards to tokenize" + (f", {size:,} bytes of text" if size else ""))
            if done:
                lines[-1] += f"; {len(done)} are in the cache"
            own = bool(c.validation_files) or (bool(shards) and shards[0].split is not None)
            hashed = f"by hash, validation {config.validation_fraction:.4%}, test {config.test_fraction:.4%}"
            lines.append("  splits: " + ("the source's own" if own else hashed))
    lines.append(f"cache: {config.cache_dir}" + (f", copies in {config.local_dir}" if store.remote else ""))
    lines.append(f"rows: {config.packing} of {config.seq_len} tokens; {_n_workers(config)} processes")
    return redact(lines)


def _store(config: DataConfig, read_only: bool = False) -> Store:
    """The cache. Raises ConfigError if a secret is missing in the settings, since they were read from a run's folder."""
    keys = ("path", "files", "validation_files", "test_files", "column")
    texts = {f"{config.key(name)}.{key}": getattr(one, key) for name, one in config.mixture.items() for key in keys}
    for key, value in ({"data.cache_dir": config.cache_dir} | texts).items():
        check(REDACTED not in str(value), f"{key}: lacks a secret, which a run does not save; give {key} again as an override")
    return Store(config.cache_dir, config.local_dir, read_only)


def _n_workers(config: DataConfig) -> int:
    return config.tokenize_workers or len(os.sched_getaffinity(0))


def _pin_revisions(config: DataConfig, store: Store) -> DataConfig:
    """The config with, for a branch or tag of a Hub data set, the commit that this cache is pinned to.

    The cache keeps the commit of the first use, so that a run never changes its data and needs no network later.
    """

    def pinned(settings: MixedSourceConfig, key: str) -> MixedSourceConfig:
        path, commit = settings.path or "", re.fullmatch("[0-9a-f]{40}", settings.revision or "")
        if settings.source != "hub" or commit or hub.local_folder(path):
            return settings
        name = f"pins/{cache_key([path] if settings.revision is None else [path, settings.revision])}.json"
        try:
            pin = store.read_json(name)
        except Corrupt:
            commit = hub.latest_commit(path, key, settings.revision)
            pin = {"path": path, "revision": settings.revision, "commit": commit}
            if not store.read_only:
                store.write_json(name, pin)
        return replace(settings, revision=pin["commit"])

    mixture = {name: pinned(settings, config.key(name)) for name, settings in config.mixture.items()}
    return replace(config, sources=mixture) if config.sources else replace(config, revision=mixture["data"].revision)


def _open_sources(config: DataConfig) -> dict[str, Source]:
    """The sources by name, except tokens made elsewhere."""
    fractions = held_out_fractions(config)
    mixture = config.mixture.items()
    return {name: open_source(one, config.key(name), fractions) for name, one in mixture if one.source != "tokens"}


def _token_shards(config: DataConfig, source: Source, tokenizer: Tokenizer, store: Store, n_shards: int) -> TokenShards:
    fractions = held_out_fractions(config)
    key = cache_key([source.identity, tokenizer.fingerprint, config.add_bos, *fractions, config.on_bad_record])
    return TokenShards(store, f"tokens-{key}", source.key, n_shards, tokenizer, config)


def _tokens(
    config: DataConfig, name: str, kind: str, source: Source, tokenizer: Tokenizer, store: Store, processes: Processes
) -> dict[Split, TokenDataset]:
    """The tokens of a source, made if they are missing or corrupt.

    Whatever a process finds, it passes the same three barriers, so that none waits for one that is already done.
    """
    target = _token_shards(config, source, tokenizer, store, n_shards=0)
    folder, place = target.folder, f"{target.folder}/{MANIFEST}"
    where = f"the cache {store.root}/{folder}"
    tokens, manifest = None, dict[str, Any]()
    try:
        if (data := store.read(place)) is not None:
            manifest = from_json(MANIFEST, data)
            tokens = _open(store, folder, name, manifest, tokenizer.eos_id)
    except Corrupt as error:
        _log.warning("%s is corrupt and is built again: %s", where, error)
        store.remove(place)
    processes.barrier(f"{where}: checked")  # from here on a manifest means that nothing is to be made
    if incomplete := store.read(place) is None:
        shards = source.shards()
        target = replace(target, n_shards=len(shards))
        build(target, shards, _n_workers(config), processes)
    processes.barrier(f"{where}: tokenized")
    if incomplete and processes.index == 0:
        manifest = {
            "shards": collect(target),
            "source": kind,
            "identity": digest(source.identity),
            "tokenizer": tokenizer.fingerprint,
            "add_bos": config.add_bos,
            "n_vocab": tokenizer.n_vocab,
            "dtype": dtype_for(tokenizer.n_vocab),
        }
        store.write_json(place, manifest)
    processes.barrier(f"{where}: complete")
    wrong = f"data.cache_dir = {store.root}: {folder} is corrupt after it was built"
    with translate_errors(wrong, Corrupt, lambda error: f"{error}{NOT_SHARED if processes.index else ''}"):
        if tokens is None:
            manifest = store.read_json(place)
            tokens = _open(store, folder, name, manifest, tokenizer.eos_id)
    if processes.index == 0:
        report(source.key, manifest["shards"])
    check_text_is_left(source.key, manifest["shards"])
    return tokens


def _open(store: Store, folder: str, name: str, manifest: dict[str, Any], eos_id: int) -> dict[Split, TokenDataset]:
    """The tokens in a folder. Raises Corrupt if a shard is missing or corrupt; says how many are."""
    shards: list[dict[str, Any]] = manifest["shards"]

    def fetch(shard: dict[str, Any]) -> Path | Corrupt:
        try:
            return store.fetch(f"{folder}/{shard['file']}", shard["bytes"], shard["sha256"])
        except Corrupt as error:
            return error

    fetched = map_parallel(fetch, shards)
    if corrupt := [error for error in fetched if isinstance(error, Corrupt)]:
        raise Corrupt(f"{len(corrupt)} of its {len(shards)} shards are corrupt or missing, the first: {corrupt[0]}")
    paths = [path for path in fetched if isinstance(path, Path)]
    _allow_open_files(len(paths))
    opened = [open_shard(path, manifest["dtype"], shard["splits"]) for path, shard in zip(paths, shards, strict=True)]
    return {
        split: TokenDataset(
            source=name,
            split=split,
            sections=tuple(shard[split] for shard in opened),
            n_bytes=sum(shard["splits"][split]["bytes"] for shard in shards),
            fingerprint=combine_checksums([shard["splits"][split]["sha256"] for shard in shards]),
            tokenizer_fingerprint=manifest["tokenizer"],
            eos_id=eos_id,
        )
        for split in SPLITS
    }


def _allow_open_files(more: int) -> None:
    """Raises the soft limit of open files where many shards would reach it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + more + 256 if os.path.isdir("/proc/self/fd") else more + 1024
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted, hard))


def _tokens_made_elsewhere(config: DataConfig, name: str, tokenizer: Tokenizer, index: int) -> dict[Split, TokenDataset]:
    """The tokens in the folder that the settings name, after every id was compared with the size of the vocabulary.

    index: of this process in the run; the first one logs what became of the text.
    """
    path, key = config.mixture[name].path or "", f"{config.key(name)}.path"
    where = f"{key} = {path}"
    root, _, folder = path.rstrip("/").rpartition("/")
    store = Store(root or ("/" if path.startswith("/") else "."), config.local_dir)
    with translate_errors(f"{where}: not a folder of tokens", Corrupt):
        manifest = store.read_json(f"{folder}/{MANIFEST}")
    check({"tokenizer", "shards"} <= set(manifest), f"{where}: not a folder of tokens: its {MANIFEST} lists none")
    theirs, ours = manifest["tokenizer"], tokenizer.fingerprint
    differ = f"({manifest['n_vocab']} ids, fingerprint {theirs[:8]} and not {ours[:8]})"
    check(theirs == ours, f"{where}: made with another tokenizer than data.tokenizer = {config.tokenizer} {differ}")
    bos = manifest.get("add_bos", config.add_bos)  # old manifests do not have it
    check(bos == config.add_bos, f"data.add_bos = {config.add_bos}: {where} was made with data.add_bos = {bos}")
    with translate_errors(where, Corrupt, lambda error: f"{error}; copy or make them again"):
        tokens = _open(store, folder, name, manifest, tokenizer.eos_id)
    for dataset in tokens.values():
        dataset.check_ids(key, tokenizer.n_vocab)
    if index == 0:
        report(config.key(name), manifest["shards"])
    check_text_is_left(config.key(name), manifest["shards"])
    return tokens
