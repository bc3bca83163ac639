"""A stand-in for the model: each logit depends on all tokens before it, as found in a paged cache."""

from hashlib import blake2b

import numpy as np
import torch

from shards.kv_cache import BLOCK_SIZE

VOCAB_SIZE = 64
DIGEST_SIZE = 16  # of what stands for the keys and values of one position


class ExpertGone(Exception):
    """An error of the kind that fails a step's requests and no more."""


class FakeRunner:
    """Compute "keys and values" by hashing, and write and read them by block and offset as the model does.

    A wrong block, a stale one, a wrong position or a hole in the history each change the next logits.
    """

    def __init__(self, num_blocks, max_step_tokens):
        self.num_blocks = num_blocks
        self.max_step_tokens = max_step_tokens
        self.cache = {}  # (block, offset) -> bytes
        self.batches = []
        self.next_error = None  # raised by the next run, when half of it is written

    def run(self, batch):
        assert 0 < batch.num_tokens <= self.max_step_tokens
        self.batches.append(batch)
        written = set()
        for chunk in batch.chunks:
            assert len(chunk.block_ids) == -(-chunk.end // BLOCK_SIZE)
            assert all(0 <= block < self.num_blocks for block in chunk.block_ids)
            for position, token_id in enumerate(chunk.token_ids, start=chunk.start):
                before = self._read(chunk, position - 1) if position else b""
                place = self._place(chunk, position)
                assert place not in written, "two chunks of one step write to the same place"
                written.add(place)
                self.cache[place] = blake2b(before + bytes([token_id]), digest_size=DIGEST_SIZE).digest()
            if self.next_error:
                error, self.next_error = self.next_error, None
                raise error
        # Only now, so that a chunk which wrote into another's blocks is noticed whatever their order.
        rows = [self._logits(chunk) for chunk in batch.chunks if chunk.wants_logits]
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(rows), VOCAB_SIZE))

    def read_blocks(self, block_ids):
        return torch.stack([self._row(block) for block in block_ids])

    def write_blocks(self, block_ids, rows_BN):
        for block, row in zip(block_ids, rows_BN, strict=True):
            data = row.numpy().tobytes()
            for offset in range(BLOCK_SIZE):
                self.cache[block, offset] = data[offset * DIGEST_SIZE : (offset + 1) * DIGEST_SIZE]

    def _row(self, block):
        data = b"".join(self.cache[block, offset] for offset in range(BLOCK_SIZE))
        return torch.from_numpy(np.frombuffer(data, np.float32).copy())

    def _place(self, chunk, position):
        return chunk.block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE

    def _read(self, chunk, position):
        return self.cache[self._place(chunk, position)]

    def _logits(self, chunk):
        history = b"".join(self._read(chunk, position) for position in range(chunk.end))
        key = int.from_bytes(blake2b(history, digest_size=8).digest(), "little")
        words = np.random.Philox(key=key).random_raw(VOCAB_SIZE)
        return (words >> np.uint64(40)).astype(np.float32) / 2**21  # 0 to 8
