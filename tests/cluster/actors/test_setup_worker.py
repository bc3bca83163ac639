"""What starts workers in the place of Ray's own program: at once if they start quietly, else by Ray's."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.context import RuntimeEnvContext

from cluster.actors import setup_worker
from cluster.actors.quiet_start import QUIET_START, USUAL_START

WORKER = """
import json, os, sys
print(json.dumps(["ray" in sys.modules, sys.argv, sys.path[0], os.environ.get("WORD"), sys.flags.dev_mode]))
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def run(worker: Path, context: RuntimeEnvContext | None) -> list:
    """Start a worker as a raylet does; return what it says."""
    environ = {name: value for name, value in os.environ.items() if name != "RAY_RAYLET_PID"}
    runtime_env = [f"--serialized-runtime-env-context={context.serialize()}"] if context else []
    command = [
        sys.executable,
        setup_worker.__file__,
        str(worker),
        "--port=1",
        *runtime_env,
        "--language=PYTHON",
    ]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_quiet_start_is_run_without_ray_and_with_the_variables_it_should_have(worker: Path) -> None:
    context = RuntimeEnvContext(env_vars={"WORD": "a word"}, **QUIET_START)
    arguments = [str(worker), "--port=1"]
    assert run(worker, context) == [False, arguments, str(worker.parent), "a word", False]


@pytest.mark.parametrize(
    "context",
    [
        RuntimeEnvContext(env_vars={"WORD": "a word"}),
        RuntimeEnvContext(env_vars={"WORD": "a word"}, **USUAL_START),
    ],
)
def test_any_other_worker_is_started_by_rays_program(worker: Path, context: RuntimeEnvContext) -> None:
    _, arguments, folder, word, _ = run(worker, context)
    assert (arguments, folder, word) == ([str(worker), "--port=1"], str(worker.parent), "a word")


def test_what_a_quiet_worker_asks_for_beside_that_is_done_by_rays_program(worker: Path) -> None:
    python = shlex.quote(sys.executable)
    context = RuntimeEnvContext(command_prefix=["export", "PYTHONDEVMODE=1", "&&"], py_executable=python)
    assert run(worker, context)[-1]
    context = RuntimeEnvContext(env_vars={"PART": "word", "WORD": "a ${PART}"}, **QUIET_START)
    assert run(worker, context)[3] == "a word"
