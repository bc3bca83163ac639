"""Ctrl-C ends a deployment, but no answer that runs."""

import signal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.system.demo_deployment import REPOSITORY, Deployment, serving, wait_for

pytestmark = pytest.mark.system

MODEL = "smollm2-135m"
NUM_TOKENS = 100


def test_ctrl_c_during_a_stream_lets_it_end_whole_and_nobody_else_in(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    with serving(REPOSITORY / "configs" / "dense.yaml", tmp_path / "output") as running:
        undisturbed = "".join(running.story(MODEL, NUM_TOKENS))

        story = running.story(MODEL, NUM_TOKENS)
        answer = next(story) + next(story)
        running.process.send_signal(signal.SIGINT)
        wait_for(lambda: not takes_requests(running), "a refusal of new requests", deadline_s=5)
        answer += "".join(story)
        assert answer == undisturbed

        its = psutil.Process(running.process.pid)
        wait_for(lambda: its.status() == psutil.STATUS_ZOMBIE, "the end of `tradewind serve`", deadline_s=20)


def takes_requests(running: Deployment) -> bool:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
    status = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30).status_code
    assert status in (200, 503)
    return status == 200
