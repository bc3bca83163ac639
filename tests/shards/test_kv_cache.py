"""Blocks as rows, on their way to another cache."""

import pytest
import torch

from shards.kv_cache import KVCache, block_numbers

NUM_BLOCKS = 7


@pytest.fixture
def cache(tiny_model) -> KVCache:
    return noise(tiny_model("llama").config, seed=0)


def noise(config, seed: int) -> KVCache:
    cache = KVCache.allocate(config, NUM_BLOCKS)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*cache.keys_BGHS, *cache.values_BGSH):
        tensor.normal_(generator=generator)
    return cache


def test_a_row_has_all_of_a_block(tiny_model, cache):
    assert cache.read([4, 2]).shape == (2, block_numbers(tiny_model("llama").config))
    assert torch.equal(cache.read([4, 2])[1], cache.read([2])[0])


def test_what_is_read_here_and_written_there_is_the_same_block_and_no_other_changes(tiny_model, cache):
    other = noise(tiny_model("llama").config, seed=1)
    before = other.read(range(NUM_BLOCKS))
    other.write([5, 0], cache.read([3, 6]))
    for mine, its in zip(
        (*cache.keys_BGHS, *cache.values_BGSH), (*other.keys_BGHS, *other.values_BGSH), strict=True
    ):
        assert torch.equal(mine[[3, 6]], its[[5, 0]])
    untouched = [block for block in range(NUM_BLOCKS) if block not in (5, 0)]
    assert torch.equal(other.read(untouched), before[untouched])


def test_a_row_is_a_copy(cache):
    row = cache.read([3])
    before = row.clone()
    cache.write([3], torch.zeros_like(row))
    assert torch.equal(row, before)
