"""Compiled programs, kept on the disk for the next process: JAX's persistent compilation cache, with files of our own.

JAX writes its entries in place, and their compressed frames have no checksum: half an entry, or one with a flipped bit, would be
loaded as machine code. Here an entry is written completely or not at all, and begins with the SHA-256 of the rest.
"""

import hashlib
import logging
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from mutransformer.errors import first_line, is_url
from mutransformer.sharding.devices import cpu_flags

LIMIT = 4 << 30  # bytes; the entries that were used last stay
_SHORTEST = 0.5  # seconds to compile: a program that takes less is not kept

_log = logging.getLogger(__name__)


class SealedCache:
    """Entries by key, as files of a folder. It has the methods of JAX's CacheInterface.

    A folder that cannot be read or written costs one warning: programs are compiled then.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self._path, self._limit, self._warned = path, limit, False

    def get(self, key: str) -> bytes | None:
        """The value of a key; None if there is none, or it is not what was written."""
        path = self._path / key
        try:
            seal, value = _split(path.read_bytes())
            if seal != hashlib.sha256(value).digest():
                _log.warning("%s: damaged; the program is compiled again", path)
                path.unlink()
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        try:
            self._evict(len(value))
            with NamedTemporaryFile(dir=self._path, prefix=".new.", delete=False) as file:
                try:
                    file.write(hashlib.sha256(value).digest() + value)
                    file.flush()
                    os.replace(file.name, self._path / key)
                except OSError:
                    with suppress(OSError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            self._warn(error)

    def _evict(self, more: int) -> None:
        """Removes entries, the one that was used longest ago first, until there is room. Other processes may do the same."""
        found = []
        for path in self._path.iterdir():
            with suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, path))
        room = self._limit - more - sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if room >= 0:
                return
            path.unlink(missing_ok=True)
            room += size

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning("%s: compiled programs are not kept: %s", self._path, first_line(error))
        self._warned = True


def keep_compiled(folder: str | None) -> None:
    """Makes JAX keep compiled programs in a folder, and look for them there. Call it before anything is compiled.

    The folder that JAX_COMPILATION_CACHE_DIR names takes precedence; a URL there is left to JAX. Without either nothing is kept.
    """
    import jax
    from jax._src import compilation_cache  # JAX has no public way to give it another kind of cache

    given: str | None = jax.config.values["jax_compilation_cache_dir"]
    folder = given or folder
    if folder is None or is_url(folder) or not hasattr(compilation_cache, "get_file_cache"):
        return
    path = Path(folder).expanduser()
    if path.name != _machine():  # else an earlier call of this process has chosen it
        path /= _machine()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it is executed
    except OSError as error:
        _log.warning("%s: compiled programs are not kept: %s", path, first_line(error))
        return
    compilation_cache.get_file_cache = lambda path: (SealedCache(Path(path)), path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    if given is None:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)


def _machine() -> str:
    """A name for machines with the same instructions: others that share a home directory could not execute the programs."""
    text = f"{sys.platform} {platform.machine()} {platform.processor()} {sorted(cpu_flags())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _split(entry: bytes) -> tuple[bytes, bytes]:
    n = hashlib.sha256().digest_size
    return entry[:n], entry[n:]
