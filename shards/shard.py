"""What one engine process holds and computes: a decoder and its cache."""

from dataclasses import dataclass

from torch import Tensor

from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.expert_store import ExpertStore, LocalExperts
from shards.kv_cache import KVCache
from shards.layers.moe import Experts
from shards.models.decoder import Decoder
from shards.partition import all_experts, all_tensors, engine_tensors
from shards.step import StepBatch
from shards.weight_reader import Progress, WeightReader


@dataclass(frozen=True)
class Shard:
    """A model that is ready to run."""

    decoder: Decoder
    cache: KVCache

    def run(self, batch: StepBatch) -> Tensor:
        """Compute one step. Returns logits_RV, fp32: a row for each chunk that wants logits, in order."""
        return self.decoder.forward(batch, self.cache)


def load_shard(
    checkpoint: Checkpoint, config: ModelConfig, experts: Experts | None, num_blocks: int, progress: Progress
) -> Shard:
    """Read an engine's weights and reserve its cache.

    With `experts` None, a sparse model's experts are loaded into this process, too. Blocks on the disk;
    raises BrokenCheckpoint before anything is read.
    """
    if config.is_sparse and experts is None:
        reader = WeightReader(checkpoint, all_tensors(config), progress)
        experts = LocalExperts(ExpertStore.read(reader, all_experts(config)), config)
    else:
        reader = WeightReader(checkpoint, engine_tensors(config), progress)
    return Shard(Decoder.read(reader, config, experts), KVCache.allocate(config, num_blocks))
