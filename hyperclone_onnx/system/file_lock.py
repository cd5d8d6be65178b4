"""Locking an open file for as long as it is open: the kernel unlocks it when the process ends, by a kill too."""

from __future__ import annotations

import os
import sys

if sys.platform == "win32":
    import msvcrt

    LOCKED_BYTE = 1 << 30
    """Windows lets no other process read a byte that is locked. This one lies far behind what the file holds."""

    def try_lock(descriptor: int) -> bool:
        """Lock an open file; False where another process, or another descriptor of this one, has locked it.

        Raises:
            OSError: this file system has no locks.
        """
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def try_lock(descriptor: int) -> bool:
        """Lock an open file; False where another process, or another descriptor of this one, has locked it.

        Raises:
            OSError: this file system has no locks.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on some network file systems
            return False
        return True
