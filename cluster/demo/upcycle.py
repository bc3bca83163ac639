"""A sparse model out of a dense one (Komatsuzaki et al. 2022, "Sparse Upcycling").

Every expert is the dense MLP with its hidden units in another order, plus noise: the sparse model answers
about as well as the dense one, yet no two experts agree bitwise, so a row sent to a wrong expert shows.
"""

# D hidden size   F hidden units of the MLP   E experts

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 42  # of the few that were tried, the one whose model predicts text best
NUM_EXPERTS = 8
EXPERTS_PER_TOKEN = 2
NOISE = 0.10  # of each matrix's own standard deviation
GATE_STD = 0.05

_W1, _W2, _W3, _ORDER = range(4)  # what a generator is for
_GATE = NUM_EXPERTS  # in the place of an expert's number

Map = Callable[
    [Callable[[int], dict[str, NDArray[np.float32]]], range], Any
]  # `map`, or that of a thread pool


def sparse_config(dense: dict[str, Any]) -> dict[str, Any]:
    """Turn config.json of a Llama model into that of the Mixtral model made of it."""
    kept = {name: value for name, value in dense.items() if name != "mlp_bias"}
    return kept | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "output_router_logits": False,
        "sliding_window": None,
    }


def sparse_layer(
    layer: int, dense: dict[str, NDArray[np.float32]], map_: Map = map
) -> dict[str, NDArray[np.float32]]:
    """Replace one layer's MLP by experts and a gate, under Mixtral's names.

    Each matrix draws from its own counter-based generator, so the result does not depend on the order
    or the number of threads in which `map_` makes the experts.
    """
    gate_FD, up_FD, down_DF = (dense[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    sparse = {name: weight for name, weight in dense.items() if not name.startswith("mlp.")}
    gate_ED = _generator(layer, _GATE, 0).standard_normal((NUM_EXPERTS, gate_FD.shape[1]), np.float32)
    sparse["block_sparse_moe.gate.weight"] = gate_ED * np.float32(GATE_STD)

    def expert_tensors(expert: int) -> dict[str, NDArray[np.float32]]:
        order_F = _generator(layer, expert, _ORDER).permutation(len(gate_FD))
        prefix = f"block_sparse_moe.experts.{expert}"
        return {
            f"{prefix}.w1.weight": _noisy(gate_FD[order_F], _generator(layer, expert, _W1)),
            f"{prefix}.w2.weight": _noisy(down_DF[:, order_F], _generator(layer, expert, _W2)),
            f"{prefix}.w3.weight": _noisy(up_FD[order_F], _generator(layer, expert, _W3)),
        }

    for tensors in map_(expert_tensors, range(NUM_EXPERTS)):
        sparse |= tensors
    return sparse


def _generator(layer: int, expert: int, matrix: int) -> np.random.Generator:
    stream = (layer * (NUM_EXPERTS + 1) + expert) * 4 + matrix
    return np.random.Generator(np.random.Philox(key=np.array([SEED, stream], np.uint64)))


def _noisy(weight: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    # The sum behind std is taken in float64 and rounded: whatever its order, the float32 comes out the same.
    noise = generator.standard_normal(weight.shape, np.float32)
    noise *= np.float32(NOISE * weight.std(dtype=np.float64))
    noise += weight
    return noise
