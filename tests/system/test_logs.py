"""What a replica has to say is in its file under Ray's logs, where docs/api.md sends a person."""

import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.system.demo_deployment import MODEL, Deployment, wait_for

pytestmark = pytest.mark.system


def log_of(pid: int) -> Path:
    """Return where a process writes its stderr; it must be where a person is told to look."""
    path = Path(f"/proc/{pid}/fd/2").readlink()
    assert path.match(f"session_*/logs/worker-*-{pid}.err")
    return path


def test_a_gateway_logs_a_stranger_who_is_refused(deployment: Deployment) -> None:
    pid = deployment.status()["gateway"]["pid"]
    ports = {
        (each.laddr.ip, each.laddr.port)
        for each in psutil.Process(pid).net_connections("tcp4")
        if each.status == psutil.CONN_LISTEN
    }
    assert ports
    for address in ports:  # one of them is for links, the others are Ray's and hang up in silence
        socket.create_connection(address, timeout=5).close()
    wait_for(lambda: "refused a connection" in log_of(pid).read_text(), f"a line in {log_of(pid)}")


def test_an_engine_logs_the_loss_of_an_expert_group(deployment: Deployment) -> None:
    (model,) = deployment.status()["models"]
    (engine,), victim = model["engines"], model["groups"][0]["process"]
    log = log_of(engine["process"]["pid"])
    before = len(log.read_text())

    story = deployment.story(MODEL, 40)
    next(story)
    os.kill(victim["pid"], signal.SIGKILL)
    list(story)
    wait_for(lambda: "is lost" in log.read_text()[before:], f"a line in {log}")
    assert f"expert group {victim['name']!r} is lost" in log.read_text()[before:].replace('"', "'")
