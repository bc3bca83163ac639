"""The gated feed-forward network: of a dense layer, and of each expert of a sparse one.

T tokens   D hidden
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.kernels.cpu import PackedWeight, gated_mlps
from shards.weight_reader import WeightReader


@dataclass(frozen=True)
class GatedMlp:
    """down(silu(gate x) * up x) (Shazeer 2020); gate and up come from one product."""

    gate_up: PackedWeight
    down: PackedWeight

    @classmethod
    def read(cls, reader: WeightReader, gate: str, up: str, down: str) -> "GatedMlp":
        return cls(reader.packed(f"{gate}.weight", f"{up}.weight"), reader.packed(f"{down}.weight"))

    @property
    def nbytes(self) -> int:
        """Of the packed weights."""
        return self.gate_up.data.nbytes + self.down.data.nbytes

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Compute each row on its own."""
        out_TD = torch.empty_like(x_TD)
        run_each([(len(x_TD), self)], x_TD, out_TD)
        return out_TD


def run_each(parts: Iterable[tuple[int, GatedMlp]], x_TD: Tensor, out_TD: Tensor) -> None:
    """Write to row t of `out_TD` what a network makes of row t of `x_TD`; both contiguous, fp32.

    The first part's network has so many of the first rows, the next one's of those behind, up to the last.
    """
    gated_mlps(x_TD, [(num_rows, mlp.gate_up, mlp.down) for num_rows, mlp in parts], out_TD)
