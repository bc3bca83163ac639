"""The greedy placement published with DeepSeek's EPLB, written from its description, to compare with."""

import heapq

import numpy as np
from numpy.typing import NDArray

# L layers   E experts   G expert groups


def greedy_policy(load_LE: NDArray[np.float64], slots_G: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return held_GLE: replicate hot experts until all slots are used, then pack. It ignores what is held.

    Replicate: each spare slot goes to the expert with the largest load per replica. Pack: the replicas,
    heaviest first, each go to the group with the least load that has a free slot and, to be fair to it here,
    does not hold the expert yet.
    """
    num_layers, num_experts = load_LE.shape
    held_GLE = np.zeros((len(slots_G), num_layers, num_experts), np.bool_)
    num_groups = np.count_nonzero(slots_G)
    for layer, load_E in enumerate(load_LE.tolist()):
        replicas_E = [1] * num_experts
        heap = [(-load, expert) for expert, load in enumerate(load_E)]
        heapq.heapify(heap)
        for _ in range(int(slots_G.sum()) - num_experts):
            while heap and replicas_E[heap[0][1]] == num_groups:
                heapq.heappop(heap)
            if not heap:
                break
            expert = heap[0][1]
            replicas_E[expert] += 1
            heapq.heapreplace(heap, (-load_E[expert] / replicas_E[expert], expert))
        replicas = [(load_E[e] / n, e) for e, n in enumerate(replicas_E) for _ in range(n)]
        rows_G, free_G = [0.0] * len(slots_G), slots_G.tolist()
        for load, expert in sorted(replicas, reverse=True):
            open_groups = [g for g, free in enumerate(free_G) if free and not held_GLE[g, layer, expert]]
            if open_groups:
                group = min(open_groups, key=rows_G.__getitem__)
                held_GLE[group, layer, expert] = True
                rows_G[group] += load
                free_G[group] -= 1
    return held_GLE


def relabelled(wanted_GLE: NDArray[np.bool_], held_GLE: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the placement with each layer's groups renamed, the best matches with what is held first.

    For groups with equally many slots. The published policy does not do this; it is the least one would add.
    """
    renamed_GLE = np.zeros_like(wanted_GLE)
    num_groups, num_layers, _ = wanted_GLE.shape
    for layer in range(num_layers):
        common_GG = wanted_GLE[:, layer].astype(np.int64) @ held_GLE[:, layer].T.astype(np.int64)
        sources, targets = set(range(num_groups)), set(range(num_groups))
        for pair in np.argsort(-common_GG, axis=None, kind="stable").tolist():
            source, target = divmod(pair, num_groups)
            if source in sources and target in targets:
                sources.remove(source)
                targets.remove(target)
                renamed_GLE[target, layer] = wanted_GLE[source, layer]
    return renamed_GLE
