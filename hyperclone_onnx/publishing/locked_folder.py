"""The folder in which one run prepares one OUT. It is locked as long as the run lives."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.system.file_lock import try_lock

LOCK = ".lock"
"""The file in the folder that is locked; it holds the number of the process that locked it."""

NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP") if hasattr(errno, name)}
"""The errors by which a file system says that it has no locks."""


def partial_folder(out: Path) -> Path:
    """Where OUT is written before it is published."""
    return out.with_name(f".{out.name}.partial")


@dataclass
class LockedFolder:
    """The folder in which one run prepares one OUT, locked as long as `lock` is open."""

    folder: Path
    lock: int | None
    keep: bool = False
    """Whether the next run must find the folder: its journal names files that this run could not remove."""

    def remove(self) -> None:
        """Delete the folder; what cannot be deleted stays.

        The lock goes last: no other run may take the folder while anything is left in it.
        """
        with suppress(OSError):
            if not self.keep:
                clear(self.folder)
            if os.name == "nt":  # an open file cannot be deleted there
                self._unlock()
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()  # fails where another run has begun to use it
        self._unlock()

    def _unlock(self) -> None:
        _held[:] = [place for place in _held if place is not self]
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


_held: list[LockedFolder] = []
"""The folders that this process has locked."""


def _unlock_all() -> None:
    """In a copy of this process: close its locks, which would otherwise hold as long as the copy lives."""
    for place in list(_held):
        place._unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_all)


def clear(folder: Path) -> None:
    """Delete everything in a folder but its lock."""
    for path in list(folder.iterdir()):
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def take_folder(out: Path) -> LockedFolder:
    """Make and lock the folder for OUT. What a killed run left in it is still there.

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
            except FileNotFoundError:  # the run that had the folder has just removed it
                continue
            try:
                place = _locked(out, folder, lock, made)
            except BaseException:
                os.close(lock)
                raise
            if place is not None:
                _held.append(place)
                return place
            os.close(lock)
    except OSError as problem:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise CannotWrite(f"{out}: cannot be written ({problem.strerror or problem})") from problem
    raise CannotWrite(f"{out}: {folder} is made and removed all the time; choose another output")


def _check_own(out: Path, folder: Path) -> None:
    """Refuse a folder of another user: its owner could change what is published."""
    with suppress(FileNotFoundError):
        status = folder.lstat()
        foreign = hasattr(os, "geteuid") and status.st_uid != os.geteuid()
        if not stat.S_ISDIR(status.st_mode) or foreign:
            raise CannotWrite(f"{out}: {folder} is in the way and not ours; remove it, or choose another output")


def _locked(out: Path, folder: Path, lock: int, made: bool) -> LockedFolder | None:
    """Lock a folder by its open lock file; None when another run has removed the file meanwhile.

    Where there are no locks (some network file systems) a run may use the folder only if it has made it.

    Raises:
        CannotWrite: another run holds it, or may hold it.
    """
    try:
        locked = try_lock(lock)
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        if not made:
            raise CannotWrite(
                f"{out}: another run is writing it, or was killed (there are no locks here that tell which): when none "
                f"runs, remove {folder}"
            ) from None
        locked = True
    if not locked:
        number = os.read(lock, 20).decode("ascii", "replace").strip()
        by = f" (process {number})" if number.isdigit() else ""
        raise CannotWrite(f"{out}: another run{by} is writing it; wait until it has ended, or choose another output")
    try:
        if not os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
            return None
    except FileNotFoundError:
        return None
    with suppress(OSError):  # the number is only for a message
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    return LockedFolder(folder, lock)
