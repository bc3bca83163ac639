"""`tradewind serve` on a Ray cluster that is there: it serves, leaves nothing of its own behind, and says
what is in its way."""

import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.local_ray import ENVIRONMENT, free_port
from tests.system.demo_deployment import MODEL, TRADEWIND, serving, wait_for

pytestmark = pytest.mark.system

RAY = TRADEWIND.with_name("ray")
CONFIG = f"models: [{{name: {MODEL}, checkpoint: {MODEL}, expert_groups: 1, engine_threads: 1}}]"
OURS = ("ServeReplica:tradewind", "Router", "ExpertGroup", "fork_server")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[psutil.Process]:
    """A Ray cluster of one node, as docs/configuration.md says, that RAY_ADDRESS leads to."""
    port = free_port()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # Serve's 30 s are for load balancers
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }
    options = ["--num-cpus=8", "--include-dashboard=false", "--object-store-memory=100000000", "--block"]
    # Not pytest's folder: Ray puts sockets there, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="tw-") as folder:
        head = ["--head", f"--port={port}", f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}"]
        log = Path(folder, "output")
        with log.open("wb") as output:
            command = [RAY, "start", *head, *options]
            node = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        its = psutil.Process(node.pid)
        try:
            wait_for(lambda: b"Ray runtime started" in log.read_bytes(), f"Ray ({command})", deadline_s=60)
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            yield its
        finally:
            family = [*its.children(recursive=True), its]
            for process in family:
                with suppress(psutil.NoSuchProcess):  # it has ended with those before it
                    process.kill()
            psutil.wait_procs(family, timeout=20)


def refusal(*options: str | Path) -> str:
    """Run `tradewind serve`, which must fail; return its one line of error."""
    done = subprocess.run([TRADEWIND, "serve", *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


def titles(cluster: psutil.Process) -> str:
    """Return the command lines of a cluster's processes, also of those that were forked for its raylet."""
    family = {process.pid for process in cluster.children(recursive=True)}
    titles = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid in family or int(process.environ().get("RAY_RAYLET_PID", 0)) in family:
                titles.append(" ".join(process.cmdline()))
    return "\n".join(titles)


def test_a_cluster_is_joined_and_left_as_it_was(
    cluster: psutil.Process, sparse_checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    with serving(config, tmp_path / "output") as running:
        port = running.url.rpartition(":")[2]
        assert len(list(running.story(MODEL, 8))) > 1
        assert all(title in titles(cluster) for title in OURS)

        assert "end its `tradewind serve`" in refusal(config, "--port", port)
        assert len(list(running.story(MODEL, 8))) > 1, "the second `tradewind serve` harmed the first"

    assert "error" not in (tmp_path / "output").read_text()
    wait_for(lambda: not any(title in titles(cluster) for title in OURS), "the end of all that was started")
    # Ray Serve stays, and where it listens.
    assert f"--host 127.0.0.1 --port {port}" in refusal(config, "--port", str(free_port()))
