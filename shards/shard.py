"""What one process of an engine holds and computes: a decoder, or a rank's share of it, and its cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.groups.base import TensorGroup
from router.groups.single import SingleRank
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.expert_store import ExpertStore, LocalExperts
from shards.kv_cache import KVCache, block_numbers
from shards.layers.moe import Experts
from shards.models.decoder import Decoder
from shards.partition import Share, all_experts, all_tensors, engine_tensors
from shards.step import StepBatch
from shards.weight_reader import Progress, WeightReader


@dataclass(frozen=True)
class Shard:
    """One rank of a model that is ready to run; all ranks run the same steps."""

    decoder: Decoder
    cache: KVCache
    block_sizes: tuple[int, ...]  # numbers in a block of each rank, which may have more KV heads than others

    def run(self, batch: StepBatch) -> Tensor:
        """Compute one step. Returns logits_RV, fp32: a row for each chunk that wants logits, in order.

        Blocks until the other ranks have done their parts, and raises GroupLost if one is gone.
        """
        return self.decoder.forward(batch, self.cache)

    def read_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """Return what all ranks have in these blocks: fp32 in host memory, a row for each block.

        All ranks must call it; blocks, and raises GroupLost, as `run` does.
        """
        group, longest = self.decoder.group, max(self.block_sizes)
        part_BN = self.cache.read(block_ids)
        padded_BN = torch.nn.functional.pad(part_BN, (0, longest - part_BN.size(1)))
        parts = group.all_gather(padded_BN).view(len(block_ids), group.size, longest).unbind(1)
        return torch.cat(
            [part_BN[:, :size] for part_BN, size in zip(parts, self.block_sizes, strict=True)], dim=1
        ).cpu()

    def write_blocks(self, block_ids: Sequence[int], part_BN: Tensor) -> None:
        """Fill this rank's part of some blocks: its columns, `block_sizes` wide, of rows of `read_blocks`."""
        self.cache.write(block_ids, part_BN)


def load_shard(
    checkpoint: Checkpoint,
    config: ModelConfig,
    experts: Experts | None,
    num_blocks: int,
    progress: Progress,
    group: TensorGroup | None = None,
) -> Shard:
    """Read the weights that one rank of `group` holds of an engine, or all of them, and reserve its cache.

    With `experts` None, a sparse model's experts are loaded into this process, too: all of them, but of each
    the rank's part. Blocks on the disk; raises BrokenCheckpoint before anything is read, and ValueError if
    the model can't be divided among so many ranks.
    """
    group = group or SingleRank()
    share = Share.of(config, group.rank, group.size)
    divide_tokens = experts is not None and group.size > 1
    if config.is_sparse and experts is None:
        reader = WeightReader(checkpoint, all_tensors(config), progress, parts=share.parts())
        experts = LocalExperts(ExpertStore.read(reader, all_experts(config)), config)
    else:
        reader = WeightReader(checkpoint, engine_tensors(config), progress, parts=share.parts())
    decoder = Decoder.read(reader, share, experts, group, divide_tokens)
    shares = [Share.of(config, rank, group.size) for rank in range(group.size)]
    sizes = tuple(block_numbers(share.config) for share in shares)
    return Shard(decoder, KVCache.allocate(share.config, num_blocks), sizes)
