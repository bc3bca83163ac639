"""Serve's front door ends with who opened it."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.local_ray import free_port

HAPROXY = Path(sys.executable).with_name("tradewind-haproxy")
CONFIG = """
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend door
    bind 127.0.0.1:{port}
    http-request return status 200
"""
PARENT = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(1000)"
DEADLINE_S = 10.0


def is_open(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/").is_success
    except httpx.HTTPError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_it_closes_when_its_parent_is_killed(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, HAPROXY, "-db", "-f", config])
    family: list[psutil.Process] = []
    try:
        for wanted in (True, False):
            deadline = time.monotonic() + DEADLINE_S
            while is_open(port) is not wanted:
                assert time.monotonic() < deadline, f"it should be {'open' if wanted else 'closed'} by now"
                time.sleep(0.05)
            family = family or psutil.Process(parent.pid).children()
            parent.send_signal(signal.SIGKILL)
            parent.wait()
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
