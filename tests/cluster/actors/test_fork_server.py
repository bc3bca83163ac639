"""Workers that are forked from a server with their modules, rather than started from nothing."""

import gc
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from cluster.actors import fork_server
from cluster.actors.quiet_start import QUIET_START

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

REPOSITORY = Path(__file__).parents[3]
# Says how it was started, and stays until it is told to end, or its folder is gone.
WORKER = """
import json, os, pathlib, sys, time
from concurrent.futures import ThreadPoolExecutor
had = "torch" in sys.modules
from ray import WorkerID
draw = lambda: WorkerID.from_random().hex()
from shards.background import in_foreground
niceness = lambda: os.getpriority(os.PRIO_PROCESS, 0)
out = pathlib.Path(sys.argv[1])
out.with_suffix(".part").write_text(json.dumps(dict(
    name=__name__, argv=sys.argv, path=sys.path[0], folder=os.getcwd(), had_torch=had, pid=os.getpid(),
    server=os.getppid(), group=os.getpgid(0), niceness=niceness(), in_front=in_foreground(niceness),
    word=os.environ.get("RAY_SERVE_INTERNAL_WORD"), descriptors=len(os.listdir("/proc/self/fd")),
    ids=[draw(), ThreadPoolExecutor().submit(draw).result()],
)))
out.with_suffix(".part").rename(out)
while out.exists() and not out.with_suffix(".end").exists():
    time.sleep(0.02)
"""


class Node:
    """What a Ray node is to the workers that start on it: a raylet's process id, and a folder for files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raylet = subprocess.Popen(["sleep", "1000"])
        self.program = folder / "worker.py"
        self.program.write_text(WORKER)
        self._number = 0

    def environ(self, **variables: str) -> dict[str, str]:
        raylet = str(self.raylet.pid)
        return {**os.environ, "RAY_RAYLET_PID": raylet, "TMPDIR": str(self.folder), **variables}

    def begin(self, **variables: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a worker; return who starts it, and where the worker will say how it runs."""
        self._number += 1
        out = self.folder / f"{self._number}.json"
        command = [*shlex.split(QUIET_START["py_executable"]), str(self.program), str(out), "two words"]
        return subprocess.Popen(command, env=self.environ(**variables), cwd=self.folder), out

    def start(self, **variables: str) -> dict:
        """Start a worker, and return what it says."""
        process, out = self.begin(**variables)
        if out_of := process.wait(60):
            raise AssertionError(f"the start ended with {out_of}")
        return said(out)

    def end(self, worker: dict) -> None:
        Path(worker["argv"][1]).with_suffix(".end").touch()

    def close(self) -> None:
        self.raylet.kill()
        self.raylet.wait()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:  # pytest's path is too long for sockets
        node = Node(Path(folder))
        yield node
        node.close()


def said(out: Path) -> dict:
    eventually(out.exists, "the worker's word")
    return json.loads(out.read_text())


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


def test_a_worker_runs_as_by_python_itself_but_with_its_modules_and_in_the_background(node: Node) -> None:
    worker = node.start(RAY_SERVE_INTERNAL_WORD="first")
    assert worker["name"] == "__main__"
    assert worker["argv"] == [str(node.program), str(node.folder / "1.json"), "two words"]
    assert worker["path"] == worker["folder"] == str(node.folder)
    assert worker["word"] == "first"
    assert worker["had_torch"]
    assert worker["niceness"] > worker["in_front"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert worker["group"] == worker["pid"]  # Ray ends a worker's whole group


def test_all_workers_of_a_deployment_have_one_server_and_nothing_of_it_or_each_other(node: Node) -> None:
    first = node.start(RAY_SERVE_INTERNAL_WORD="first")
    second = node.start(RAY_SERVE_INTERNAL_WORD="second")
    assert first["server"] == second["server"]
    assert (first["word"], second["word"]) == ("first", "second")
    assert first["descriptors"] == second["descriptors"] <= 5  # 0, 1, 2, and what the listing itself opens


def test_workers_draw_ids_of_their_own(node: Node) -> None:
    """Ray names objects and calls by them: two workers with the same are given each other's."""
    ids = [id for _ in range(3) for id in node.start()["ids"]]
    assert len(set(ids)) == 6, ids


def test_who_says_nothing_holds_up_no_other(node: Node) -> None:
    node.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(socket_of(node)))
        assert node.start()["had_torch"]


def test_a_worker_whose_start_was_given_up_is_not_started(node: Node) -> None:
    """It runs already, by itself."""
    given_up = node.folder / "given up.json"
    server = psutil.Process(node.start()["server"])
    server.suspend()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asks:
        asks.connect(str(socket_of(node)))
        program = fork_server.Program([str(node.program), str(given_up)], node.environ())
        asks.sendall(json.dumps([str(node.folder), asdict(program)]).encode())
    server.resume()
    node.start()  # behind it
    time.sleep(0.5)  # as long as a worker needs
    assert not given_up.exists()


def test_a_worker_starts_by_itself_in_a_folder_that_is_gone(node: Node, tmp_path: Path) -> None:
    program = node.folder / "homeless.py"
    program.write_text("print('at work')")
    quiet_start = shlex.join([*shlex.split(QUIET_START["py_executable"]), str(program)])
    ran = subprocess.run(
        ["bash", "-c", f"rmdir {shlex.quote(str(tmp_path))} && {quiet_start}"],
        env={**node.environ(), "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "at work\n", ran.stderr


def test_another_version_of_the_project_has_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "some_package" / "part" / "module.py"
    module.parent.mkdir(parents=True)
    module.touch()
    (tmp_path / "some_package" / "__init__.py").touch()
    before = fork_server._changed_at("some_package")
    os.utime(module, (before + 1, before + 1))
    assert fork_server._changed_at("some_package") == before + 1
    assert fork_server._changed_at("cluster", "router", "shards") > 0


def test_workers_that_start_at_the_same_time_have_one_server(node: Node) -> None:
    started = [node.begin(TRADEWIND_TEST="at once") for _ in range(4)]
    assert [process.wait(60) for process, _ in started] == [0] * 4
    assert len({said(out)["server"] for _, out in started}) == 1


def test_another_environment_has_another_server(node: Node) -> None:
    assert node.start()["server"] != node.start(TRADEWIND_TEST="another")["server"]


def test_a_worker_that_ends_is_gone_at_once(node: Node) -> None:
    worker = node.start()
    node.end(worker)
    eventually(lambda: not psutil.pid_exists(worker["pid"]), "its end, also in the table of processes")


def test_a_server_that_was_killed_is_replaced_and_its_workers_live_on(node: Node) -> None:
    before = node.start()
    os.kill(before["server"], signal.SIGKILL)
    eventually(lambda: not is_running(before["server"]), "the server's end")
    after = node.start()
    assert after["had_torch"]
    assert after["server"] != before["server"]
    assert is_running(before["pid"])


def test_the_server_ends_with_the_raylet() -> None:
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        node = Node(Path(folder))
        worker = node.start()
        node.close()
        eventually(lambda: not is_running(worker["server"]), "the server's end")
        assert is_running(worker["pid"])  # which looks after the raylet by itself


def test_a_worker_starts_by_itself_where_the_server_does_not_fork(node: Node) -> None:
    address = socket_of(node, TRADEWIND_TEST="deaf")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(str(address))
        deaf.listen()
        process, out = node.begin(TRADEWIND_TEST="deaf")
        deaf.accept()[0].close()
        worker = said(out)
        assert (worker["pid"], worker["had_torch"]) == (process.pid, False)
        node.end(worker)
        assert process.wait(60) == 0


def test_a_worker_starts_by_itself_where_others_may_enter_the_folder_of_sockets() -> None:
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        node = Node(Path(folder))
        sockets = Path(folder, f"tradewind-{os.getuid()}")
        sockets.mkdir()
        sockets.chmod(0o777)
        process, out = node.begin()
        worker = said(out)
        assert (worker["pid"], worker["had_torch"]) == (process.pid, False)
        node.end(worker)
        assert process.wait(60) == 0
        node.close()


def socket_of(node: Node, **variables: str) -> Path:
    """Return where the server of this environment listens."""
    program = "import os, sys; from cluster.actors.fork_server import _address; print(_address(os.environ))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=node.environ(**variables), capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_without_workers_ends_after_a_while(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_IDLE_S", 0.1)
    monkeypatch.setattr(fork_server, "_MODULES", ())
    monkeypatch.setenv("RAY_RAYLET_PID", str(node.raylet.pid))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(node.folder / "idle.sock"))
        listener.listen()
        began_at = time.monotonic()
        try:
            assert fork_server._serve(listener) is None
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            gc.unfreeze()
        assert time.monotonic() - began_at >= 0.1
