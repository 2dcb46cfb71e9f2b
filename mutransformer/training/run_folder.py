"""The folder of a run or a sweep: one at a time has it, its files are replaced, never written through, and its loss is noticed.

This is a folder on a disk. mutransformer.training.url_folder has those at a URL.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from mutransformer.errors import ConfigError, check, first_line, translate_errors
from mutransformer.sharding.processes import all_processes, assert_equal_across_processes

LOCK = "lock"
_UNFINISHED = ".unfinished"  # ends the name of a file while it is written
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of NFS without its lock service, or a bucket that is mounted

_log = logging.getLogger(__name__)


class RunFolder:
    """The folder at a path, which is created when it is owned or first written to."""

    def __init__(self, path: Path, chosen_by: str = "name=...") -> None:
        self.path = path  # where its files are on this machine
        self.name = str(path)  # for messages
        self._chosen_by = chosen_by  # the setting or option that gives another folder
        self._identity: tuple[int, int] | None = None  # device and inode, once it is owned

    def write(self, name: str, data: bytes) -> None:
        """Writes a file completely or not at all. A link of that name is replaced, and what it points to left alone.

        Raises OSError.
        """
        with NamedTemporaryFile(dir=self.path, prefix=f".{name}.", suffix=_UNFINISHED, delete=False) as file:
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
            self._tidy()
            yield
        finally:
            with suppress(OSError):
                if _identity(self.path / LOCK) == _identity(lock):
                    os.unlink(self.path / LOCK)
            os.close(lock)
            with suppress(OSError):  # not empty
                for path in created:
                    path.rmdir()

    def _tidy(self) -> None:
        """Removes the half files of processes that were killed."""
        for folder in (self.path, self.path / "checkpoints"):
            for path in folder.glob(f".*{_UNFINISHED}"):
                with suppress(OSError):
                    path.unlink()

    def changing(self) -> AbstractContextManager[object]:
        """Within it a file is changed that others may read meanwhile, but should not."""
        return nullcontext()

    def pull(self) -> None:
        """Returns when the run's files are on this machine. Raises ConfigError if they cannot be read."""

    def publish(self) -> None:
        """Returns when what is written can be read by all machines. Raises ConfigError if it cannot be written there."""

    def discard(self) -> None:
        """Removes copies of the run's files on this machine."""

    def lock_seen(self) -> bytes:
        """What the lock holds; a network file system may take some seconds to show it."""
        for _ in range(20):
            with suppress(OSError):
                if found := (self.path / LOCK).read_bytes():
                    return found
            time.sleep(0.25)
        return b""

    def check_free(self) -> None:
        """Raises ConfigError if a run has the folder, or it cannot be written to. Creates nothing."""
        for folder in (self.path, self.path / "checkpoints"):
            _check_writable(folder)
        if (self.path / LOCK).exists():
            with self.owned():
                pass

    def check_present(self) -> None:
        """Raises ConfigError if the folder is gone, or another one has its place, since it was owned."""
        if self._identity is not None:
            gone = f"{self.path}: the folder was removed or replaced while the run was going on"
            try:
                check(_identity(self.path) == self._identity, gone)
            except OSError as error:
                raise ConfigError(f"{gone}: {first_line(error)}") from None

    def _lock(self) -> int:
        """The descriptor of the lock file, locked. Not its existence but the system's lock says that the folder is in use: that
        ends with the process, and on NFS with its host."""
        path = self.path / LOCK
        not_ours = path.is_symlink() or (path.exists() and not path.is_file())
        check(not not_ours, f"{path}: not a file of the run's own; remove it")
        with translate_errors(f"{self.path}: cannot be used", OSError):
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
                    text = f"{self.path}: in use by {holder}; choose another {self._chosen_by}, or stop that run"
                    raise ConfigError(text) from None
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
def owned_by_all(folder: RunFolder) -> Iterator[None]:
    """Process 0 owns the folder of a run of any number of processes, and all of them see it.

    Raises ConfigError, on all, if another run has it, or it is not the same folder for all.
    """
    processes = all_processes()
    with ExitStack() as stack:
        stack.callback(folder.discard)
        with processes.first_in_process_0("the run's folder"):
            if processes.index == 0:
                stack.enter_context(folder.owned())
            seen = folder.lock_seen()
        if processes.count > 1:
            where = f"workdir: the folder of the run, which must be on a file system that all processes see, here {folder.name},"
            assert_equal_across_processes(where, {"lock": hashlib.sha256(seen).hexdigest() if seen else "none"})
        folder.pull()
        yield


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def _check_writable(folder: Path) -> None:
    """Raises ConfigError unless a file can be written in a folder, or in the nearest above it that exists."""
    folder = existing(folder)
    check(folder.is_dir(), f"{folder}: not a folder, the run needs one there")
    probe = folder / f".probe-{uuid.uuid4().hex}"
    with translate_errors(f"{folder}: cannot be written to", OSError):
        probe.write_bytes(b"x")
        probe.unlink()


def _identity(path: Path | int) -> tuple[int, int]:
    """Device and inode of a path or an open file."""
    found = os.stat(path)
    return found.st_dev, found.st_ino
