"""Memory that processes of one host share: whoever is given its file maps it, and nothing is copied."""

import ctypes
import errno
import fcntl
import functools
import logging
import os
import resource
import weakref

import torch
from torch import Tensor

from router.links.open_file import OpenFile
from shards.kernels.huge_pages import PAGE_BYTES
from shards.kernels.library import library

_log = logging.getLogger(__name__)

MIN_BYTES = PAGE_BYTES // 2  # less is not worth a page of its own
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; the fcntl module of Python 3.11 lacks it
_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW")  # Linux


def create(num_bytes: int) -> tuple[Tensor, OpenFile] | None:
    """Return uint8 memory, to be written by this process alone, and the file that others map it by.

    None for less than MIN_BYTES, and where the system gives no huge pages to share (Linux before 6.1):
    memory of one's own is better then (docs/decisions/0018-groups-of-a-host-share-weights.md). Also where
    half of the descriptors are taken: links need some, too.
    """
    if num_bytes < MIN_BYTES or not hasattr(os, "memfd_create"):
        return None
    try:
        file = OpenFile(os.memfd_create("tradewind-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        if is_scarce(file):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        os.ftruncate(file.fileno(), _whole_pages(num_bytes))
        data = _map(file, num_bytes, is_new=True)
        fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, _seals())
    except OSError as error:
        _note(str(error))
        return None
    return data, file


def is_scarce(file: OpenFile) -> bool:
    """Say whether a file should not be kept open: its descriptor, the lowest that was free, is a high one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit != resource.RLIM_INFINITY and file.fileno() >= limit // 2


def adopt(file: OpenFile, num_bytes: int) -> Tensor:
    """Return the uint8 memory of a file that another process has created. Whoever writes to it is killed.

    It stays until nobody maps it, whatever becomes of its creator. Raises ValueError if the file is of
    another size, or could still be cut short or written to; OSError if the system refuses.
    """
    size, expected = os.fstat(file.fileno()).st_size, _whole_pages(num_bytes)
    if size != expected:
        raise ValueError(f"{num_bytes} bytes need a file of {expected} bytes, of huge pages; it has {size}")
    seals = fcntl.fcntl(file.fileno(), fcntl.F_GET_SEALS)  # fails for any file that is not in memory
    if seals & _seals() != _seals():
        raise ValueError(f"the file has the seals {seals:#x}, but {_seals():#x} are needed")
    return _map(file, num_bytes, is_new=False)


def _map(file: OpenFile, num_bytes: int, is_new: bool) -> Tensor:
    whole_bytes = _whole_pages(num_bytes)
    address = library().tw_map_shared(file.fileno(), whole_bytes, is_new)
    if address is None:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    weakref.finalize(memory, library().tw_unmap, address, whole_bytes).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`


@functools.cache
def _note(reason: str) -> None:
    """Tell once why memory is not shared."""
    _log.info("weights are not shared with other processes: %s", reason)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _seals() -> int:
    """Return the seals of a file that will always be as long as it is, and written to by its creator only."""
    seals = _F_SEAL_FUTURE_WRITE
    for name in _SEALS:
        seals |= getattr(fcntl, name)
    return seals
