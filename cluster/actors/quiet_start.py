"""Starts a Ray worker without being felt by those who serve on the same cores.

    python -m cluster.actors.quiet_start WORKER [ARGUMENT ...]

A replacement is started when the others have most to do, and its start - Python, Ray, torch, weights - takes
several seconds of a core. It steps back for all of that; what it serves with, it starts in the foreground.
"""

import runpy
import shlex
import sys
from pathlib import Path

from shards.background import step_back_whole

# For `runtime_env` of an actor; both lead to the Python of who starts it, which must be there on every node.
# Ray puts its own program for workers, and the arguments, behind it, in a line for the shell.
USUAL_START = {"py_executable": shlex.quote(sys.executable)}
QUIET_START = {"py_executable": f"{shlex.quote(sys.executable)} -m {__name__}"}


def main() -> None:
    step_back_whole()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if Python had been told to run it
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
