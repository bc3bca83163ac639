"""Memory in huge pages."""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch

from shards.kernels import huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (18, 576, 32), (1 << 20,), (97, 1 << 15)])
def test_all_of_a_tensor_can_be_written_and_read(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = huge_pages.empty(shape, dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    expected = torch.arange(tensor.numel()).remainder(251).to(dtype).view(shape)
    tensor.copy_(expected)
    assert torch.equal(tensor, expected)


def test_a_large_tensor_begins_with_a_page():
    assert huge_pages.empty((1 << 20,), torch.float32).data_ptr() % huge_pages.PAGE_BYTES == 0


def huge_bytes(address: int) -> int | None:
    """Return how much of the mapping at this address lies in huge pages; None if nothing is mapped there."""
    # Not of the whole process: the system turns other memory of it into huge pages when it has time.
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in mapping.groups())
            is_there = start <= address < end
        elif is_there and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return None


def has_huge_pages() -> bool:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform == "linux" and path.exists() and "[never]" not in path.read_text()


@pytest.mark.skipif(not has_huge_pages(), reason="the system gives no huge pages")
def test_it_lies_in_huge_pages_that_go_with_the_tensor():
    num_bytes = 16 * huge_pages.PAGE_BYTES
    tensor = huge_pages.empty((num_bytes,), torch.uint8)
    tensor.zero_()
    address = tensor.data_ptr()
    assert (huge_bytes(address) or 0) >= num_bytes  # more, if the system has joined it with a neighbour's
    del tensor
    gc.collect()
    assert not huge_bytes(address)
