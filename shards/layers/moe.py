"""The sparse mixture of experts, wherever the experts live.

T tokens   K experts per token   E experts   D hidden
R ranks   S tokens of one rank, T / R rounded up   C columns: D, and two for a loss
"""

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from router.dispatch import ExpertUnavailable
from router.groups.base import TensorGroup
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


@dataclass(frozen=True)
class DividedMoe:
    """A mixture whose tokens the ranks divide: each sends only its own to the experts, so none goes twice.

    Rank r has the tokens r, r + R, r + 2R and so on. Experts that can't be had fail the step on all ranks:
    a rank that loses one says so in what is gathered, instead of leaving the others to wait for it.
    """

    moe: SparseMoe
    group: TensorGroup

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return what `moe` makes of all tokens. Raises ExpertUnavailable on every rank, or on none."""
        (num_tokens, hidden), rank, size = x_TD.shape, self.group.rank, self.group.size
        mine_SC = x_TD.new_zeros(-(-num_tokens // size), hidden + 2)
        own_SD = x_TD[rank::size].contiguous()
        lost: ExpertUnavailable | None = None
        try:
            if len(own_SD):
                mine_SC[: len(own_SD), :hidden] = self.moe(own_SD)
        except ExpertUnavailable as error:
            lost, (_, expert, waited_s, _) = error, error.args
            mine_SC[0, hidden:] = torch.tensor([1 + expert, waited_s])
        all_TC = self.group.all_gather(mine_SC).view(-1, hidden + 2)  # side by side: token 0, 1, 2 ...
        losses = all_TC[all_TC[:, hidden] > 0, hidden:].tolist()
        if losses:
            raise lost or ExpertUnavailable(self.moe.layer, int(losses[0][0]) - 1, losses[0][1])
        return all_TC[:num_tokens, :hidden]


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
