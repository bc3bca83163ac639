"""Forks workers from a process that has imported what they need.

    python -m cluster.actors.fork_server LISTENING_DESCRIPTOR

A worker of ours imports Ray and torch before it does anything: 3 s of CPU time, on the cores that others
serve with. A fork of a process that has done so needs none of it. There is one such process per node and
deployment: the first worker to be started starts it. It ends with the node's raylet, or when it has had no
worker for a while.
"""

import fcntl
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.actors.socket_folder import socket_folder
from router.links.private_folder import make_private
from shards.background import step_back, step_back_whole

# What engines, shards and expert groups import. None of it may start a thread: a fork would not have it.
_MODULES = (
    "ray._private.workers.default_worker",
    "ray.serve._private.replica",
    "cluster.actors.engine_process",
    "cluster.actors.expert_process",
    "cluster.actors.shard_process",
)
_RAYLET = "RAY_RAYLET_PID"  # Ray sets it for every worker
# In these, workers of one deployment may differ. Whatever else differs, makes another server: it may be a
# setting that is read when a module is imported.
_OF_ONE_WORKER = "RAY_SERVE_INTERNAL_"
_START_TIMEOUT_S = 60.0
_REQUEST_TIMEOUT_S = 1.0  # who asks sends all at once
_IDLE_S = 10.0  # without a worker
_BACKLOG = 128


@dataclass(frozen=True)
class Program:
    """What a Python process runs: a file and its arguments, and in which environment."""

    argv: list[str]
    environ: dict[str, str]

    def run(self) -> None:
        """Run it as if Python had been told to."""
        sys.argv = self.argv
        sys.path[0] = str(Path(self.argv[0]).parent)
        runpy.run_path(self.argv[0], run_name="__main__")


def fork(program: Program) -> int | None:
    """Have the program run in this folder in a fork of the server, which is started if need be.

    Returns its process id, or None if there can be no server. Blocks until the server has its modules.
    """
    if sys.platform != "linux" or _RAYLET not in program.environ:
        return None
    try:
        request = json.dumps([os.getcwd(), asdict(program)])
        os.close(_open_raylet(program.environ))  # nothing is started where that can't be watched
        with _connected(_address(program.environ)) as server:
            server.settimeout(_START_TIMEOUT_S)
            server.sendall(request.encode())
            server.shutdown(socket.SHUT_WR)
            return int(_read(server))
    except (OSError, ValueError):
        return None


def _address(environ: Mapping[str, str]) -> Path:
    decisive = {name: value for name, value in environ.items() if not name.startswith(_OF_ONE_WORKER)}
    version = _changed_at("cluster", "router", "shards")  # what is served again may be another
    key = json.dumps([sys.executable, version, decisive], sort_keys=True).encode()
    directory = socket_folder()
    make_private(directory)
    return directory / f"fork-{hashlib.sha256(key).hexdigest()[:16]}.sock"


def _changed_at(*packages: str) -> float:
    """Return when a file of these packages was changed last."""
    specs = (importlib.util.find_spec(package) for package in packages)
    folders = (Path(spec.origin).parent for spec in specs if spec and spec.origin)
    return max(path.stat().st_mtime for folder in folders for path in folder.rglob("*.py"))


def _open_raylet(environ: Mapping[str, str]) -> int:
    """Return a descriptor that turns readable when the raylet ends. Raises OSError, also if it has ended."""
    return os.pidfd_open(int(environ[_RAYLET]))


def _connected(address: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with address.with_name("fork.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            server.connect(str(address))
        except (FileNotFoundError, ConnectionRefusedError):
            _start(address)
            server.connect(str(address))
    return server


def _start(address: Path) -> None:
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen(_BACKLOG)
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            # A group of its own, which Ctrl-C and Ray leave alone; but the same session, by which Linux may
            # divide the cores before it looks at priorities.
            process_group=0,
        )


def _read(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def _serve(listener: socket.socket) -> Program | None:
    """Fork whenever somebody asks.

    Returns the program in each fork, and None in the server when nobody needs it any more.
    """
    raylet = _open_raylet(os.environ)
    importing = threading.Thread(target=_import_quietly)  # priority that this thread gave up, forks had not
    importing.start()
    importing.join()
    gc.collect()
    gc.freeze()  # else the first collection of a fork would touch, and so copy, everything
    wakes, awakened = socket.socketpair()
    for sock in (wakes, awakened):
        sock.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(awakened.fileno())
    num_workers, busy_at = 0, time.monotonic()
    with selectors.DefaultSelector() as selector:
        for readable in (listener, raylet, wakes):
            selector.register(readable, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(_IDLE_S)]
            if raylet in ready:
                return None
            if wakes in ready:
                wakes.recv(1 << 10)
                num_workers -= _reap()
            if listener in ready:
                client, _ = listener.accept()
                client.settimeout(_REQUEST_TIMEOUT_S)
                with client, suppress(OSError, ValueError, TypeError):
                    folder, fields = json.loads(_read(client))
                    program = Program(**fields)
                    client.sendall(b" ")  # fails if who asked has given up, and runs the program without us
                    pid = os.fork()
                    if pid == 0:
                        break
                    num_workers += 1
                    client.sendall(b"%d" % pid)
            if num_workers or ready:
                busy_at = time.monotonic()
            elif time.monotonic() - busy_at >= _IDLE_S:
                return None
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(raylet)
    for sock in (listener, wakes, awakened):
        sock.close()
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(program.environ)
    return program


def _import_quietly() -> None:
    """Import the modules at a lower priority, and draw no random numbers that the forks would share.

    Ray makes its ids with a generator that is seeded by the first of them. Two modules of Ray define actors,
    which get an id, as they are imported. Forks that had this seed made the same ids for their own objects
    and calls, and were given each other's.
    """
    step_back()
    import ray.actor

    id_class = ray.actor.ActorClassID

    class SystemsRandomness:
        @staticmethod
        def from_random() -> object:
            return id_class(os.urandom(id_class.size()))

    ray.actor.ActorClassID = SystemsRandomness  # which only asks it for this
    try:
        for module in _MODULES:
            importlib.import_module(module)
    finally:
        ray.actor.ActorClassID = id_class


def _reap() -> int:
    """Return how many workers have ended since this was last asked."""
    number = 0
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            number += 1
    return number


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    address = Path(listener.getsockname())
    if program := _serve(listener):
        step_back_whole()
        program.run()
    else:
        address.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
