"""A program that is started quietly runs as it would have by itself, but steps back."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.actors.quiet_start import QUIET_START

PROGRAM = """
import json, os, sys
from shards.background import in_foreground
niceness = lambda: os.getpriority(os.PRIO_PROCESS, 0)
print(json.dumps([__name__, sys.argv, sys.path[0], niceness(), in_foreground(niceness)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a weight")
def test_a_program_is_run_as_by_python_itself_but_steps_back(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(PROGRAM)
    command = [*shlex.split(QUIET_START["py_executable"]), str(program), "--port=1", "two words"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    name, arguments, path, niceness, in_front = json.loads(ran.stdout)
    assert (name, arguments, path) == ("__main__", [str(program), "--port=1", "two words"], str(tmp_path))
    assert niceness > in_front == os.getpriority(os.PRIO_PROCESS, 0)
