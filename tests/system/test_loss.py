"""Promise 1, as far as one replica of each goes: a process dies under a stream, which does not change."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shards.cores import usable_cores
from tests.system.demo_deployment import MODEL, Deployment, wait_for

pytestmark = pytest.mark.system

NUM_TOKENS = 60


def stream(deployment: Deployment) -> Iterator[str]:
    return deployment.story(MODEL, NUM_TOKENS)


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> str:
    return "".join(stream(deployment))


def pids(deployment: Deployment, kind: str) -> set[int]:
    """Return the processes of a kind; none, while what must be asked is being replaced."""
    try:
        (model,) = deployment.status()["models"]
    except httpx.HTTPError:
        return set()
    processes = {
        "expert group": [group["process"] for group in model["groups"]],
        "router": [model["router"]],
        "engine": [engine["process"] for engine in model["engines"]],
    }
    return {process["pid"] for process in processes[kind]}


def threads(deployment: Deployment) -> dict[int, int]:
    """Return with how many threads each group computes, by pid."""
    (model,) = deployment.status()["models"]
    return {group["process"]["pid"]: group["num_threads"] for group in model["groups"]}


@pytest.mark.skipif(usable_cores() < 2, reason="one core can't be shared out")
def test_a_group_computes_on_the_cores_of_a_dead_one_until_that_is_replaced(deployment: Deployment) -> None:
    cores = usable_cores()

    def are_halves() -> bool:
        return [*threads(deployment).values()] == [cores // 2] * 2

    wait_for(are_halves, "half of the cores for each group", deadline_s=60)
    victim, survivor = threads(deployment)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: threads(deployment).get(survivor) == cores, "all of the cores for one", deadline_s=30)
    wait_for(are_halves, "half of the cores for each group", deadline_s=60)


def niceness_of_threads(pid: int) -> set[int]:
    """Return each niceness that a thread of a process has."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {int(stat.rpartition(")")[2].split()[16]) for stat in stats}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a weight")
def test_only_what_starts_quietly_steps_back(deployment: Deployment) -> None:
    (usual,) = niceness_of_threads(deployment.process.pid)
    for kind in ("expert group", "engine"):
        for pid in pids(deployment, kind):
            serving, starting = sorted(niceness_of_threads(pid))[:2]
            assert serving == usual < starting, (
                f"the {kind}'s threads have niceness {niceness_of_threads(pid)}"
            )
    for pid in pids(deployment, "router"):
        assert niceness_of_threads(pid) == {usual}, "news of a loss would come late"


@pytest.mark.parametrize("victim", ["expert group", "router", "engine"])
def test_a_stream_survives_the_death_of(deployment: Deployment, undisturbed: str, victim: str) -> None:
    before = pids(deployment, victim)
    pid = next(iter(before))
    answer = ""
    for index, text in enumerate(stream(deployment)):
        answer += text
        if index == 10:
            os.kill(pid, signal.SIGKILL)
    assert answer == undisturbed

    def is_replaced() -> bool:
        now = pids(deployment, victim)
        return pid not in now and len(now) == len(before)

    wait_for(is_replaced, f"another {victim}", deadline_s=60)
    # And the deployment serves on, with the newcomer.
    assert "".join(stream(deployment)) == undisturbed
