"""Attention and the way into the cache, against slow obvious code.

T tokens   B blocks   G KV heads   H head_dim   S BLOCK_SIZE
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shards.kernels import cpu
from shards.kv_cache import BLOCK_SIZE

NUM_BLOCKS, MAX_POSITIONS = 64, 700


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    cpu.set_threads(1, 0)


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    dim: int

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.dim


SMALL = Heads(3, 1, 16)


@dataclass(frozen=True)
class Part:
    """Tokens [start, end) of a sequence `qkv` that lives in `block_ids`."""

    qkv: Tensor
    start: int
    end: int
    block_ids: tuple[int, ...]


def sequence(num_tokens: int, heads: Heads, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, heads.qkv_width, generator=torch.Generator().manual_seed(seed))


@functools.cache
def tables(heads: Heads) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, heads.dim, 2) / heads.dim)
    angles = torch.arange(MAX_POSITIONS)[:, None] * frequencies
    return angles.cos(), angles.sin()


def empty_cache(heads: Heads) -> tuple[Tensor, Tensor]:
    """Make a cache full of NaN: whatever reads what was not written shows."""
    shape = (NUM_BLOCKS, heads.num_kv_heads)
    keys = torch.full((*shape, heads.dim, BLOCK_SIZE), float("nan"))
    return keys, torch.full((*shape, BLOCK_SIZE, heads.dim), float("nan"))


def spans_of(parts: list[Part]) -> cpu.Spans:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.end - part.start)
    width = max(len(part.block_ids) for part in parts) + 1
    table = [[*part.block_ids, *[-77] * (width - len(part.block_ids))] for part in parts]
    return cpu.Spans(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([part.start for part in parts], dtype=torch.int32),
        torch.tensor(table, dtype=torch.int32),
    )


def run(
    parts: list[Part], heads: Heads, cache: tuple[Tensor, Tensor], window: int | None = None
) -> list[Tensor]:
    """Run the parts as one step and return the output of each."""
    spans = spans_of(parts)
    qkv = torch.cat([part.qkv[part.start : part.end] for part in parts])
    q = cpu.rope_and_cache(qkv, spans, *tables(heads), *cache, heads.num_heads)
    out = cpu.attention(q, spans, *cache, heads.num_heads, heads.dim**-0.5, window)
    return list(out.split([part.end - part.start for part in parts]))


def rotated(x: Tensor, heads: Heads) -> Tensor:
    """Rotate [T, heads, dim] as Hugging Face's apply_rotary_pos_emb does."""
    cos, sin = (torch.cat([table, table], dim=-1)[: x.size(0), None] for table in tables(heads))
    half = heads.dim // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    x = qkv.view(qkv.size(0), -1, heads.dim)
    q, k, v = x.split([heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1)
    return rotated(q, heads), rotated(k, heads), v


def reference(qkv: Tensor, heads: Heads, window: int | None) -> Tensor:
    q, k, v = (x.double() for x in split(qkv, heads))
    group = heads.num_heads // heads.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", q, k) * heads.dim**-0.5
    distance = torch.arange(qkv.size(0))[:, None] - torch.arange(qkv.size(0))
    hidden = (distance < 0) | (distance >= (window or qkv.size(0)))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 64, 100])
@pytest.mark.parametrize(
    "heads", [SMALL, Heads(4, 4, 80), Heads(9, 3, 64), Heads(8, 2, 128), Heads(12, 1, 32)]
)
def test_attention_agrees_with_a_float64_softmax(heads, window):
    qkv = sequence(213, heads)
    (out,) = run([Part(qkv, 0, 213, tuple(range(5, 19)))], heads, empty_cache(heads), window)
    torch.testing.assert_close(out.double(), reference(qkv, heads, window), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_chunks_of_several_sequences_share_a_step(window):
    heads, cache = Heads(4, 2, 32), empty_cache(Heads(4, 2, 32))
    first, second, third = sequence(150, heads, 1), sequence(70, heads, 2), sequence(1, heads, 3)
    blocks = (tuple(range(10)), tuple(range(20, 25)), (40,))
    run([Part(first, 0, 149, blocks[0]), Part(second, 0, 13, blocks[1])], heads, cache, window)
    parts = [Part(second, 13, 70, blocks[1]), Part(third, 0, 1, blocks[2]), Part(first, 149, 150, blocks[0])]
    outs = run(parts, heads, cache, window)
    for part, out in zip(parts, outs, strict=True):
        exact = reference(part.qkv, heads, window)[part.start : part.end]
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("heads", [SMALL, Heads(9, 3, 64), Heads(5, 1, 48)])
def test_neither_chunking_nor_the_number_of_threads_changes_a_bit(heads, window):
    qkv, blocks = sequence(150, heads), tuple(range(10))
    (whole,) = run([Part(qkv, 0, 150, blocks)], heads, empty_cache(heads), window)
    cpu.set_threads(2, 20)
    for size in (1, 15, 16, 17, 64, 65, 130, 150):
        cache = empty_cache(heads)
        chunks = [Part(qkv, at, min(at + size, 150), blocks) for at in range(0, 150, size)]
        assert torch.equal(torch.cat([run([chunk], heads, cache, window)[0] for chunk in chunks]), whole)


def test_neither_the_batch_nor_the_blocks_change_a_bit():
    heads = Heads(6, 2, 32)
    parts = [Part(sequence(n, heads, n), 0, n, ()) for n in (90, 1, 33, 128, 17)]
    alone = [run([Part(p.qkv, 0, p.end, tuple(range(8)))], heads, empty_cache(heads))[0] for p in parts]
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist()
    scattered = [Part(p.qkv, 0, p.end, tuple(free[8 * i : 8 * i + 8])) for i, p in enumerate(parts)]
    for one, other in zip(alone, run(scattered, heads, empty_cache(heads)), strict=True):
        assert torch.equal(one, other)


def test_a_prefix_that_another_sequence_wrote_changes_no_bit():
    heads, cache = SMALL, empty_cache(SMALL)
    first, tail = sequence(100, heads, 1), sequence(100, heads, 2)
    second = torch.cat([first[:64], tail[:40]])
    (whole,) = run([Part(second, 0, 104, tuple(range(20, 27)))], heads, empty_cache(heads))
    run([Part(first, 0, 100, tuple(range(7)))], heads, cache)
    (shared,) = run([Part(second, 64, 104, (0, 1, 2, 3, 30, 31, 32))], heads, cache)
    assert torch.equal(shared, whole[64:])


def test_blocks_before_the_window_are_never_looked_at():
    heads, cache = SMALL, empty_cache(SMALL)
    qkv = sequence(100, heads)
    (whole,) = run([Part(qkv, 0, 100, tuple(range(7)))], heads, cache, window=20)
    (last,) = run([Part(qkv, 99, 100, (-1, 10**6, -1, -1, -1, 5, 6))], heads, cache, window=20)
    assert torch.equal(last, whole[99:])


def test_the_cache_holds_rotated_keys_and_plain_values_where_the_table_says():
    heads = Heads(4, 2, 32)
    keys, values = empty_cache(heads)
    qkv, blocks = sequence(40, heads), (7, 3, 50)
    spans = spans_of([Part(qkv, 0, 40, blocks)])
    q = cpu.rope_and_cache(qkv, spans, *tables(heads), keys, values, heads.num_heads)
    q_exact, k_exact, v_exact = split(qkv, heads)
    assert torch.equal(q, q_exact.flatten(1))
    for t in range(40):
        assert torch.equal(keys[blocks[t // 16], :, :, t % 16], k_exact[t])
        assert torch.equal(values[blocks[t // 16], :, t % 16], v_exact[t])
    assert keys[50, :, :, 8:].isnan().all()
    assert keys.isnan().any(dim=(1, 2, 3)).sum() == NUM_BLOCKS - 2


def test_large_scores_do_not_overflow():
    qkv = 1000 * sequence(70, SMALL)
    (out,) = run([Part(qkv, 0, 70, tuple(range(5)))], SMALL, empty_cache(SMALL))
    assert out.isfinite().all()


def test_a_step_without_tokens_gives_no_rows():
    spans = cpu.Spans(*(torch.zeros(shape, dtype=torch.int32) for shape in ((1,), (0,), (0, 4))))
    cache = empty_cache(SMALL)
    q = cpu.rope_and_cache(torch.empty(0, SMALL.qkv_width), spans, *tables(SMALL), *cache, SMALL.num_heads)
    assert cpu.attention(q, spans, *cache, SMALL.num_heads, 1.0, None).shape == (0, 48)


@pytest.mark.parametrize("block_ids", [(0, NUM_BLOCKS), (0, -1), (0,)])
def test_a_block_that_is_not_there_is_refused(block_ids):
    parts = [Part(sequence(9, SMALL), 0, 9, (3,)), Part(sequence(20, SMALL), 0, 20, block_ids)]
    with pytest.raises(ValueError, match="blocks of chunk 1"):
        run(parts, SMALL, empty_cache(SMALL))


def test_a_position_past_the_rope_tables_is_refused():
    part = Part(sequence(MAX_POSITIONS + 1, SMALL), 0, MAX_POSITIONS + 1, tuple(range(45)))
    with pytest.raises(ValueError, match="position 700 is past the 700 positions"):
        run([part], SMALL, empty_cache(SMALL))


def test_a_head_dim_that_does_not_fill_vectors_is_refused():
    heads = Heads(2, 1, 24)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16, at most 512, not 24"):
        run([Part(sequence(3, heads), 0, 3, (0,))], heads, empty_cache(heads))
