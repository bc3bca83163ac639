"""How many cores this process may keep busy."""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Count the cores that this process may run on, within its CPU quota; at least 1.

    `os.cpu_count` counts the machine's, whatever taskset, Slurm or a container leave of them.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        cores = os.cpu_count() or 1
    quota = cpu_quota(CGROUPS, _own_cgroup())
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path, own: str) -> float | None:
    """Return the tightest quota, in cores, of the cgroup `own` and those around it; None for no limit.

    Reads cpu.max of cgroup v2, mounted at `root`: "<quota> <period>" in microseconds, or "max <period>".
    """
    quotas = []
    group = root / own.lstrip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(root) and (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _own_cgroup() -> str:
    """Return this process's path below the root of cgroup v2; "/" if there is none."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
