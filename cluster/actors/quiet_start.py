"""Starts a Ray worker without being felt by those who serve on the same cores.

    python -m cluster.actors.quiet_start WORKER [ARGUMENT ...]

A replacement is started when the others have most to do, and its start - Python, Ray, torch, weights - would
take several seconds of a core. It is forked from a process that has most of that behind it, and steps back
for the rest; what it serves with, it starts in the foreground.
"""

import os
import shlex
import sys

from shards.background import in_foreground, step_back_whole

# For `runtime_env` of an actor; both lead to the Python of who starts it, which must be there on every node.
# Ray puts its own program for workers, and the arguments, behind it, in a line for the shell.
USUAL_START = {"py_executable": shlex.quote(sys.executable)}
QUIET_START = {"py_executable": f"{shlex.quote(sys.executable)} -m {__name__}"}


def main() -> None:
    step_back_whole()
    from cluster.actors.fork_server import Program, fork  # not above: this, too, takes its time

    program = Program(sys.argv[1:], dict(os.environ))
    if in_foreground(lambda: fork(program)) is None:  # a server that this starts is not to step back
        program.run()


if __name__ == "__main__":
    main()
