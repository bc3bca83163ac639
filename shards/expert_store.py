"""The experts that one process holds.

N rows   T tokens   K experts per token   D hidden
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.layers.mlp import GatedMlp
from shards.partition import expert_prefix, expert_tensors
from shards.weight_reader import Progress, WeightReader


@dataclass(frozen=True)
class ExpertStore:
    """Slots of expert weights; slot s holds the expert `assignments[s]`, a (layer, expert)."""

    assignments: tuple[tuple[int, int], ...]
    experts: tuple[GatedMlp, ...]

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        assignments: Sequence[tuple[int, int]],
        progress: Progress,
    ) -> "ExpertStore":
        """Read the assigned experts, and nothing else. Blocks on the disk; raises BrokenCheckpoint."""
        expected = {
            name: shape
            for layer, expert in assignments
            for name, shape in expert_tensors(config, layer, expert).items()
        }
        return cls.read(WeightReader(checkpoint, expected, progress), assignments)

    @classmethod
    def read(cls, reader: WeightReader, assignments: Sequence[tuple[int, int]]) -> "ExpertStore":
        experts = []
        for layer, expert in assignments:
            prefix = expert_prefix(layer, expert)
            experts.append(GatedMlp.read(reader, f"{prefix}w1", f"{prefix}w3", f"{prefix}w2"))
        return cls(tuple(assignments), tuple(experts))

    def run(self, slot: int, x_ND: Tensor, out_ND: Tensor) -> None:
        """Write w2(silu(w1 x) * w3 x) of each row to `out_ND`; both contiguous, fp32."""
        self.experts[slot](x_ND, out_ND)


class LocalExperts:
    """The experts of a model within the engine's own process: no links, no replicas."""

    def __init__(self, store: ExpertStore, config: ModelConfig) -> None:
        """Take a store that holds each expert of the model exactly once, in any order."""
        self._store = store
        self._num_experts = config.num_experts
        self._slot_of = {assignment: slot for slot, assignment in enumerate(store.assignments)}

    def __call__(self, layer: int, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
        """Run every token through its chosen experts, as `shards.layers.moe.Experts` says."""
        num_tokens, top_k = expert_TK.shape
        expert_N = expert_TK.flatten()
        order_N = expert_N.argsort(stable=True)  # so that each expert's rows lie together
        x_ND = x_TD.index_select(0, order_N // top_k)
        sorted_ND = torch.empty_like(x_ND)
        end = 0
        for expert, num_rows in enumerate(expert_N.bincount(minlength=self._num_experts).tolist()):
            start, end = end, end + num_rows
            if num_rows:
                self._store.run(self._slot_of[layer, expert], x_ND[start:end], sorted_ND[start:end])
        return sorted_ND.index_select(0, order_N.argsort()).view(num_tokens, top_k, -1)
