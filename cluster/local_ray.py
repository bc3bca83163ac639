"""The Ray that a command starts for itself, or joins."""

import ctypes
import logging
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cluster.actors import setup_worker
from shards.cores import usable_cores

# Set before Ray is imported: Ray Serve reads them at import, here and in every process that inherits them.
ENVIRONMENT = {
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("tradewind-haproxy")),
    "RAY_SERVE_ENABLE_HA_PROXY": "1",  # measured: a quarter of the Python proxy's CPU per streamed chunk
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # user code on the replica's main loop; 1 ms less per call
    "RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S": "1",  # of the routers; Serve's default is 10 s
    "RAY_worker_niceness": "0",  # Ray's default of 15 makes every token wait for whatever else runs here
    "RAY_USAGE_STATS_ENABLED": "0",
}
GRACE_S = 3.0  # for a process to end by itself
CONNECT_TIMEOUT_S = 5.0  # to a cluster that is there
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# Between those of Ray's workers and of Serve's replicas. Not where the system takes ports from (on Linux,
# from 32768 on): what is free there now may be one end of a connection a moment later.
_PORTS = range(20_000, 30_000)
# Ports that a second cluster on this machine would collide on; they matter to nobody outside it.
_PRIVATE_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)


def check_port_is_free(host: str, port: int) -> None:
    """Raise ValueError if somebody listens there already, or nobody may."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # create_server says the address again
        raise ValueError(
            f"cannot listen on {host} port {port} ({reason}); choose another with --port, or with "
            "PORT=... before `make serve`, or http.port in the configuration"
        ) from None


def free_port() -> int:
    """Return a port that nobody listens on, and that the system gives to nobody who asks for any."""
    while True:
        port = random.choice(_PORTS)
        with suppress(OSError):
            socket.create_server(("", port)).close()
            return port


def joins_a_cluster() -> bool:
    """Say whether RAY_ADDRESS names a cluster to join."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[bool]:
    """Join the cluster at RAY_ADDRESS, or start one on this machine and end it in the end.

    Yields whether it is ours. `num_cpus` are the logical CPUs of one that we start: what our actors ask
    for, however few cores there are, since on a laptop they are meant to share them. Raises ValueError if
    RAY_ADDRESS leads to no cluster.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_is_open(address)
    with tempfile.TemporaryDirectory(prefix="tradewind-") as directory:
        metrics = Path(directory, "metrics")
        metrics.mkdir()
        variables = {**ENVIRONMENT, "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
        if not address:
            variables |= {name: str(free_port()) for name in _PRIVATE_PORTS if name not in os.environ}
            os.environ.update(variables)
            _adopt_orphans()
            setup_worker.use_for_workers()
        import ray  # not before the environment is set

        try:
            if address:
                try:
                    ray.init(
                        logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": variables}
                    )
                except ConnectionError as error:
                    raise _no_cluster(address, str(error)) from error
            else:
                ray.init(
                    "local",
                    num_cpus=max(num_cpus, usable_cores()),
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            yield not address
        finally:
            family = [] if address else psutil.Process().children(recursive=True)
            ray.shutdown()
            _end(family)


def _check_is_open(address: str) -> None:
    """Raise ValueError if nobody listens at HOST:PORT; Ray itself would try for minutes.

    Other addresses ("auto") are left to Ray. Blocks up to CONNECT_TIMEOUT_S.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:  # OverflowError: there is no such port
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, reason: str) -> ValueError:
    return ValueError(
        f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there ({' '.join(reason.split())}); "
        "correct it, or unset it to start Ray on this machine; if the cluster asks for a token, set "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    )


def _adopt_orphans() -> None:
    """Be the parent of descendants whose own has ended, where there is such a thing: `_end` finds them so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end(processes: list[psutil.Process]) -> None:
    """End what Ray has left: HAProxy outlives its actor if that one had no time to clean up."""
    _, left = psutil.wait_procs(processes, timeout=GRACE_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(left, timeout=GRACE_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
