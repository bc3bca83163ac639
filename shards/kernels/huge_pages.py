"""Memory for weights in huge pages, where the system has them."""

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor; a large one begins and ends with a huge page.

    Huge pages spare the processor's address cache. And a process that is killed closes its sockets only when
    its memory has been given back, page by page; so long nobody knows: 80 ms for 1.3 GB of small pages, 5 ms
    for huge ones (docs/decisions/0012-huge-pages.md). What is freed goes back to the system at once.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < PAGE_BYTES // 2 or _ADVICE is None:
        return torch.empty(*shape, dtype=dtype)
    whole_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    region = mmap.mmap(-1, whole_bytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(_ADVICE)
    data = torch.frombuffer(region, dtype=torch.uint8)  # keeps the region
    start = -data.data_ptr() % PAGE_BYTES
    return data[start : start + num_bytes].view(dtype).view(*shape)
