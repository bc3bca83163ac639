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

REPOSITORY = Path(__file__).parents[3]
WORKER = """
import json, os, sys
print(json.dumps(dict(
    argv=sys.argv, path=sys.path[0], word=os.environ.get("WORD"), dev_mode=sys.flags.dev_mode,
    pid=os.getpid(), niceness=os.getpriority(os.PRIO_PROCESS, 0),
)))
"""
NICENESS = os.getpriority(os.PRIO_PROCESS, 0)


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def run(worker: Path, context: RuntimeEnvContext | None, **variables: str) -> dict:
    """Start a worker as a raylet does; return what it says, and who was started."""
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
    process = subprocess.Popen(command, env={**environ, **variables}, stdout=subprocess.PIPE)
    said, _ = process.communicate()
    assert process.returncode == 0
    return {"started": process.pid, **json.loads(said)}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a weight")
def test_a_quiet_start_is_run_without_ray_and_with_the_variables_it_should_have(
    worker: Path, tmp_path: Path
) -> None:
    no_ray = tmp_path / "ray.py"
    no_ray.write_text("raise ImportError('Ray is not to be imported')")
    context = RuntimeEnvContext(env_vars={"WORD": "a word"}, **QUIET_START)
    said = run(worker, context, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert said["argv"] == [str(worker), "--port=1"]
    assert (said["path"], said["word"]) == (str(worker.parent), "a word")
    assert said["pid"] == said["started"], "the worker was started by another process"
    assert said["niceness"] > NICENESS


@pytest.mark.parametrize(
    "context",
    [
        RuntimeEnvContext(env_vars={"WORD": "a word"}),
        RuntimeEnvContext(env_vars={"WORD": "a word"}, **USUAL_START),
    ],
)
def test_any_other_worker_is_started_by_rays_program(worker: Path, context: RuntimeEnvContext) -> None:
    said = run(worker, context)
    assert (said["argv"], said["path"]) == ([str(worker), "--port=1"], str(worker.parent))
    assert said["word"] == "a word"
    assert said["niceness"] == NICENESS, "only a quiet start steps back"


def test_what_a_quiet_worker_asks_for_beside_that_is_done_by_rays_program(worker: Path) -> None:
    python = shlex.quote(sys.executable)
    context = RuntimeEnvContext(command_prefix=["export", "PYTHONDEVMODE=1", "&&"], py_executable=python)
    assert run(worker, context)["dev_mode"]


@pytest.mark.parametrize("word", ["a ${PART}", "a $PART"])
def test_variables_within_variables_are_filled_in_by_rays_program(worker: Path, word: str) -> None:
    context = RuntimeEnvContext(env_vars={"PART": "word", "WORD": word}, **QUIET_START)
    assert run(worker, context)["word"] == "a word"


def test_a_folder_that_is_gone_holds_up_no_worker(worker: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = shlex.join([sys.executable, setup_worker.__file__, str(worker), "--language=PYTHON"])
    said = subprocess.run(
        ["bash", "-c", f"rmdir {shlex.quote(str(gone))} && {command}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=gone,
        check=True,
        capture_output=True,
    )
    assert json.loads(said.stdout)["path"] == str(worker.parent)
