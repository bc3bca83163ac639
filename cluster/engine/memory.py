"""How many KV blocks an engine may have."""

from pathlib import Path

import psutil

from shards.config import ModelConfig
from shards.kv_cache import BLOCK_SIZE, block_bytes

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees itself


def free_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the memory this process may still take: the machine's, or less if its cgroup has a limit.

    Page cache counts as free, as the kernel gives it up when asked; shared memory, which it counts as
    page cache, does not.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free  # the root cgroup, version 1, or not Linux: no limit that we could read
    if limit == "max":
        return free
    page_cache = int(stat.get("file", 0)) - int(stat.get("shmem", 0))
    return max(0, min(free, int(limit) - used + page_cache))


def num_kv_blocks(
    config: ModelConfig,
    context_length: int,
    max_running: int,
    kv_cache_tokens: int | None,
    kv_cache_fraction: float,
    free: int,
) -> int:
    """Choose the size of the KV cache, in blocks.

    `kv_cache_tokens` decides if given; else as many as `kv_cache_fraction` of `free` bytes holds, but no
    more than `max_running` requests of full length could ever fill. Raises ValueError if not even one does.
    """
    if kv_cache_tokens is not None:
        num_blocks = kv_cache_tokens // BLOCK_SIZE
    else:
        most = max_running * -(-context_length // BLOCK_SIZE)
        num_blocks = min(int(free * kv_cache_fraction) // block_bytes(config), most)
    if num_blocks < 1:
        raise ValueError(
            f"no memory for a KV cache: a block of {BLOCK_SIZE} tokens takes {block_bytes(config)} bytes and "
            f"{free} bytes are free; raise kv_cache_tokens or kv_cache_fraction, or free some memory"
        )
    return num_blocks
