"""The gated feed-forward network: of a dense layer, and of each expert of a sparse one.

T tokens   D hidden
"""

from dataclasses import dataclass

from torch import Tensor

from shards.kernels.cpu import PackedWeight, linear, silu_mul
from shards.weight_reader import WeightReader


@dataclass(frozen=True)
class GatedMlp:
    """down(silu(gate x) * up x) (Shazeer 2020); gate and up come from one product."""

    gate_up: PackedWeight
    down: PackedWeight

    @classmethod
    def read(cls, reader: WeightReader, gate: str, up: str, down: str) -> "GatedMlp":
        return cls(reader.packed(f"{gate}.weight", f"{up}.weight"), reader.packed(f"{down}.weight"))

    def __call__(self, x_TD: Tensor, out_TD: Tensor | None = None) -> Tensor:
        """Compute each row on its own; write the result to `out_TD` if it is given."""
        return linear(silu_mul(linear(x_TD, self.gate_up)), self.down, out_TD)
