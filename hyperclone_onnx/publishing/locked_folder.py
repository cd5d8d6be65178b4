"""The folder in which one run prepares one OUT, locked as long as the run lives: the kernel unlocks it at a kill."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hyperclone_onnx.errors import CannotWrite

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP") if hasattr(errno, name)}


def partial_folder(out: Path) -> Path:
    """Where OUT is written before it is published."""
    return out.with_name(f".{out.name}.partial")


@dataclass
class LockedFolder:
    """The folder in which one run prepares one OUT, locked as long as `lock` is open."""

    folder: Path
    lock: int | None
    keep: bool = False
    """Whether the next run is to find the folder: it has something to do that this one could not."""

    def remove(self) -> None:
        """Delete the folder, the lock last: as long as anything is left it is locked. What cannot be deleted stays."""
        with suppress(OSError):
            if not self.keep:
                clear(self.folder)
            if os.name == "nt":  # an open file cannot be deleted there
                self._unlock()
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()  # fails where another run has begun to use it
        self._unlock()

    def _unlock(self) -> None:
        _held[:] = [each for each in _held if each is not self]
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


_held: list[LockedFolder] = []


def _let_go() -> None:
    """In a copy of this process: its locks are not the copy's, which may outlive it."""
    for each in list(_held):
        each._unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def clear(folder: Path) -> None:
    """Delete everything in a folder but its lock."""
    for each in list(folder.iterdir()):
        if each.name == LOCK:
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink(missing_ok=True)


def take_folder(out: Path) -> LockedFolder:
    """Make and lock the folder for OUT; what a killed run left in it is there still.

    Raises:
        CannotWrite: another run has it, or it cannot be made.
    """
    folder = partial_folder(out)
    made = False
    try:
        for _ in range(100):
            try:
                folder.mkdir()
                made = True
            except FileExistsError:
                made = False
                _check_own(out, folder)
            try:
                lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            except FileNotFoundError:  # the run that had it has just removed it
                continue
            if _locked(out, folder, lock, made):
                place = LockedFolder(folder, lock)
                _held.append(place)
                return place
    except OSError as problem:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise CannotWrite(f"{out}: cannot be written ({problem.strerror or problem})") from problem
    raise CannotWrite(f"{out}: {folder} is made and removed all the time; choose another output")


def _check_own(out: Path, folder: Path) -> None:
    """Refuse a folder that somebody else has put in the way: who may write there could change what is published."""
    with suppress(FileNotFoundError):
        found = folder.lstat()
        foreign = hasattr(os, "geteuid") and found.st_uid != os.geteuid()
        if not stat.S_ISDIR(found.st_mode) or foreign:
            raise CannotWrite(f"{out}: {folder} is in the way and not ours; remove it, or choose another output")


def _locked(out: Path, folder: Path, lock: int, made: bool) -> bool:
    """Lock a folder by its open lock file; False when the file has been removed meanwhile.

    Where there are no locks (some network file systems, Windows) only a folder that this run has made is its own.

    Raises:
        CannotWrite: another run holds it, or may hold it.
    """
    try:
        _lock(lock, made)
    except BlockingIOError:
        number = os.read(lock, 20).decode("ascii", "replace").strip()
        os.close(lock)
        by = f" (process {number})" if number.isdigit() else ""
        raise CannotWrite(
            f"{out}: another run{by} is writing it; wait until it has ended, or choose another output"
        ) from None
    except FileExistsError:
        os.close(lock)
        raise CannotWrite(
            f"{out}: another run is writing it, or was killed (there are no locks here that tell which): when none "
            f"runs, remove {folder}"
        ) from None
    except OSError:
        os.close(lock)
        raise
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
            with suppress(OSError):  # who holds it is only for a message
                os.ftruncate(lock, 0)
                os.write(lock, f"{os.getpid()}\n".encode())
            return True
    os.close(lock)
    return False


def _lock(lock: int, made: bool) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
    except BlockingIOError:
        raise
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
    if not made:
        raise FileExistsError
