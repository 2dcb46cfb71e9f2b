"""Files whose name and source say one format, and whose first bytes say another: an error, not as many bad records.

So is text in another encoding than UTF-8: UTF-16 without a byte-order mark is valid UTF-8 full of NULs.
"""

import re
from collections.abc import Collection

from mutransformer.errors import check

HEAD_BYTES = 264  # that are enough to tell: the mark of a tar archive is at byte 257

# Each holds a byte that no text begins with, or is too long to be met by chance.
_MAGIC = {
    "gzip": rb"\x1f\x8b\x08",
    "Zstandard": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "lz4": rb"\x04\x22\x4d\x18",
    "zip": rb"PK(\x03\x04|\x05\x06)",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "Parquet": rb"PAR1[\x00-\x08\x0e-\x1f]",
    "Arrow": rb"ARROW1\x00\x00",
    "tar": rb"(?s:.{257})ustar[\x00 ]",
    "UTF-32": rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff|([\t\n\r -~]\x00{3}){3}|(\x00{3}[\t\n\r -~]){3}",
    "UTF-16": rb"\xff\xfe|\xfe\xff|([\t\n\r -~]\x00){6}|(\x00[\t\n\r -~]){6}",
}
_SHORTEST = 4  # bytes that tell gzip and Zstandard
_SUFFIXES = {"gzip": ".gz", "Zstandard": ".zst"}  # of compressed JSON lines
_ENCODINGS = ("UTF-16", "UTF-32")
_TABLES = {"Parquet": "parquet", "Arrow": "arrow"}  # data.source that reads them


def format_of(head: bytes) -> str | None:
    """The format or encoding that the first bytes of a file belong to, if it is one that holds text but not UTF-8."""
    return next((name for name, magic in _MAGIC.items() if re.match(magic, head)), None)


def check_text(head: bytes, where: str, suffixes: Collection[str] = ()) -> None:
    """Raises ConfigError if what should be text begins as a binary format does; where: key and file, for the message.

    suffixes: of names that mark compressed files for this source.
    """
    found = format_of(head)
    check(found not in _ENCODINGS, f"{where}: holds {found} text, not UTF-8; convert it")
    advice = "unpack it" if found == "tar" else "decompress it"
    if found in _TABLES:
        advice = f"read it with data.source={_TABLES[found]}"
    elif suffix := _SUFFIXES.get(found or ""):
        advice = f"rename it to end in {suffix}" if suffix in suffixes else "decompress it, or make JSON lines of it"
    check(found is None, f"{where}: holds {found} data, not text; {advice}")


def check_compressed(head: bytes, where: str, kind: str) -> None:
    """Raises ConfigError if a file whose name says gzip or Zstandard begins otherwise. One too short to tell passes."""
    found = format_of(head)
    held = f"{found} data" if found else "other data, perhaps plain text"
    ok = found == kind or len(head) < _SHORTEST
    check(ok, f"{where}: its name ends as that of a {kind} file, but it holds {held}; rename it")


def check_table(head: bytes, where: str, kind: str) -> None:
    """Raises ConfigError if what should be a Parquet or Arrow file begins as another binary format does."""
    found = format_of(head)
    advice = f"read it with data.source={_TABLES[found]}" if found in _TABLES else "decompress it"
    check(found in (None, kind), f"{where}: holds {found} data, not {kind}; {advice}")
