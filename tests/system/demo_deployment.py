"""A running `tradewind serve`, as the system tests see it."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

REPOSITORY = Path(__file__).parents[2]
TRADEWIND = Path(sys.executable).with_name("tradewind")
MODEL = "smollm2-8x135m"


@dataclass(frozen=True)
class Deployment:
    """A running `tradewind serve`."""

    url: str
    process: subprocess.Popen[bytes]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def status(self) -> dict:
        return httpx.get(f"{self.url}/status", timeout=30).raise_for_status().json()

    def engine(self) -> dict:
        (engine,) = self.status()["models"][0]["engines"]
        return engine

    def wait_until_idle(self) -> None:
        """Wait until the engine reports that it holds no request; it reports once a second."""
        wait_for(lambda: self.engine()["num_running"] + self.engine()["num_waiting"] == 0, "an idle engine")


def wait_for(condition: Callable[[], object], what: str, deadline_s: float = 30.0) -> None:
    """Poll until `condition()` is true; fail, saying `what` did not come, after `deadline_s` seconds."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {deadline_s:g} s"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
