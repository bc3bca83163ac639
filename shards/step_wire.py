"""A step as the bytes of one frame, on its way from rank 0 to the others.

Unsigned 32-bit integers, little-endian: of each chunk start, number of tokens, number of blocks, whether it
wants logits, the tokens, the blocks.
"""

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
