"""A running `tradewind serve`, as the system tests see it."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil

from cluster.local_ray import free_port

REPOSITORY = Path(__file__).parents[2]
TRADEWIND = Path(sys.executable).with_name("tradewind")
MODEL = "smollm2-8x135m"
START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Deployment:
    """A running `tradewind serve`."""

    url: str
    process: subprocess.Popen[bytes]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def story(self, model: str, num_tokens: int, cache_salt: str | None = None) -> Iterator[str]:
        """Stream a long answer, sampled with a seed: the same at every time, piece by piece.

        With a salt, it shares no cached block with stories of other salts.
        """
        chunks = self.client().chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Tell me a long story about a fox."}],
            temperature=0.7,
            seed=3,
            max_tokens=num_tokens,
            stream=True,
            timeout=120,
            extra_body={"cache_salt": cache_salt},
        )
        for chunk in chunks:
            yield chunk.choices[0].delta.content or ""

    @contextmanager
    def telling(self, model: str, num_tokens: int, num_streams: int = 1) -> Iterator[set[str]]:
        """Have stories told, one after the other, until the block ends; yield what will be all of them."""
        answers: set[str] = set()
        is_enough = threading.Event()

        def tell() -> None:
            while not is_enough.is_set():
                answers.add("".join(self.story(model, num_tokens)))

        with ThreadPoolExecutor(num_streams) as pool:
            streams = [pool.submit(tell) for _ in range(num_streams)]
            try:
                yield answers
            finally:
                is_enough.set()
            for stream in streams:
                stream.result()

    def status(self) -> dict:
        return httpx.get(f"{self.url}/status", timeout=30).raise_for_status().json()

    def engine(self) -> dict:
        (engine,) = self.status()["models"][0]["engines"]
        return engine

    def wait_until_idle(self) -> None:
        """Wait until the engine reports that it holds no request; it reports once a second."""
        wait_for(lambda: self.engine()["num_running"] + self.engine()["num_waiting"] == 0, "an idle engine")


@contextmanager
def serving(config: Path, log: Path) -> Iterator[Deployment]:
    """Start a configuration, wait until it answers, stop it with Ctrl-C; none of it may be left running."""
    port = free_port()
    command = [TRADEWIND, "serve", config, "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def is_ready() -> bool:
        assert process.poll() is None, f"tradewind serve ended early:\n{log.read_text()}"
        return b"Ready at" in log.read_bytes()

    family: list[psutil.Process] = []
    try:
        wait_for(is_ready, f"the endpoint (its output is in {log})", START_DEADLINE_S)
        family = psutil.Process(process.pid).children(recursive=True)
        yield Deployment(f"http://127.0.0.1:{port}", process)
        family += psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_DEADLINE_S)
    assert process.returncode == 0, log.read_text()
    _, left = psutil.wait_procs(family, timeout=STOP_DEADLINE_S)
    assert not left, f"processes left behind: {left}"


@contextmanager
def serving_this(config: str, folder: Path) -> Iterator[Deployment]:
    """Do as `serving` does, with a configuration that is written to a folder first."""
    path = folder / "config.yaml"
    path.write_text(config)
    with serving(path, folder / "output") as running:
        yield running


def wait_for(condition: Callable[[], object], what: str, deadline_s: float = 30.0) -> None:
    """Poll until `condition()` is true; fail, saying `what` did not come, after `deadline_s` seconds."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {deadline_s:g} s"
        time.sleep(0.1)
