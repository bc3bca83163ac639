"""Memory that several processes map."""

import fcntl
import gc
import mmap
import multiprocessing
import os
import re
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from router.links.open_file import OpenFile
from shards.kernels import shared_pages
from shards.kernels.cpu import PackedWeight, pack
from shards.kernels.huge_pages import PAGE_BYTES
from tests.shards.kernels.shared import needs_sharing

NUM_BYTES = 3 * PAGE_BYTES + 1000


def created(num_bytes: int = NUM_BYTES) -> tuple[torch.Tensor, OpenFile]:
    shared = shared_pages.create(num_bytes)
    assert shared
    return shared


def mappings() -> list[str]:
    """Return the addresses of all that this process has mapped of shared weights."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[0] for line in lines if "tradewind-weights" in line]


def huge_bytes(address: int) -> int:
    """Return how many bytes of the mapping at this address are mapped as huge pages."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            is_there = int(mapping[1], 16) == address
        elif is_there and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) << 10
    raise AssertionError("nothing is mapped there")


@needs_sharing
def test_what_is_written_is_seen_where_the_file_is_mapped():
    data, file = created()
    assert (data.dtype, data.numel()) == (torch.uint8, NUM_BYTES)
    other = shared_pages.adopt(file, NUM_BYTES)
    data.copy_(torch.arange(NUM_BYTES).remainder(251))
    assert torch.equal(other, data)
    assert other.data_ptr() != data.data_ptr()


@needs_sharing
def test_both_sides_have_it_in_huge_pages():
    data, file = created()
    other = shared_pages.adopt(file, NUM_BYTES)
    assert huge_bytes(data.data_ptr()) == huge_bytes(other.data_ptr()) == 4 * PAGE_BYTES


@needs_sharing
def test_a_view_keeps_the_memory_and_nothing_else_does():
    before = mappings()
    data, file = created()
    view = data[5:10].view(5, 1)
    del data, file
    gc.collect()
    assert len(mappings()) == len(before) + 1
    view.fill_(7)
    del view
    gc.collect()
    assert mappings() == before


@needs_sharing
def test_nobody_can_cut_it_short_or_map_it_to_write():
    _, file = created()
    with pytest.raises(PermissionError):
        os.ftruncate(file.fileno(), PAGE_BYTES)
    with pytest.raises(PermissionError):
        os.write(file.fileno(), b"x")
    with pytest.raises(PermissionError):
        mmap.mmap(file.fileno(), PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_WRITE)


def hold_weights(pipe: Connection) -> None:
    """Make shared memory, hand its file over, and wait for the end."""
    data, file = created()
    data.fill_(42)
    multiprocessing.reduction.send_handle(pipe, file.fileno(), os.getppid())
    signal.pause()


@needs_sharing
def test_it_outlives_the_process_that_made_it():
    ours, theirs = multiprocessing.Pipe()
    creator = multiprocessing.get_context("spawn").Process(target=hold_weights, args=(theirs,))
    creator.start()
    memory = shared_pages.adopt(OpenFile(multiprocessing.reduction.recv_handle(ours)), NUM_BYTES)
    creator.kill()
    creator.join()
    assert memory.eq(42).all()


@needs_sharing
@pytest.mark.parametrize("num_bytes", [PAGE_BYTES, NUM_BYTES + PAGE_BYTES])
def test_a_file_of_another_size_is_refused(num_bytes: int):
    _, file = created()
    with pytest.raises(
        ValueError, match=rf"{num_bytes} bytes need a file of \d+ bytes.*; it has {4 * PAGE_BYTES}"
    ):
        shared_pages.adopt(file, num_bytes)


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, shared_pages._F_SEAL_FUTURE_WRITE])
def test_a_file_that_its_owner_could_still_change_is_refused(missing: int):
    file = OpenFile(os.memfd_create("x", os.MFD_ALLOW_SEALING))
    os.ftruncate(file.fileno(), PAGE_BYTES)
    fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, shared_pages._seals() & ~missing)
    with pytest.raises(ValueError, match="the file has the seals"):
        shared_pages.adopt(file, PAGE_BYTES)


def test_a_file_that_is_not_in_memory_is_refused(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_BYTES))
    with pytest.raises(OSError, match="Invalid argument"):
        shared_pages.adopt(OpenFile(os.open(path, os.O_RDWR)), PAGE_BYTES)


def test_a_small_matrix_is_not_shared():
    assert shared_pages.create(shared_pages.MIN_BYTES - 1) is None


def test_nothing_is_shared_where_the_system_is_out_of_descriptors(monkeypatch):
    def refuse(name: str, flags: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert shared_pages.create(PAGE_BYTES) is None


@pytest.mark.parametrize(("offset", "is_scarce"), [(-1, False), (0, True)])
def test_descriptors_are_scarce_from_half_of_the_limit_on(offset: int, is_scarce: bool):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    at_least = 2 * (max(map(int, os.listdir("/proc/self/fd"))) + 2)  # behind all that are in use
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * at_least, limits[1]))
    try:
        file = OpenFile(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, at_least + offset))
        assert file.fileno() == at_least + offset
        assert shared_pages.is_scarce(file) == is_scarce
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@needs_sharing
def test_nothing_is_shared_where_descriptors_are_scarce(monkeypatch):
    monkeypatch.setattr(shared_pages, "is_scarce", lambda file: True)
    assert shared_pages.create(PAGE_BYTES) is None


@needs_sharing
def test_where_descriptors_are_scarce_a_weight_is_mapped_and_its_file_closed(monkeypatch):
    packed = pack(torch.ones(1024, 1024), is_shared=True)
    assert packed.file
    monkeypatch.setattr(shared_pages, "is_scarce", lambda file: True)
    mapped = PackedWeight.mapped(1024, 1024, torch.float32, packed.file)
    assert mapped.file is None
    assert torch.equal(mapped.data, packed.data)
