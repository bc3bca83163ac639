"""What every benchmark says about its run."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def describe_run() -> dict[str, str | int]:
    """Print and return the machine, the code and the command of this run; the load is of before it began."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    about: dict[str, str | int] = {
        "machine": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "load before": f"{os.getloadavg()[0]:.1f}",
        "torch": version("torch"),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(["python", *sys.argv]),
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    return about
