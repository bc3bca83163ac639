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
    more than `max_running` requests of full length could ever fill, and no fewer than one could. Raises
    ValueError if there is no room for one: a context that depended on the memory free at the moment would
    differ from engine to engine, and so would answers that reach its end.
    """
    fewest = -(-context_length // BLOCK_SIZE)
    if kv_cache_tokens is not None:
        num_blocks = kv_cache_tokens // BLOCK_SIZE
        if num_blocks < fewest:
            raise ValueError(
                f"kv_cache_tokens is {kv_cache_tokens}, but one request may fill a context_length of "
                f"{context_length}; raise kv_cache_tokens to {fewest * BLOCK_SIZE}, or lower context_length "
                f"to {num_blocks * BLOCK_SIZE}"
            )
        return num_blocks
    room = free // block_bytes(config)
    if room < fewest:
        raise ValueError(
            f"one request may fill a context_length of {context_length}, whose KV cache takes "
            f"{fewest * block_bytes(config) / 2**30:.3g} GiB, but {free / 2**30:.3g} GiB are free beside the "
            f"weights; lower context_length ({room * BLOCK_SIZE} would fit), or free some memory"
        )
    return min(max(int(free * kv_cache_fraction) // block_bytes(config), fewest), max_running * fewest)
