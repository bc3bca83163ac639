"""Promise 1, as far as one replica of each goes: a process dies under a stream, which does not change."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.system.demo_deployment import MODEL, Deployment, wait_for

pytestmark = pytest.mark.system

NUM_TOKENS = 60


def stream(deployment: Deployment) -> Iterator[str]:
    return deployment.story(MODEL, NUM_TOKENS)


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> str:
    return "".join(stream(deployment))


def processes(deployment: Deployment) -> dict[str, dict]:
    (model,) = deployment.status()["models"]
    return {
        "expert group": model["groups"][0]["process"],
        "router": model["router"],
        "engine": model["engines"][0]["process"],
    }


@pytest.mark.parametrize("victim", ["expert group", "router", "engine"])
def test_a_stream_survives_the_death_of(deployment: Deployment, undisturbed: str, victim: str) -> None:
    pid = processes(deployment)[victim]["pid"]
    answer = ""
    for index, text in enumerate(stream(deployment)):
        answer += text
        if index == 10:
            os.kill(pid, signal.SIGKILL)
    assert answer == undisturbed

    def is_replaced() -> bool:
        try:
            return processes(deployment)[victim]["pid"] != pid
        except Exception:  # it is just being replaced, and something does not answer yet
            return False

    wait_for(is_replaced, f"another {victim}", deadline_s=60)
    # And the deployment serves on, with the newcomer.
    assert "".join(stream(deployment)) == undisturbed
