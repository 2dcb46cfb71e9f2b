"""The sources by the value of `source`. A new one is a file here, its line in SOURCES, and its name in SourceConfig.source."""

from collections.abc import Callable

from mutransformer.config.data import MixedSourceConfig, SourceConfig
from mutransformer.data.sources import hub
from mutransformer.data.sources.jsonl import jsonl_shards
from mutransformer.data.sources.source import Source, SourceShard
from mutransformer.data.sources.splits import Fractions
from mutransformer.data.sources.tables import arrow_shards, parquet_shards
from mutransformer.data.sources.text import stdlib_shards, text_shards

# Each lists its shards from the settings, the key below which they stand, and the fractions of whole files to hold out.
SOURCES: dict[str, Callable[[SourceConfig, str, Fractions], list[SourceShard]]] = {
    "stdlib": stdlib_shards,
    "text": text_shards,
    "jsonl": jsonl_shards,
    "parquet": parquet_shards,
    "arrow": arrow_shards,
}


def open_source(config: MixedSourceConfig, key: str, fractions: Fractions) -> Source:
    """A source with the identity of its text; a Hub data set, whose revision must be a commit, is not listed yet.

    Only whole files are held out by their fractions here; records are divided later, by split_of().

    Raises:
        ConfigError: a file is missing or unreadable, a glob matches nothing, or there is too little text for three splits.
    """
    if config.source == "hub":
        return Source(config, key, hub.identity(config), lambda: hub.hub_shards(config, key))
    shards = SOURCES[config.source](config, key, fractions)
    return Source(config, key, [shard.identity for shard in shards], lambda: shards)
