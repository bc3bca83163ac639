"""Root mean square normalization.

T tokens   D hidden
"""

from dataclasses import dataclass

from torch import Tensor

from shards.kernels.cpu import rms_norm
from shards.weight_reader import WeightReader


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), in fp32."""

    weight_D: Tensor
    eps: float

    @classmethod
    def read(cls, reader: WeightReader, name: str, eps: float) -> "RmsNorm":
        return cls(reader.vector(f"{name}.weight"), eps)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight_D, self.eps)
