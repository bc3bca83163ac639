"""An engine of two processes, as `tradewind serve configs/tensor-parallel.yaml` starts it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.demo_deployment import REPOSITORY, Deployment, serving, wait_for

pytestmark = pytest.mark.system

MODEL = "smollm2-135m"
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def two_ranks(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    config = REPOSITORY / "configs" / "tensor-parallel.yaml"
    with serving(config, tmp_path_factory.mktemp("two-ranks") / "output") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(two_ranks: Deployment) -> str:
    return answer(two_ranks)


def answer(deployment: Deployment, kill: int | None = None) -> str:
    """Stream an answer; in mid-stream, `kill` this process."""
    answer = ""
    for index, text in enumerate(deployment.story(MODEL, NUM_TOKENS)):
        answer += text
        if index == 10 and kill:
            os.kill(kill, signal.SIGKILL)
    return answer


def test_the_shard_is_a_process_that_ps_and_status_call_by_its_name(two_ranks: Deployment) -> None:
    (shard,) = two_ranks.engine()["shards"]
    assert (shard["kind"], shard["name"]) == ("Shard", f"{two_ranks.engine()['process']['name']}/1")
    assert "Shard" in " ".join(psutil.Process(shard["pid"]).cmdline())


@pytest.mark.parametrize("victim", ["shard", "engine"])
def test_a_stream_survives_the_death_of(two_ranks: Deployment, undisturbed: str, victim: str) -> None:
    before = two_ranks.engine()
    shard = psutil.Process(before["shards"][0]["pid"])
    assert answer(two_ranks, before["process"]["pid"] if victim == "engine" else shard.pid) == undisturbed
    # Neither lives without the other.
    shard.wait(30)
    wait_for(lambda: are_new(two_ranks, before), "another engine with a shard of its own", deadline_s=60)


def are_new(deployment: Deployment, before: dict) -> bool:
    """Say whether engine and shard are others; while one is being replaced, /status may fail."""
    try:
        now = deployment.engine()
    except Exception:
        return False
    return len(now["shards"]) == 1 and not pids_of(now) & pids_of(before)


def pids_of(engine: dict) -> set[int]:
    return {process["pid"] for process in (engine["process"], *engine["shards"])}
