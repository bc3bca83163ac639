"""One real deployment for all system tests: `tradewind serve configs/demo.yaml`, as a user starts it."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.demo_deployment import REPOSITORY, TRADEWIND, Deployment, free_port, wait_for

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0


@pytest.fixture(scope="session")
def deployment(sparse_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Start the demo, wait until it answers, stop it with Ctrl-C; then none of its processes may be left."""
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "output"
    command = [TRADEWIND, "serve", REPOSITORY / "configs" / "demo.yaml", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, f"tradewind serve ended early:\n{log.read_text()}"
        return b"Ready at" in log.read_bytes()

    family: list[psutil.Process] = []
    try:
        wait_for(is_ready, f"the endpoint (its output is in {log})", START_DEADLINE_S)
        family = psutil.Process(process.pid).children(recursive=True)
        yield Deployment(url, process)
        family += psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_DEADLINE_S)
    assert process.returncode == 0, log.read_text()
    _, left = psutil.wait_procs(family, timeout=STOP_DEADLINE_S)
    assert not left, f"processes left behind: {left}"
