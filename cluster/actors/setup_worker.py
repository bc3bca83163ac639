"""What the raylet runs to start a worker with a `runtime_env`, in the place of Ray's own program.

Ray's imports all of Ray, only to run the command that the `runtime_env` names: half a second of a core, at
the priority of those who serve. This one runs a quiet start by itself, and leaves all others to Ray's.
"""

import json
import os
import runpy
import sys
from collections.abc import Mapping
from typing import Any

_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="


def use_for_workers() -> None:
    """Have raylets that this process starts run this program."""
    from ray._private import ray_constants

    # Ray joins it to the path of a folder of its own, from which an absolute path leads away.
    ray_constants.SETUP_WORKER_FILENAME = __file__


def main() -> None:
    sys.path[0] = ""  # the folder that we are in, if it is still there; the names here are not for everybody
    from cluster.actors import quiet_start

    context = next((each for each in sys.argv if each.startswith(_CONTEXT)), None)
    runtime_env = json.loads(context.removeprefix(_CONTEXT)) if context else {}
    if _is_quiet(runtime_env, quiet_start.QUIET_START):
        os.environ.update(runtime_env["env_vars"])
        sys.argv = [each for each in sys.argv if not each.startswith((_CONTEXT, _LANGUAGE))]
        quiet_start.main()
    else:
        runpy.run_module("ray._private.workers.setup_worker", run_name="__main__", alter_sys=True)


def _is_quiet(runtime_env: Mapping[str, Any], quiet_start: Mapping[str, str]) -> bool:
    """Say whether a quiet start is all that a worker's environment asks for."""
    asked = {name: value for name, value in runtime_env.items() if value and name != "env_vars"}
    variables = runtime_env.get("env_vars", {})
    return asked == quiet_start and not any("$" in value for value in variables.values())


if __name__ == "__main__":
    main()
