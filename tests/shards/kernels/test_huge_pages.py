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


def huge_bytes() -> int:
    (kilobytes,) = re.findall(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(kilobytes) << 10


def has_huge_pages() -> bool:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform == "linux" and path.exists() and "[never]" not in path.read_text()


@pytest.mark.skipif(not has_huge_pages(), reason="the system gives no huge pages")
def test_it_lies_in_huge_pages_that_go_with_the_tensor():
    before = huge_bytes()
    num_bytes = 16 * huge_pages.PAGE_BYTES
    tensor = huge_pages.empty((num_bytes,), torch.uint8)
    tensor.zero_()
    assert huge_bytes() - before == num_bytes
    del tensor
    gc.collect()
    assert huge_bytes() <= before
