"""Documents: where text comes from, and which documents are held out.

A source gives files; a file that holds much of the text is cut in pieces, so that one long file can be trained on as well. Each
file or piece goes to a split by a hash of its name. Add a source by a function in SOURCES.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Literal, NamedTuple

from mutransformer.config import ConfigError, DataConfig, check

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_SMALLEST_PIECE = 64  # bytes
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A file, or consecutive pieces of one file that are in the same split."""

    name: str  # the same wherever the folder lies; "file#k" for text that starts at piece k
    split: Split
    data: bytes  # valid UTF-8, not empty


class Piece(NamedTuple):
    """What the hash sends to a split: a file, or a part of one."""

    name: str
    data: bytes
    continues: bool  # the piece before it in the list, in the same file


def documents(config: DataConfig) -> list[Document]:
    """All documents of data.source, in order of their names. The text is in memory.

    Raises:
        ConfigError: a file is missing or not UTF-8, a glob matches nothing, or there is too little text for three splits.
    """
    pieces = SOURCES[config.source](config)
    check(
        len(pieces) >= len(SPLITS),
        f"data.source = {config.source}, data.files = {config.files}: {sum(len(p.data) for p in pieces)} bytes of text "
        "are too few for a train, a validation and a test split",
    )
    splits = assign([piece.name for piece in pieces], config.validation_share, config.test_share)
    runs: list[tuple[str, Split, list[bytes]]] = []
    for piece, split in zip(pieces, splits, strict=True):
        if piece.continues and runs[-1][1] == split:
            runs[-1][2].append(piece.data)
        else:
            runs.append((piece.name, split, [piece.data]))
    return [Document(name, split, b"".join(parts)) for name, split, parts in runs]


def assign(names: list[str], validation_share: float, test_share: float) -> list[Split]:
    """The split of each name, by its SHA-256 alone: the same on every machine, and whatever other names there are.

    Only where the hash would leave a split empty, the nearest name by hash goes there. Needs at least three names.
    """
    assert len(names) >= len(SPLITS)
    place = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    held_out = validation_share + test_share
    n_validation = min(max(1, sum(u < validation_share for u in place)), len(names) - 2)
    n_test = min(max(1, sum(validation_share <= u < held_out for u in place)), len(names) - 1 - n_validation)
    order = sorted(range(len(names)), key=place.__getitem__)
    splits: list[Split] = ["train"] * len(names)
    for rank, index in enumerate(order[: n_validation + n_test]):
        splits[index] = "validation" if rank < n_validation else "test"
    return splits


def fingerprint(of: list[Document]) -> str:
    """SHA-256 of the documents: names, splits, contents and order."""
    total = hashlib.sha256()
    for document in of:
        content = hashlib.sha256(document.data).hexdigest()
        total.update(f"{len(document.name.encode())} {document.name} {document.split} {content}\n".encode())
    return total.hexdigest()


def cut(data: bytes, size: int) -> Iterator[bytes]:
    """UTF-8 text in pieces of size bytes or somewhat more, each to the next line end; a line of 2 * size is cut in itself."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + size - 1, start + 2 * size) + 1
        if end == 0:
            end = min(start + 2 * size, len(data))
            while end < len(data) and data[end] & 0xC0 == 0x80:  # within a character
                end += 1
        yield data[start:end]
        start = end


def _stdlib(config: DataConfig) -> list[Piece]:
    """Python's own library, tests left out: the same for every installation of one Python version. Files stay whole."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[Piece] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _STDLIB_SKIP and not name.startswith("config-")]
        for file in files:
            # The build's own settings, with the paths of the machine that built it.
            if not file.endswith(".py") or file.startswith("_sysconfigdata"):
                continue
            path = Path(folder, file)
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:  # fixtures in other encodings are part of the library
                continue
            if text:
                pieces.append(Piece(path.relative_to(root).as_posix(), text.encode(), continues=False))
    return sorted(pieces)


def _text(config: DataConfig) -> list[Piece]:
    """The files of data.files. A file over about 1/100 of the text is cut in pieces of about 1/400 or more.

    So some hundred files of like size are each held out or trained on as a whole, and one file is divided among the splits. The
    size is a power of two, so that text added later seldom moves the cuts.
    """
    files = [(name, _read(path)) for name, path in _named(config.files)]
    total = sum(len(data) for _, data in files)
    size = max(_SMALLEST_PIECE, 1 << max(0, (total // 256).bit_length() - 1))
    pieces: list[Piece] = []
    for name, data in files:
        if len(data) > 4 * size:
            parts = cut(data, size)
            pieces += [Piece(f"{name}#{k}", part, continues=k > 0) for k, part in enumerate(parts)]
        elif data:
            pieces.append(Piece(name, data, continues=False))
    return pieces


def _named(patterns: list[str]) -> list[tuple[str, Path]]:
    """(name, path) of every file, sorted. A name is the path below the part of the pattern that is fixed."""
    found: dict[Path, str] = {}
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        check(not expanded.is_dir(), f"data.files: {pattern} is a folder; name its files, e.g. {expanded.as_posix()}/**/*.txt")
        # A file of that very name comes first, since a name may hold a bracket.
        matches = [expanded] if expanded.is_file() else [Path(p) for p in glob(str(expanded), recursive=True)]
        matches = [path for path in matches if path.is_file()]
        check(bool(matches), f"data.files: {pattern} matches no file")
        root = expanded.parent
        while set("*?[") & set(str(root)) and not root.is_dir():
            root = root.parent
        for path in matches:
            found.setdefault(path.resolve(), path.relative_to(root).as_posix())
    return sorted((name, path) for path, name in found.items())


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"data.files: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"data.files: {path}, line {line}, byte {error.start}: not UTF-8 ({error.reason})") from None
    return data.removeprefix(b"\xef\xbb\xbf")


SOURCES: dict[str, Callable[[DataConfig], list[Piece]]] = {"stdlib": _stdlib, "text": _text}
