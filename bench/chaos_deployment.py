"""Deployments for chaos to rage in: each is a `tradewind serve`, and takes all of its processes along."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from chaos_hosts import SERVER, on_hosts

TRADEWIND = Path(sys.executable).with_name("tradewind")
START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 60.0
MARK = "TRADEWIND_CHAOS"  # an environment variable that all our processes inherit, however they come about


@dataclass(frozen=True)
class Shape:
    """What a deployment consists of."""

    name: str
    model: Mapping[str, Any]  # as in a configuration
    has_hosts: bool = False  # several, that have a network between them

    @property
    def model_name(self) -> str:
        return str(self.model["name"])

    @property
    def engines(self) -> int:
        return int(self.model.get("engines", 1))

    @property
    def groups(self) -> int:
        return int(self.model.get("expert_groups", 0))

    @property
    def shards(self) -> int:
        """Of each engine, beside itself."""
        return int(self.model.get("tensor_parallel", 1)) - 1


_LIMITS = {"max_running": 32, "kv_cache_tokens": 16384}


def _sparse(**more: int) -> dict[str, Any]:
    common = {"engines": 2, "expert_groups": 2, "expert_replicas": 2}
    return {
        "name": "smollm2-8x135m",
        "checkpoint": "smollm2-8x135m",
        **common,
        **_LIMITS,
        "expert_deadline_s": 60,
        **more,
    }


TWO_BY_TWO = Shape("2 engines, 2 groups", _sparse())
ONE_ENGINE = Shape("1 engine, 2 groups", _sparse(engines=1))  # as in configs/demo.yaml
# So that no prompt is read at the expense of all streams, whose gaps are measured.
SMALL_STEPS = Shape("1 engine, 2 groups, small steps", _sparse(engines=1, max_step_tokens=24))
FOUR_GROUPS = Shape("2 engines, 4 groups", _sparse(expert_groups=4))
# With few slots to spare, so that a load that changes moves experts.
FEW_SLOTS = Shape(
    "2 engines, 4 groups, few slots", _sparse(expert_groups=4, expert_replicas=1, expert_slots=3)
)
HOSTS = Shape("2 engines, 2 groups, 3 hosts", _sparse(), has_hosts=True)
SHARDS = Shape(
    "2 engines of 2 shards",
    {
        "name": "smollm2-135m",
        "checkpoint": "smollm2-135m",
        "engines": 2,
        "tensor_parallel": 2,
        "engine_threads": 1,
        **_LIMITS,
    },
)


@dataclass(frozen=True)
class Deployment:
    """One that answers."""

    shape: Shape
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextmanager
def serve(shape: Shape, port: int, logs: Path) -> Iterator[Deployment]:
    """Run `tradewind serve` until the block ends; its output, and Ray's logs, go to a folder in `logs`.

    Blocks until it answers. Raises RuntimeError with the end of its output if it does not.
    """
    folder = logs / shape.name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(8)
    # Sockets have short names, so Ray's folder can't be just anywhere.
    ray_folder = Path(tempfile.mkdtemp(prefix="twc-", dir="/tmp"))
    environment = {**os.environ, MARK: mark, "RAY_TMPDIR": str(ray_folder)}
    environment.pop("RAY_ADDRESS", None)
    with ExitStack() as cleanup:
        cleanup.callback(_keep_logs, ray_folder, folder)
        prefix: list[str] = []
        host = "127.0.0.1"
        if shape.has_hosts:
            prefix, more = cleanup.enter_context(on_hosts(environment, ray_folder, folder))
            environment, host = environment | more, SERVER
        # In a namespace of ours, nobody else can connect to any address.
        http = {"host": "0.0.0.0" if shape.has_hosts else host, "port": port}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({"http": http, "models": [dict(shape.model)]}))
        output = folder / "serve.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*prefix, str(TRADEWIND), "serve", str(config)],
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us; we pass it on
            )
        cleanup.callback(_stop, process, mark)
        _await_ready(process, output)
        yield Deployment(shape, host, port)


def _await_ready(process: "subprocess.Popen[bytes]", output: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while b"Ready at" not in output.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            end = output.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"tradewind serve did not get ready:\n{end}")
        time.sleep(0.2)


def _stop(process: "subprocess.Popen[bytes]", mark: str) -> None:
    """End a deployment as Ctrl-C does, and then whatever is left of it."""
    family = _family(mark)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in {*family, *_family(mark)}:
        with suppress(psutil.NoSuchProcess):
            left.resume()  # a stopped one would not notice
            left.terminate()
    _, stubborn = psutil.wait_procs(family | _family(mark), timeout=5)
    for left in stubborn:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(stubborn, timeout=5)


def _family(mark: str) -> set[psutil.Process]:
    """Return the processes that have inherited `mark` from us, and their children, of which some hide it."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found |= {process, *process.children(recursive=True)}
    return found


def _keep_logs(ray_folder: Path, folder: Path) -> None:
    for logs in ray_folder.glob("**/session_2*/logs"):
        shutil.copytree(logs, folder / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)
    shutil.rmtree(ray_folder, ignore_errors=True)
