"""What rank 0 has the others do, as the meta of a frame: unsigned 32-bit integers, little-endian.

Of a step, for each chunk: start, number of tokens, number of blocks, whether it wants logits, the tokens, the
blocks. Of blocks to be read or written: their ids.
"""

from collections.abc import Sequence

import numpy as np

from shards.step import Chunk, StepBatch

_HEAD = 4  # numbers in front of a chunk's tokens


def encode_step(batch: StepBatch) -> bytes:
    """Encode a step."""
    numbers: list[int] = []
    for chunk in batch.chunks:
        numbers += (chunk.start, len(chunk.token_ids), len(chunk.block_ids), chunk.wants_logits)
        numbers += chunk.token_ids
        numbers += chunk.block_ids
    return np.array(numbers, "<u4").tobytes()


def decode_step(data: bytes | memoryview) -> StepBatch:
    """Invert `encode_step`. Raises ValueError for anything else."""
    numbers: list[int] = np.frombuffer(data, "<u4").tolist()
    chunks: list[Chunk] = []
    at = 0
    while at < len(numbers):
        if len(numbers) < at + _HEAD:
            raise ValueError(f"not a step: it ends within a chunk, after {len(numbers)} numbers")
        start, num_tokens, num_blocks, wants_logits = numbers[at : at + _HEAD]
        blocks = at + _HEAD + num_tokens
        end = blocks + num_blocks
        if end > len(numbers) or wants_logits > 1:
            raise ValueError(f"not a step: chunk {len(chunks)} is damaged")
        tokens = tuple(numbers[at + _HEAD : blocks])
        chunks.append(Chunk(tokens, start, tuple(numbers[blocks:end]), bool(wants_logits)))
        at = end
    return StepBatch(tuple(chunks))


def encode_block_ids(block_ids: Sequence[int]) -> bytes:
    """Encode the ids of KV blocks."""
    return np.array(block_ids, "<u4").tobytes()


def decode_block_ids(data: bytes | memoryview) -> list[int]:
    """Invert `encode_block_ids`. Raises ValueError for anything else."""
    ids: list[int] = np.frombuffer(data, "<u4").tolist()
    return ids
