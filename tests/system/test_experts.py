"""Expert groups are added, emptied and removed by command while streams go on, which do not change."""

import subprocess

import httpx
import pytest

from tests.shards.kernels.shared import CAN_SHARE
from tests.system.demo_deployment import MODEL, TRADEWIND, Deployment

pytestmark = pytest.mark.system

NUM_TOKENS = 60
DEADLINE_S = 120
SHARED = 'source="shared"'


def experts(deployment: Deployment, *command: str) -> str:
    """Run `tradewind experts`, to its end state."""
    done = subprocess.run(
        [TRADEWIND, "experts", *command, "--url", deployment.url, "--timeout", str(DEADLINE_S)],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S + 30,
    )
    return done.stdout + done.stderr


def groups(deployment: Deployment) -> dict[str, int]:
    """Return the pid of each group."""
    (model,) = deployment.status()["models"]
    return {group["process"]["name"]: group["process"]["pid"] for group in model["groups"]}


def metric(deployment: Deployment, name: str, label: str = "") -> float:
    """Add up a metric over its labels, or where it has this one."""
    lines = httpx.get(f"{deployment.url}/metrics", timeout=30).raise_for_status().text.splitlines()
    its_lines = [line for line in lines if line.startswith((f"{name}{{", f"{name} ")) and label in line]
    return sum(float(line.split()[-1]) for line in its_lines)


def test_streams_do_not_notice_that_groups_come_and_go(deployment: Deployment) -> None:
    undisturbed = "".join(deployment.story(MODEL, NUM_TOKENS))
    epoch, staged_bytes = metric(deployment, "tradewind_placement_epoch"), "tradewind_rebalance_bytes_total"
    before_bytes = metric(deployment, staged_bytes)
    copied_bytes = before_bytes - metric(deployment, staged_bytes, SHARED)

    with deployment.telling(MODEL, NUM_TOKENS) as answers:
        assert "3 groups live" in experts(deployment, "scale", "3")
        assert len(groups(deployment)) == 3
        assert "2 groups live" in experts(deployment, "scale", "2")
        assert len(groups(deployment)) == 2
    assert answers == {undisturbed}

    assert metric(deployment, "tradewind_placement_epoch") > epoch
    after_bytes = metric(deployment, staged_bytes)
    assert after_bytes > before_bytes, "the third group was filled with nothing"
    if CAN_SHARE:
        assert after_bytes - metric(deployment, staged_bytes, SHARED) == copied_bytes, (
            "a copy of shared memory"
        )


def test_a_drained_group_is_replaced_by_another_process(deployment: Deployment) -> None:
    before = groups(deployment)
    experts(deployment, "drain", next(iter(before)))
    after = groups(deployment)
    assert len(after) == len(before)
    assert len(set(after.values()) & set(before.values())) == len(before) - 1


def test_a_command_that_can_not_be_followed_says_why(deployment: Deployment) -> None:
    response = httpx.post(
        f"{deployment.url}/admin/models/{MODEL}/experts/scale", json={"groups": 0}, timeout=30
    )
    assert response.status_code == 400
    assert "groups" in response.json()["error"]["message"]
