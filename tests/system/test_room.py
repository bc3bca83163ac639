"""A cluster with room for more expert groups uses it under load, and one without room says so, and waits."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

from tests.system.demo_deployment import MODEL, Deployment, serving_this, wait_for

pytestmark = pytest.mark.system

NUM_TOKENS = 40
EXPERT_DEADLINE_S = 5.0
CONFIG = f"""
models:
  - name: {MODEL}
    checkpoint: {MODEL}
    expert_groups: 1
    max_expert_groups: 2
    expert_busy: 0.1
    expert_deadline_s: {EXPERT_DEADLINE_S}
    engine_threads: 1
"""


@pytest.fixture(scope="module")
def one_group(sparse_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("room")
    with serving_this(CONFIG, folder) as running:
        yield running


@dataclass(frozen=True)
class OtherJob:
    """A job on the same Ray cluster that has every free CPU, and waits for one more."""

    process: subprocess.Popen[str]

    def take_the_cpu_of_the_group(self, deployment: Deployment) -> None:
        assert self.process.stdout
        killed: set[int] = set()
        while not select.select([self.process.stdout], [], [], 0)[0]:  # a replacement may come before it
            for pid in set(groups(deployment)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.1)
        assert self.process.stdout.readline() == "there was another CPU\n"
        assert killed


@contextmanager
def other_job(deployment: Deployment) -> Iterator[OtherJob]:
    script = Path(__file__).with_name("other_job.py")
    with subprocess.Popen(
        [sys.executable, script, ray_address(deployment)],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "waiting\n"
        yield OtherJob(process)
        process.communicate()


def ray_address(deployment: Deployment) -> str:
    for process in psutil.Process(deployment.process.pid).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith("--gcs-address="):
                return argument.partition("=")[2]
    raise LookupError("no process of the deployment names the address of its Ray")


def groups(deployment: Deployment) -> list[int]:
    """Return the pids of the groups."""
    (model,) = deployment.status()["models"]
    return [group["process"]["pid"] for group in model["groups"]]


def test_a_cluster_too_small_to_restore_an_expert_waits_then_says_503_and_recovers(
    one_group: Deployment,
) -> None:
    # It comes before any load, which might have added a second group, to answer when the first is killed.
    with other_job(one_group) as job:
        undisturbed = "".join(one_group.story(MODEL, NUM_TOKENS))
        job.take_the_cpu_of_the_group(one_group)
        asked_at = time.monotonic()
        with pytest.raises(openai.InternalServerError) as refusal:
            list(one_group.story(MODEL, NUM_TOKENS))
        waited_s = time.monotonic() - asked_at
        assert refusal.value.status_code == 503
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        assert "expert" in refusal.value.message
        assert EXPERT_DEADLINE_S - 1 < waited_s < EXPERT_DEADLINE_S + 5

    wait_for(lambda: groups(one_group), "a group, now that there is room", deadline_s=60)
    assert "".join(one_group.story(MODEL, NUM_TOKENS)) == undisturbed


def test_groups_follow_the_load(one_group: Deployment) -> None:
    undisturbed = "".join(one_group.story(MODEL, NUM_TOKENS))
    with one_group.telling(MODEL, NUM_TOKENS, num_streams=4) as answers:
        wait_for(lambda: len(groups(one_group)) == 2, "a second group under load", deadline_s=90)
    assert answers == {undisturbed}
    wait_for(lambda: len(groups(one_group)) == 1, "a single group again, without load", deadline_s=120)
    assert "".join(one_group.story(MODEL, NUM_TOKENS)) == undisturbed
