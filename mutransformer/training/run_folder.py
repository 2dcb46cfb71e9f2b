"""A run's folder: one run at a time has it, its files are replaced, never written through, and its loss is noticed."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from mutransformer.errors import ConfigError, check, first_line, translate_errors
from mutransformer.sharding.processes import all_processes, assert_equal_across_processes

LOCK = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of NFS without its lock service, or a bucket that is mounted

_log = logging.getLogger(__name__)


class RunFolder:
    """The folder at a path, which is created when it is owned or first written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None  # device and inode, once it is owned

    def write(self, name: str, data: bytes) -> None:
        """Writes a file completely or not at all. A link of that name is replaced, and what it points to left alone.

        Raises OSError.
        """
        with NamedTemporaryFile(dir=self.path, prefix=f".{name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # a temporary file is private
                os.replace(file.name, self.path / name)
            except OSError:
                with suppress(OSError):
                    os.unlink(file.name)
                raise

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Has the folder for itself, until the block or the process ends, however it ends.

        A folder that is empty at the end is removed if it was created here. Raises ConfigError if another run has it, or it
        cannot be created or written to.
        """
        created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        lock = self._lock()
        try:
            self._identity = _identity(self.path)
            yield
        finally:
            with suppress(OSError):
                if _identity(self.path / LOCK) == _identity(lock):
                    os.unlink(self.path / LOCK)
            os.close(lock)
            with suppress(OSError):  # not empty
                for path in created:
                    path.rmdir()

    def check_free(self) -> None:
        """Raises ConfigError if a run has the folder. Creates nothing."""
        if (self.path / LOCK).exists():
            with self.owned():
                pass

    def check_present(self) -> None:
        """Raises ConfigError if the folder is gone, or another one has its place, since it was owned."""
        if self._identity is not None:
            gone = f"{self.path}: the run's folder was removed or replaced while the run was going on"
            try:
                check(_identity(self.path) == self._identity, gone)
            except OSError as error:
                raise ConfigError(f"{gone}: {first_line(error)}") from None

    def _lock(self) -> int:
        """The descriptor of the lock file, locked. Not its existence but the system's lock says that the folder is in use: that
        ends with the process, and on NFS with its host."""
        path = self.path / LOCK
        with translate_errors(f"{self.path}: cannot hold a run", OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            while True:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if path.exists() and _identity(path) == _identity(lock):  # the run before may have removed it meanwhile
                        break
                    os.close(lock)
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        text = "%s: its file system has no locks (%s): start no second run in it"
                        _log.warning(text, self.path, error.strerror)
                        break
                    if not isinstance(error, BlockingIOError):
                        raise
                    holder = _holder(lock)
                    os.close(lock)
                    raise ConfigError(f"{self.path}: in use by {holder}; choose another name=..., or stop that run") from None
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(holder).encode(), 0)
        return lock


def _holder(lock: int) -> str:
    try:
        found = json.loads(os.pread(lock, 1000, 0))
        return f"process {found['pid']} on host {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def owned_by_all(path: Path) -> Iterator[RunFolder]:
    """The folder of a run of any number of processes, which process 0 owns, and which all of them see.

    Raises ConfigError, on all, if another run has it, or it is not the same folder for all.
    """
    folder, processes = RunFolder(path), all_processes()
    with ExitStack() as stack:
        with processes.first_in_process_0("the run's folder"):
            if processes.index == 0:
                stack.enter_context(folder.owned())
            seen = _lock_seen_in(path)
        if processes.count > 1:
            where = f"workdir: the folder of the run, which must be on a file system that all processes see, here {path},"
            assert_equal_across_processes(where, {"lock": hashlib.sha256(seen).hexdigest() if seen else "none"})
        yield folder


def _lock_seen_in(path: Path) -> bytes:
    """What the lock holds; a network file system may take some seconds to show it."""
    for _ in range(20):
        with suppress(OSError):
            if found := (path / LOCK).read_bytes():
                return found
        time.sleep(0.25)
    return b""


def _identity(path: Path | int) -> tuple[int, int]:
    """Device and inode of a path or an open file."""
    found = os.stat(path)
    return found.st_dev, found.st_ino
