"""How even are the expert groups, and how many weights are copied for that? Ours beside the greedy policy.

    python bench/balance.py                      # all shapes
    python bench/balance.py --shapes mixtral     # only those whose name has this in it
    python bench/balance.py --json balance.json  # the same for programs

Loads are Zipf(1.2), in another order in each layer. `random`: from a random placement, one call. `walk`: each
expert's load is multiplied by exp(N(0, 0.1)) before each call. `hot spots`: in each layer, the hottest expert
changes places with a random one before each call. Before these two, each policy placed the experts as it
likes. Imbalance is the most rows of a group over the mean, with rows split as evenly as replicas allow,
whoever placed them: the mean and the worst over layers and calls. Copies, GB and s are means per call; s is
CPU time of this process, on one core.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from about import describe_run
from greedy_policy import greedy_policy, relabelled
from numpy.typing import NDArray

from router.balance import balance
from router.split import rows_per_group

# L layers   E experts   G expert groups

CALLS = 8  # of each policy while loads drift
Policy = Callable[[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]], NDArray[np.bool_]]
Row = dict[str, str | float]


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    experts: int
    groups: int
    slots: int  # per layer and group
    expert_bytes: int


MIXTRAL_BYTES = 3 * 6144 * 16384 * 2  # Mixtral 8x22B, bf16
DEEPSEEK_BYTES = 3 * 7168 * 2048  # DeepSeek-V3, fp8
SHAPES = (
    Shape("mixtral 56x8 on 4x3", 56, 8, 4, 3, MIXTRAL_BYTES),
    Shape("mixtral 56x8 on 8x2", 56, 8, 8, 2, MIXTRAL_BYTES),
    Shape("deepseek 61x256 on 40x8", 61, 256, 40, 8, DEEPSEEK_BYTES),
    Shape("deepseek 61x256 on 64x5", 61, 256, 64, 5, DEEPSEEK_BYTES),
)
POLICIES: dict[str, Policy] = {
    "ours": balance,
    "greedy": lambda load_LE, held_GLE, slots_G: greedy_policy(load_LE, slots_G),
    "greedy, relabelled": lambda load_LE, held_GLE, slots_G: relabelled(
        greedy_policy(load_LE, slots_G), held_GLE
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure our balance beside the greedy policy's.")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--shapes", default="", help="only shapes with this in their name")
    arguments = parser.parse_args()

    about = describe_run()
    rows: list[Row] = []
    for shape in SHAPES:
        if arguments.shapes in shape.name:
            for row in measure(shape):
                if not rows:
                    print("\n| " + " | ".join(row) + " |\n|" + "---|" * len(row))
                cells = (f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row.values())
                print("| " + " | ".join(cells) + " |", flush=True)
                rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "balance": rows}, indent=1))


def measure(shape: Shape) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    slots_G = np.full(shape.groups, shape.slots)
    rank_E = np.arange(1, shape.experts + 1)
    load_LE = np.stack([rng.permutation(1e6 / rank_E**1.2) for _ in range(shape.layers)])
    empty_GLE = np.zeros((shape.groups, shape.layers, shape.experts), np.bool_)
    walk, hot = [load_LE], [load_LE]
    for _ in range(CALLS):
        walk.append(walk[-1] * np.exp(rng.normal(0, 0.1, load_LE.shape)))
        hot.append(with_other_hot_spots(hot[-1], rng))
    random_GLE = random_placement(shape, rng)
    for policy_name, policy in POLICIES.items():
        placed_GLE = policy(load_LE, empty_GLE, slots_G)
        for loads_name, held_GLE, loads in (
            ("random", random_GLE, [load_LE]),
            ("walk", placed_GLE, walk[1:]),
            ("hot spots", placed_GLE, hot[1:]),
        ):
            before, after, copies, seconds = [], [], 0, 0.0
            for now_LE in loads:
                before.append(imbalance(now_LE, held_GLE))
                start = time.process_time()
                wanted_GLE = policy(now_LE, held_GLE, slots_G)
                seconds += time.process_time() - start
                copies += int((wanted_GLE & ~held_GLE).sum())
                held_GLE = wanted_GLE
                after.append(imbalance(now_LE, held_GLE))
            yield {
                "shape": shape.name,
                "loads": loads_name,
                "policy": policy_name,
                "before": float(np.mean(before)),
                "worst before": float(np.max(before)),
                "after": float(np.mean(after)),
                "worst after": float(np.max(after)),
                "copies": copies / len(loads),
                "GB": copies / len(loads) * shape.expert_bytes / 1e9,
                "s": seconds / len(loads),
            }


def random_placement(shape: Shape, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return held_GLE: all experts dealt out in random order, then again, as far as slots go."""
    held_GLE = np.zeros((shape.groups, shape.layers, shape.experts), np.bool_)
    for layer in range(shape.layers):
        deck = np.concatenate([rng.permutation(shape.experts) for _ in range(shape.slots * shape.groups)])
        for place, expert in enumerate(deck[: shape.groups * shape.slots].tolist()):
            held_GLE[place % shape.groups, layer, expert] = True
    return held_GLE


def with_other_hot_spots(load_LE: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return loads in which the hottest expert of each layer has changed places with a random one."""
    load_LE = load_LE.copy()
    for load_E in load_LE:
        hottest, other = load_E.argmax(), rng.integers(load_E.size)
        load_E[[hottest, other]] = load_E[[other, hottest]]
    return load_LE


def imbalance(load_LE: NDArray[np.float64], held_GLE: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return, per layer, the most rows of a group over the mean."""
    rows_GL = rows_per_group(load_LE, held_GLE)
    result_L: NDArray[np.float64] = rows_GL.max(axis=0) / rows_GL.mean(axis=0)
    return result_L


if __name__ == "__main__":
    main()
