"""Tiny random models, saved as Hugging Face saves them; Hugging Face itself is the oracle."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.kv_cache import BLOCK_SIZE
from shards.shard import Shard, load_shard
from shards.step import Chunk, StepBatch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}

# head_dim of None is hidden_size / num_attention_heads
MODELS = {
    "llama": ("Llama", {"hidden_size": 64, "head_dim": None}),
    "llama-uneven": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "llama-tied-mha": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "mixtral-uneven": (
        "Mixtral",
        {"num_local_experts": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 20},
    ),
    "mixtral-tied-window": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 20, "tie_word_embeddings": True},
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint on disk, and how to get an oracle for it."""

    directory: Path

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_checkpoint(self.directory)

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.directory)

    def shard(self, num_blocks: int = 64) -> Shard:
        return load_shard(self.checkpoint, self.config, None, num_blocks, lambda done, total: None)

    def oracle(self) -> transformers.PreTrainedModel:
        """Load the checkpoint as Hugging Face does, in fp32."""
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def oracle_logits(self, token_ids: tuple[int, ...]) -> Tensor:
        """Return logits_TV, one row for each position."""
        return self.oracle()(torch.tensor([token_ids])).logits[0]

    def tokens(self, count: int, seed: int = 0) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(self.config.vocab_size, (count,), generator=generator).tolist())


@torch.no_grad()
def save_random_model(name: str, dtype: torch.dtype, directory: Path) -> None:
    """Save a model whose weights are large enough that every part of it shows in the logits."""
    family, overrides = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1
        parameter.copy_(1 + 0.2 * noise if is_norm else noise * 1.5 / math.sqrt(parameter.size(-1)))
    model.to(dtype).save_pretrained(directory)


def chunks_of(
    token_ids: tuple[int, ...], sizes: list[int], block_ids: tuple[int, ...], start: int = 0
) -> list[Chunk]:
    """Cut a sequence into chunks of these sizes, all of which want logits."""
    assert sum(sizes) == len(token_ids)
    chunks = []
    for size in sizes:
        end = start + size
        chunks.append(Chunk(token_ids[start:end], start, block_ids[: -(-end // BLOCK_SIZE)], True))
        start = end
    return chunks


def run_alone(shard: Shard, chunks: list[Chunk]) -> Tensor:
    """Run each chunk in a step of its own; return the logits of all, a row each."""
    return torch.cat([shard.run(StepBatch((chunk,))) for chunk in chunks])
