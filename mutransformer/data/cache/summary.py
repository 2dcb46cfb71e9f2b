"""What became of a source's text, from the counts beside its tokens: shown at each start, since it is easily lost unseen."""

import logging
from collections.abc import Sequence
from typing import Any

from mutransformer.data.sources.source import RecordCounts
from mutransformer.errors import ConfigError, check

_log = logging.getLogger(__name__)


def report(key: str, shards: Sequence[dict[str, Any]]) -> None:
    """Logs the counts of a source, and warns of what was lost. Shards made before there were counts have few or none.

    key: of the source's settings; shards: the metadata of its token shards.
    """
    counts, counted = total(shards), [shard for shard in shards if "read" in shard]
    n_tokens, n_unknown = _sum(shards, "tokens"), sum(shard.get("unknown", 0) for shard in shards)
    if len(counted) == len(shards):
        figures = f"{counts.read:,} records read, {counts.empty:,} empty, {counts.skipped:,} skipped"
        tokens = f"{_sum(shards, 'documents'):,} documents, {n_tokens:,} tokens, {n_unknown:,} unknown"
        _log.info("%s: %s; %s", key, figures, tokens)
    if counts.skipped:
        of = f" of {counts.read:,}" if len(counted) == len(shards) else ""
        _log.warning("%s: %s%s records skipped, the first: %s", key, f"{counts.skipped:,}", of, counts.first_skipped)
    if files := files_without_records(counted):
        n = len({shard["place"] for shard in counted})
        _log.warning("%s: %d of %d files hold no record, the first: %s", key, len(files), n, files[0])
    if lossy := [shard["round_trip"] for shard in shards if "round_trip" in shard]:
        compared = sum(shard.get("compared", 0) for shard in shards)
        lost, (text, back) = sum(found["lost"] for found in lossy) / max(1, compared), lossy[0]["example"]
        share = "no character of a sample is" if not lost else f"{max(lost, 0.0001):.2%} of the characters of a sample are"
        unknown = f"; {n_unknown:,} of {n_tokens:,} tokens are unknown" if n_unknown else ""
        changed = "the tokenizer does not give its text back"
        _log.warning("%s: %s: %s lost, %r comes back as %r%s", key, changed, share, text, back, unknown)


def check_text_is_left(key: str, shards: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError if no document is left, or none to train on and records were lost."""
    counts, n_train = total(shards), sum(shard["splits"]["train"]["documents"] for shard in shards)
    check(_sum(shards, "documents") > 0, f"{key}: no text is left: {counts}")
    if not n_train and (counts.empty or counts.skipped):
        raise ConfigError(f"{key}: no text is left to train on: {counts}")


def total(shards: Sequence[dict[str, Any]]) -> RecordCounts:
    """The counts of all shards."""
    read, empty, skipped = (sum(shard.get(name, 0) for shard in shards) for name in ("read", "empty", "skipped"))
    first = next((shard["first_skipped"] for shard in shards if shard.get("skipped")), "")
    return RecordCounts(read, empty, skipped, first)


def files_without_records(shards: Sequence[dict[str, Any]]) -> list[str]:
    """The files of which no shard had a record, in order."""
    read: dict[str, int] = {}
    for shard in shards:
        read[shard["place"]] = read.get(shard["place"], 0) + shard["read"]
    return [place for place, n in read.items() if not n]


def _sum(shards: Sequence[dict[str, Any]], what: str) -> int:
    return sum(split[what] for shard in shards for split in shard["splits"].values())
