"""Hosts of a network that can be cut: network namespaces of this machine, each with a Ray node."""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cluster.local_ray import ENVIRONMENT

_NETWORK = "10.213.77"
_BRIDGE = "twchaos"
SERVER = f"{_NETWORK}.11"  # where the endpoint is; we are on the bridge, as .1
_RAY_PORT = 6379
_NUM_HOSTS = 3  # the first runs no model: only Ray's head, and the processes that need no CPU of Ray's
_CPUS_PER_HOST = 5  # one host must do if the other is lost
_NODE_DEADLINE_S = 60.0


def why_no_hosts() -> str | None:
    """Say why this machine can't have network namespaces for us; None if it can."""
    if os.geteuid() != 0:
        return "it needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "it needs the command ip (apt install iproute2)"
    name = f"{_BRIDGE}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces can't be made here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@contextmanager
def on_hosts(
    environment: Mapping[str, str], ray_folder: Path, logs: Path
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Make hosts and a Ray cluster on them; yields how to run a command on the first, and its environment.

    Raises RuntimeError if the cluster does not come up.
    """
    ours = {
        **ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"{SERVER}:{_RAY_PORT}",
    }
    for_nodes = {**environment, **ours}
    del for_nodes["RAY_ADDRESS"]  # it is what they are making
    ray = [shutil.which("ray", path=str(Path(ENVIRONMENT["RAY_SERVE_HAPROXY_BINARY_PATH"]).parent)) or "ray"]
    with ExitStack() as cleanup:
        _make_bridge(cleanup)
        for number in range(_NUM_HOSTS):
            _make_host(number, cleanup)
        for number in range(_NUM_HOSTS):
            role = (
                [
                    "--head",
                    f"--port={_RAY_PORT}",
                    "--num-cpus=0",
                    f"--temp-dir={ray_folder}",
                    "--include-dashboard=false",
                ]
                if number == 0
                else [f"--address={SERVER}:{_RAY_PORT}", f"--num-cpus={_CPUS_PER_HOST}"]
            )
            more = [f"--node-ip-address={_address(number)}", "--object-store-memory=100000000", "--block"]
            with (logs / f"ray-{number}.log").open("wb") as output:
                node = subprocess.Popen(
                    [*_on(number), *ray, "start", *role, *more, "--disable-usage-stats"],
                    stdout=output,
                    stderr=output,
                    env=for_nodes,
                    start_new_session=True,
                )
            cleanup.callback(_end, node)
            _await_node(node, logs / f"ray-{number}.log")
        yield _on(0), ours


def cut(address: str) -> None:
    """Set a host's link down."""
    _ip("link", "set", _link(_number(address)), "down")


def mend(address: str) -> None:
    """Set a host's link up again."""
    _ip("link", "set", _link(_number(address)), "up")


def _make_bridge(cleanup: ExitStack) -> None:
    _ip("link", "add", _BRIDGE, "type", "bridge")
    cleanup.callback(_ip, "link", "del", _BRIDGE)
    _ip("addr", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")


def _make_host(number: int, cleanup: ExitStack) -> None:
    name, link = _name(number), _link(number)
    _ip("netns", "add", name)
    cleanup.callback(_ip, "netns", "del", name)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    cleanup.callback(_ip, "link", "del", link)  # deleting the namespace does it, too, but later
    _ip("link", "set", link, "master", _BRIDGE, "up")
    _ip("-n", name, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", name, "link", "set", "lo", "up")


def _await_node(node: "subprocess.Popen[bytes]", output: Path) -> None:
    deadline = time.monotonic() + _NODE_DEADLINE_S
    while b"Ray runtime started" not in output.read_bytes():
        if node.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"ray start did not get ready:\n{output.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def _end(node: "subprocess.Popen[bytes]") -> None:
    """End a node and, through it, its processes: they must be gone before their namespace goes."""
    node.terminate()
    with suppress(subprocess.TimeoutExpired):
        node.wait(15)
    node.kill()
    node.wait()


def _name(number: int) -> str:
    return f"{_BRIDGE}-{number}"


def _link(number: int) -> str:
    return f"{_BRIDGE}-veth{number}"


def _address(number: int) -> str:
    return f"{_NETWORK}.{11 + number}"


def _number(address: str) -> int:
    return int(address.rpartition(".")[2]) - 11


def _on(number: int) -> list[str]:
    return ["ip", "netns", "exec", _name(number)]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
