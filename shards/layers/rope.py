"""Rotary position embeddings (Su et al. 2021), as tables.

P positions   H half of head_dim
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.config import ModelConfig


@dataclass(frozen=True)
class RopeTables:
    """Cosine and sine of every angle that a position of the context can need, fp32."""

    cos_PH: Tensor
    sin_PH: Tensor

    @classmethod
    def compute(cls, config: ModelConfig) -> "RopeTables":
        """Compute the tables in fp32 throughout: Hugging Face's roundings, so logits agree far out, too."""
        exponent_H = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequency_H = 1.0 / config.rope_theta**exponent_H
        position_P = torch.arange(config.context_length, dtype=torch.float32)
        angle_PH = position_P[:, None] * frequency_H
        return cls(angle_PH.cos(), angle_PH.sin())
