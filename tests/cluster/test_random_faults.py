"""Promise 1 without Ray: random faults under load, over real parts in one process (fault_sequence.py).

`python bench/fault_sequences.py` runs as many sequences as one asks for.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shards.kernels.cpu import PackedWeight, set_threads
from tests.cluster.fault_sequence import run_sequence
from tests.cluster.live_fleet import LiveFleet
from tests.cluster.live_group import LiveGroup
from tests.cluster.workload import Workload
from tests.shards.tiny_models import TinyModel

pytestmark = pytest.mark.timeout(60)

# 59: a new router found a group full of what it should not hold, and neither freed nor published anything.
FOUND = (59,)
SEEDS = range(25)


@pytest.fixture(scope="module")
def workload(tiny_model: Callable[..., TinyModel]) -> Workload:
    set_threads(1, spin_us=0)
    torch.set_num_threads(1)
    return Workload.make(tiny_model("mixtral", torch.bfloat16))


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """Log nothing: pytest keeps the records, and with them errors, their frames and all that is in there."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", [*FOUND, *SEEDS])
def test_after_random_faults_every_answer_is_the_undisturbed_one_and_nothing_is_left_behind(
    workload: Workload, tmp_path: Path, seed: int
) -> None:
    outcome = run_sequence(seed, workload, tmp_path)
    assert not outcome.problems, outcome.story()


def test_sequences_of_faults_leave_no_weights_groups_or_fleets_in_memory(
    workload: Workload, tmp_path: Path
) -> None:
    before = _num_alive()
    for seed in (1, 2):
        run_sequence(seed, workload, tmp_path / str(seed))
    assert _num_alive() == before


def _num_alive() -> dict[str, int]:
    gc.collect()
    kinds = PackedWeight, LiveGroup, LiveFleet
    objects = gc.get_objects()
    return {kind.__name__: sum(type(each) is kind for each in objects) for kind in kinds}
