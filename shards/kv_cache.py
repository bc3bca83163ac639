"""The paged keys and values of every sequence in the engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.config import ModelConfig

# Tokens per block. Fixed: the kernels are compiled for it, sixteen fp32 keys fill one AVX-512 register, and
# the 64 positions that attention folds at once are four whole blocks.
BLOCK_SIZE = 16


@dataclass(frozen=True)
class KVCache:
    """One pair of tensors per layer, in fp32, laid out for the attention kernel.

    B blocks   G KV heads   H head_dim   S BLOCK_SIZE
    """

    keys_BGHS: tuple[Tensor, ...]  # transposed inside a block: one vector load is 16 keys' values of one dim
    values_BGSH: tuple[Tensor, ...]

    @classmethod
    def allocate(cls, config: ModelConfig, num_blocks: int) -> "KVCache":
        """Reserve memory for `num_blocks` blocks; the system commits a page when it is first written."""
        heads, dim = config.num_kv_heads, config.head_dim
        return cls(
            tuple(torch.empty(num_blocks, heads, dim, BLOCK_SIZE) for _ in range(config.num_layers)),
            tuple(torch.empty(num_blocks, heads, BLOCK_SIZE, dim) for _ in range(config.num_layers)),
        )

    def read(self, block_ids: Sequence[int]) -> Tensor:
        """Return a row for each block with all its numbers, layer by layer, keys before values: fp32.

        The rows are copies, on the device of the cache.
        """
        parts = [tensor[list(block_ids)].flatten(1) for tensor in self._tensors()]
        return torch.cat(parts, dim=1)

    def write(self, block_ids: Sequence[int], rows: Tensor) -> None:
        """Fill blocks with rows of `read`, from any device."""
        start = 0
        for tensor in self._tensors():
            end = start + tensor[0].numel()
            tensor[list(block_ids)] = rows[:, start:end].view(-1, *tensor.shape[1:]).to(tensor.device)
            start = end

    def _tensors(self) -> Iterator[Tensor]:
        for pair in zip(self.keys_BGHS, self.values_BGSH, strict=True):
            yield from pair


def block_numbers(config: ModelConfig) -> int:
    """Return how many numbers one block has over all layers, keys and values: a row of `KVCache.read`."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * BLOCK_SIZE


def block_bytes(config: ModelConfig) -> int:
    """Return the bytes of one block over all layers, keys and values, in fp32."""
    return block_numbers(config) * 4
