"""A run's folder at a URL, such as gs://bucket/runs/small: of an object store, which need not rename, append or lock.

A process works in a copy of the folder on its own disk. A thread publishes the files of it that changed, and a checkpoint counts
once everything before it is published: so the folder at the URL always holds what a run needs to resume. The checkpoints are
uploaded by mutransformer.training.url_checkpoints.
"""

import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from mutransformer.config.schema import Config
from mutransformer.data.cache.store import Store
from mutransformer.errors import ConfigError, check
from mutransformer.training.checkpoint_storage import FOLDER as CHECKPOINTS
from mutransformer.training.run_folder import LOCK, RunFolder

PUBLISH_EVERY = 30.0  # seconds
RENEW_EVERY = 10.0  # seconds: the lock of a run that goes on is never older, unless its host or the store is out of reach
LAPSED_AFTER = 60.0  # seconds without renewal, by the clock of who waits
SETTLED_AFTER = 1.0  # seconds, in which another run that took the lock at the same moment has written its own

_log = logging.getLogger(__name__)


def run_folder(config: Config) -> RunFolder:
    """The folder of a run, on a disk or at a URL."""
    return UrlFolder(config.run_url, config.data.local_dir) if config.run_url else RunFolder(config.rundir)


@contextmanager
def readable(config: Config) -> Iterator[RunFolder]:
    """The folder of a run with its files on this machine; copies are removed at the end. Raises ConfigError if it has none."""
    folder = run_folder(config)
    try:
        folder.pull()
        check(folder.path.is_dir(), f"{folder.name}: no run here")
        yield folder
    finally:
        folder.discard()


class UrlFolder(RunFolder):
    """The folder at a URL. `path` has copies of its files, but for most checkpoints; what changes there is published."""

    def __init__(self, url: str, local_dir: str) -> None:
        self.store = Store(url, local_dir, where=url)
        super().__init__(self.store.scratch("run"))
        self.name = url
        self._published = dict[str, tuple[int, int]]()  # time of change and bytes of each file that the store has, by name
        self._changing, self._publishing = threading.Lock(), threading.Lock()
        self._lease = Lease(self.store)

    def pull(self) -> None:
        with self._publishing:
            for name in self.store.sizes(""):
                if self._is_copied(name):
                    self.store.download(name, self.path / name)
            self._published = self._files()

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def changing(self) -> AbstractContextManager[object]:
        return self._changing

    def publish(self) -> None:
        """Uploads the files that changed, and removes those that were removed. Raises ConfigError if it cannot."""
        with self._publishing:
            files = self._files()
            for name in sorted(name for name, state in files.items() if state != self._published.get(name)):
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    with self._changing:
                        state, data = _state(self.path / name), (self.path / name).read_bytes()
                    self.store.write(name, data)
                    self._published[name] = state
            for name in self._published.keys() - files.keys():
                self.store.remove(name)
                del self._published[name]

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Has the folder for itself, until the block ends or the process is gone, and publishes what changes in it.

        Raises ConfigError if another run has it, or it cannot be written to, then or at the end.
        """
        with self._lease.held():
            try:
                with _in_background("publisher", self._keep_publishing):
                    yield
            finally:
                if self._lease.lost is None:
                    self.publish()

    def check_free(self) -> None:
        self._lease.check_free()
        probe = f"probe-{uuid.uuid4().hex}"
        self.store.write(probe, b"x")
        self.store.remove(probe)

    def check_present(self) -> None:
        check(self._lease.lost is None, f"{self.name}: {self._lease.lost} while the run was going on")

    def lock_seen(self) -> bytes:
        lock = self._lease.holder()
        return str(lock["id"]).encode() if lock else b""

    def _keep_publishing(self, ended: threading.Event) -> None:
        failed = False
        while not ended.wait(PUBLISH_EVERY if self._published or failed else 1.0):
            try:
                self.check_present()
                self.publish()
                failed = False
            except (ConfigError, OSError) as error:
                if not failed:
                    _log.warning("%s; tried again every %.0f s", error, PUBLISH_EVERY)
                failed = True

    def _files(self) -> dict[str, tuple[int, int]]:
        """The state of each file of the local copy that is also kept in the store."""
        files = dict[str, tuple[int, int]]()
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path).as_posix()
            if self._is_copied(name) and path.is_file():
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    files[name] = _state(path)
        return files

    @staticmethod
    def _is_copied(name: str) -> bool:
        """Whether a file is copied as it is: not the lock, temporary files, and the files of a checkpoint."""
        parts = name.split("/")
        return name != LOCK and not parts[-1].startswith(".") and not (parts[0] == CHECKPOINTS and len(parts) > 2)


@contextmanager
def _in_background(name: str, action: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs an action in a thread while the block lasts. Then its argument is set, and the thread waited for."""
    ended = threading.Event()
    thread = threading.Thread(target=action, args=[ended], name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


class Lease:
    """The right to write below a URL, where nothing can be locked: an object that its holder renews, and removes at the end.

    It is taken over if its holder is known to be gone, since it was a process of this machine, or has not renewed it for
    LAPSED_AFTER. A holder that was cut off for so long finds the lock of another when it is back, and has lost the right.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lost: str | None = None  # how, once it is
        self._lapsed: dict[str, Any] | None = None  # a lock that was waited for in vain: once is enough
        who = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        self._lock = {"id": uuid.uuid4().hex, **who, "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Has the right within the block. Raises ConfigError if another process has it."""
        self.check_free()
        self._write()
        time.sleep(SETTLED_AFTER)
        holder = self.holder()
        check(holder is not None and holder["id"] == self._lock["id"], self._in_use(holder or {}))
        try:
            with _in_background("lease", self._keep):
                yield
        finally:
            with suppress(ConfigError):
                if (self.holder() or {}).get("id") == self._lock["id"]:
                    self._store.remove(LOCK)

    def check_free(self) -> None:
        """Raises ConfigError if another process has the right. Waits for a sign of its holder, if it may be gone."""
        before = self.holder()
        if before is None or before == self._lapsed or _is_gone(before):
            return
        text = "%s: held by %s; waiting up to %.0f s for a sign that it goes on"
        _log.info(text, self._store.root, _who(before), LAPSED_AFTER)
        until = time.monotonic() + LAPSED_AFTER
        while time.monotonic() < until:
            time.sleep(1)
            now = self.holder()
            if now is None:
                return
            check(now == before, self._in_use(now))
        self._lapsed = before

    def holder(self) -> dict[str, Any] | None:
        """What the lock holds; None if there is none that can be read."""
        with suppress(ValueError, KeyError, TypeError):
            found = json.loads(self._store.read(LOCK) or b"")
            return {name: found[name] for name in (*self._lock, "renewed")}
        return None

    def _keep(self, ended: threading.Event) -> None:
        """Renews the lock until the end, or until it is lost."""
        while not ended.wait(RENEW_EVERY):
            with suppress(ConfigError):  # the store is out of reach: others see no renewal, and this process looks again
                holder = self.holder()
                if holder is None or holder["id"] != self._lock["id"]:
                    self.lost = f"taken over by {_who(holder)}" if holder else "the run's folder was removed"
                    return
                self._write()

    def _write(self) -> None:
        self._store.write(LOCK, json.dumps({**self._lock, "renewed": time.time()}).encode())

    def _in_use(self, holder: dict[str, Any]) -> str:
        return f"{self._store.root}: in use by {_who(holder)}; choose another name=..., or stop that run"


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on host {holder.get('host')} since {holder.get('since')}"


def _machine() -> str:
    """Identifies this boot of this machine, and in it the container whose process numbers these are."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if holder["machine"] != _machine():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        pass
    return False
