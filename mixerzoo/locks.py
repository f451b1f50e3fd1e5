"""Locks between processes. The system lets go of them when a process ends, however it ends.

Where the system or the file system has no such locks, every lock is granted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mixerzoo.errors import MixerzooError

LIBRARY = "library.lock"  # marks a folder as a library, and is shared by the processes that use it


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Lock the file `path`, made if need be; return a descriptor that holds the lock until it is closed.

    Args:
        path: the file.
        shared: others may hold it too, if they share it.
        wait: until it is free; otherwise return None if it is not.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor, shared=shared, wait=wait):
                os.close(descriptor)
                return None
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed the file since


@contextmanager
def held(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `path` during the block, and remove the file after it; yields False if another holds it."""
    descriptor = acquire(path, wait=wait)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows removes no file that is open
            path.unlink()
        os.close(descriptor)


@contextmanager
def alone(folder: Path, does: str) -> Iterator[None]:
    """Keep other processes from working in a folder during the block, by a lock beside it.

    Args:
        folder: which need not be there; its parent is made.
        does: what another process does there, such as `trains`.

    Raises:
        MixerzooError: if one does, or the lock cannot be made.
    """
    lock = lock_of(folder)
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            free = stack.enter_context(held(lock, wait=False))
        except OSError as error:
            raise MixerzooError(
                f"'{folder}' cannot be written ({error.strerror}); give another --out"
            ) from None
        if not free:
            raise MixerzooError(
                f"'{folder}': another process {does} there; wait for it, or give another --out"
            )
        yield


def lock_of(folder: Path) -> Path:
    """Return the file beside a folder whose lock is the folder's, whatever path leads to the folder."""
    there = folder.resolve()
    return there.with_name(f".{there.name}.lock")


def _lock(descriptor: int, *, shared: bool, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
