"""Serve's front door ends with who opened it."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.local_ray import free_port
from tests.system.demo_deployment import wait_for

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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_it_closes_when_its_parent_is_killed(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, HAPROXY, "-db", "-f", config])
    family: list[psutil.Process] = []

    def is_open() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/").is_success
        except httpx.HTTPError:
            return False

    try:
        wait_for(is_open, "an answer", DEADLINE_S)
        family = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        wait_for(lambda: not is_open(), "the door's end", DEADLINE_S)
    finally:
        parent.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
