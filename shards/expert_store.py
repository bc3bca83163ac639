"""The experts that one process holds.

N rows   T tokens   K experts per token   D hidden
"""

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.layers.mlp import GatedMlp, run_each
from shards.partition import expert_prefix, expert_tensors
from shards.weight_reader import Progress, WeightReader


class NotHeld(ValueError):
    """The process does not hold that expert, or no longer; another replica has to be asked."""

    def __init__(self, layer: int, expert: int) -> None:
        super().__init__(f"layer {layer} expert {expert} is not held here")
        self.expert = expert


def read_expert(reader: WeightReader, layer: int, expert: int) -> GatedMlp:
    """Read one expert of a checkpoint. Blocks on the disk; raises BrokenCheckpoint."""
    prefix = expert_prefix(layer, expert)
    return GatedMlp.read(reader, f"{prefix}w1", f"{prefix}w3", f"{prefix}w2")


class ExpertStore:
    """Slots that are filled and freed while rows run; each holds one expert of one layer. Thread-safe."""

    def __init__(self, num_slots: int) -> None:
        """Start with all slots empty."""
        self.num_slots = num_slots
        self._lock = threading.Lock()  # of changes; a look-up is one step of a dict
        self._experts: dict[tuple[int, int], GatedMlp] = {}

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
        """Return a store with a slot for each of the assigned experts, all filled."""
        store = cls(len(assignments))
        for layer, expert in assignments:
            store.put(layer, expert, read_expert(reader, layer, expert))
        return store

    @property
    def held(self) -> tuple[tuple[int, int], ...]:
        """The (layer, expert) of every slot that is filled, at this moment."""
        with self._lock:
            return tuple(self._experts)

    def holds(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._experts

    def put(self, layer: int, expert: int, mlp: GatedMlp) -> None:
        """Fill a slot. Raises ValueError if none is free, or if the expert is held already."""
        with self._lock:
            if (layer, expert) in self._experts:
                raise ValueError(f"layer {layer} expert {expert} is held already; free it first")
            if len(self._experts) >= self.num_slots:
                raise ValueError(
                    f"no slot is free for layer {layer} expert {expert}: all {self.num_slots} are filled"
                )
            self._experts[layer, expert] = mlp

    def free(self, layer: int, expert: int) -> None:
        """Empty the expert's slot, if it has one; whoever runs or sends the weights keeps them until done."""
        with self._lock:
            self._experts.pop((layer, expert), None)

    def get(self, layer: int, expert: int) -> GatedMlp:
        """Return the expert's weights. Raises NotHeld."""
        mlp = self._experts.get((layer, expert))
        if mlp is None:
            raise NotHeld(layer, expert)
        return mlp

    def run(self, layer: int, runs: Iterable[tuple[int, int]], x_ND: Tensor, out_ND: Tensor) -> None:
        """Write w2(silu(w1 x) * w3 x) of each row to `out_ND`; both contiguous, fp32.

        A run is an expert and how many rows go through it; they lie one after the other. Raises NotHeld, and
        has done nothing then.
        """
        run_each([(num_rows, self.get(layer, expert)) for expert, num_rows in runs], x_ND, out_ND)


class LocalExperts:
    """The experts of a model within the engine's own process: no links, no replicas."""

    def __init__(self, store: ExpertStore, config: ModelConfig) -> None:
        """Take a store that holds each expert of the model."""
        self._store = store
        self._num_experts = config.num_experts

    def __call__(self, layer: int, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
        """Run every token through its chosen experts, as `shards.layers.moe.Experts` says."""
        num_tokens, top_k = expert_TK.shape
        expert_N = expert_TK.flatten()
        order_N = expert_N.argsort(stable=True)  # so that each expert's rows lie together
        x_ND = x_TD.index_select(0, order_N // top_k)
        sorted_ND = torch.empty_like(x_ND)
        rows_E = expert_N.bincount(minlength=self._num_experts).tolist()
        runs = [(expert, num_rows) for expert, num_rows in enumerate(rows_E) if num_rows]
        self._store.run(layer, runs, x_ND, sorted_ND)
        return sorted_ND.index_select(0, order_N.argsort()).view(num_tokens, top_k, -1)
