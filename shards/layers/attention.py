"""Grouped-query attention over the paged cache.

T tokens   D hidden   X heads * head_dim   B blocks   G KV heads   H head_dim   S BLOCK_SIZE
"""

from dataclasses import dataclass

from torch import Tensor

from shards.config import ModelConfig
from shards.kernels.cpu import PackedWeight, Spans, attention, linear, rope_and_cache
from shards.layers.rope import RopeTables
from shards.weight_reader import WeightReader


@dataclass(frozen=True)
class Attention:
    """Causal self-attention; q, k and v come from one product."""

    qkv: PackedWeight
    out: PackedWeight
    num_heads: int
    scale: float
    window: int | None

    @classmethod
    def read(cls, reader: WeightReader, prefix: str, config: ModelConfig) -> "Attention":
        return cls(
            reader.packed(*(f"{prefix}{name}_proj.weight" for name in "qkv")),
            reader.packed(f"{prefix}o_proj.weight"),
            config.num_heads,
            config.head_dim**-0.5,
            config.sliding_window,
        )

    def __call__(
        self, x_TD: Tensor, spans: Spans, rope: RopeTables, keys_BGHS: Tensor, values_BGSH: Tensor
    ) -> Tensor:
        """Write the tokens' keys and values to the cache, then let each token attend to those it may see."""
        qkv_TX = linear(x_TD, self.qkv)
        q_TX = rope_and_cache(qkv_TX, spans, rope.cos_PH, rope.sin_PH, keys_BGHS, values_BGSH, self.num_heads)
        mixed_TX = attention(q_TX, spans, keys_BGHS, values_BGSH, self.num_heads, self.scale, self.window)
        return linear(mixed_TX, self.out)
