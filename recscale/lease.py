"""A lease keeps two workers off one run folder, on one machine or on many that share a file system.

WORKDIR/lease/ holds TOKEN.info (who) and TOKEN.beat, whose modification time is the heartbeat. The lease is taken by
renaming a complete folder into place and taken over by renaming the beat file to another token: of several workers that
try, the file system lets one succeed. The former owner's next heartbeat finds its file gone.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
"""A heartbeat older than this, on another machine, may be that of a dead worker."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: host and its boot id, process and when that began (in clock ticks), and the lease's token."""

    host: str
    boot: str
    pid: int
    began: int
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Held(Exception):
    """Another worker is on this run folder."""


class Lease:
    """The right to write a run folder, kept by a heartbeat until released. Use as a context manager."""

    def __init__(self, folder: Path, me: Holder, beat: float):
        self.folder, self.holder, self.lost = folder, me, False
        self._beat, self._released = beat, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, workdir: Path, beat: float = BEAT_SECONDS, expiry: float = EXPIRY_SECONDS) -> "Lease":
        """Take the lease of a run folder, or take it over where its holder is dead; raises Held where it lives.

        A holder on this machine is looked up among the processes. One elsewhere is dead once its heartbeat is `expiry`
        seconds old (or lies in the future: clocks differ) and does not move for two beats while this worker looks.
        Raises OSError where the folder cannot be written.
        """
        folder, me = workdir / "lease", _myself()
        for _ in range(100):  # each turn that ends without a result is one that another worker won
            if _place(folder, me):
                return cls(folder, me, beat)
            token = _token(folder)
            if token is None:  # its owner is just leaving, or died while leaving
                _clear(folder)
                continue
            if (other := _dead(folder, token, beat, expiry)) is not None:
                raise Held(f"{workdir}: {other} is on it")
            (folder / f"{me.token}.info").write_text(json.dumps(asdict(me)))
            try:
                os.rename(folder / f"{token}.beat", folder / f"{me.token}.beat")
            except FileNotFoundError:  # another worker was quicker
                (folder / f"{me.token}.info").unlink(missing_ok=True)
                continue
            os.utime(folder / f"{me.token}.beat")
            (folder / f"{token}.info").unlink(missing_ok=True)
            return cls(folder, me, beat)
        raise OSError(
            f"{folder}: neither taken nor found taken in 100 tries; look at it, and delete it if nothing runs"
        )

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back; does nothing where it was lost."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            (self.folder / f"{self.holder.token}.beat").unlink()
            (self.folder / f"{self.holder.token}.info").unlink()
            self.folder.rmdir()

    def _keep(self) -> None:
        while not self._released.wait(self._beat):
            try:
                os.utime(self.folder / f"{self.holder.token}.beat")
            except FileNotFoundError:
                self.lost = True
                return
            except OSError:  # a file server that is away for a moment; if for long, another worker takes over
                continue


def holder(workdir: Path, expiry: float = EXPIRY_SECONDS) -> Holder | None:
    """Who is on a run folder now, as far as one look can tell; None: nobody."""
    folder = workdir / "lease"
    token = _token(folder)
    if token is None:
        return None
    found, age = _look(folder, token)
    if found is None or found.boot == _boot():
        return found if found is not None and _running(found) else None
    return found if age is not None and abs(age) < expiry else None


def _myself() -> Holder:
    return Holder(socket.gethostname(), _boot(), os.getpid(), _began(os.getpid()) or 0, uuid.uuid4().hex)


def _boot() -> str:
    """Of this boot of this machine; the host's name where the system does not say."""
    try:
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None: there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _running(found: Holder) -> bool:
    if Path("/proc/self/stat").exists():
        return _began(found.pid) == found.began
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _place(folder: Path, me: Holder) -> bool:
    """Put a complete lease folder in place; False where there is one."""
    part = folder.with_name(f"lease.{me.token}")
    try:
        part.mkdir(parents=True)
        (part / f"{me.token}.info").write_text(json.dumps(asdict(me)))
        (part / f"{me.token}.beat").touch()
        os.rename(part, folder)
    except OSError as error:
        made = part.is_dir() and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        shutil.rmtree(part, ignore_errors=True)
        if made:
            return False
        if folder.exists() and not folder.is_dir():
            raise OSError(f"{folder}: cannot be made ({error.strerror}); delete what is there") from error
        raise
    return True


def _token(folder: Path) -> str | None:
    try:
        return next((name.removesuffix(".beat") for name in os.listdir(folder) if name.endswith(".beat")), None)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _clear(folder: Path) -> None:
    """Remove what a dead worker left in a lease folder without heartbeat."""
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
        if not any(name.endswith(".beat") for name in names):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _look(folder: Path, token: str) -> tuple[Holder | None, float | None]:
    """The holder and the age of its heartbeat in seconds; None for what cannot be read."""
    try:
        found = Holder(**json.loads((folder / f"{token}.info").read_text()))
    except (OSError, ValueError, TypeError):
        found = None
    try:
        with (folder / f"{token}.beat").open() as beat:  # opening makes a network file system look anew
            return found, time.time() - os.fstat(beat.fileno()).st_mtime
    except OSError:
        return found, None


def _dead(folder: Path, token: str, beat: float, expiry: float) -> Holder | str | None:
    """None where the holder is dead, else who it is."""
    found, age = _look(folder, token)
    if found is not None and found.boot == _boot():
        return found if _running(found) else None
    if age is not None and 0 <= age < expiry:
        return found or "another worker"
    before = _beat_time(folder, token)
    time.sleep(2 * beat)
    after = _beat_time(folder, token)
    return None if before == after else (found or "another worker")


def _beat_time(folder: Path, token: str) -> int | None:
    try:
        with (folder / f"{token}.beat").open() as beat:
            return os.fstat(beat.fileno()).st_mtime_ns
    except OSError:
        return None
