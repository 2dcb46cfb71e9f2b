"""Cutting long UTF-8 text at line ends."""

from collections.abc import Callable, Iterator
from itertools import chain, pairwise

_BLOCK = 1 << 16  # bytes that are searched for a line end at a time


def cut_points(read: Callable[[int, int], bytes], start: int, stop: int, size: int) -> Iterator[int]:
    """The end of each piece of the text in bytes start ... stop - 1. Reads only near the ends.

    A piece has size bytes or more, up to the next line end; with none before 2 * size it ends there, between two characters.

    Args:
        read: gives the bytes first ... last - 1 of the text, fewer at its end.
        start: of the text.
        stop: of the text.
        size: in bytes.
    """
    while start < stop:
        at, limit, found = start + size - 1, min(start + 2 * size, stop), -1
        while at < limit and found < 0 and (block := read(at, min(at + _BLOCK, limit))):
            found = block.find(b"\n")
            at += len(block) if found < 0 else found + 1
        if found < 0:
            tail = read(limit, min(limit + 4, stop))
            at_end = 0 if len(tail) == 4 else len(tail)
            at = limit + next((k for k, byte in enumerate(tail) if byte & 0xC0 != 0x80), at_end)
        yield at
        start = at


def cut(data: bytes, size: int) -> Iterator[bytes]:
    """Text in pieces of size to 2 * size bytes and at most 3 more, each cut when it is asked for."""
    ends = cut_points(lambda first, last: data[first:last], 0, len(data), size)
    return (data[first:last] for first, last in pairwise(chain([0], ends)))
