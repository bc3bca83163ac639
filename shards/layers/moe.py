"""The sparse mixture of experts, wherever the experts live.

T tokens   K experts per token   E experts   D hidden
"""

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from shards.kernels.cpu import PackedWeight, linear


class Experts(Protocol):
    """The experts of a model: within this process, or behind links."""

    def __call__(self, layer: int, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
        """Return y_TKD, fp32: what expert `expert_TK[t, k]` (int64) of `layer` made of token t.

        Blocks until the last row is there.
        """


@dataclass(frozen=True)
class SparseMoe:
    """A gate that chooses experts for each token, and the weighted sum of what they made of it."""

    layer: int
    gate: PackedWeight
    experts_per_token: int
    experts: Experts

    def __call__(self, x_TD: Tensor) -> Tensor:
        weight_TK, expert_TK = choose(linear(x_TD, self.gate), self.experts_per_token)
        return combine(self.experts(self.layer, x_TD, expert_TK), weight_TK)


def choose(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return weight_TK and expert_TK of the `top_k` likeliest experts of each token, likeliest first.

    Of equally likely experts, the one with the lower number comes first: `topk` would promise no order.
    The softmax is over the chosen only, which equals renormalizing the softmax over all (Jiang et al. 2024).
    """
    sorted_TE, order_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
    chosen_TK = sorted_TE[:, :top_k]
    exp_TK = (chosen_TK - chosen_TK[:, :1]).exp()
    return exp_TK / _sum_in_order(exp_TK)[:, None], order_TE[:, :top_k].contiguous()


def combine(y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """Return each token's weighted sum over its experts, added up in top-k order, each step in fp32."""
    return _sum_in_order(y_TKD * weight_TK[:, :, None])


def _sum_in_order(terms: Tensor) -> Tensor:
    """Add up over dimension 1, first to last: `Tensor.sum` promises no order, and rounding depends on it."""
    return reduce(torch.add, terms.unbind(1))
