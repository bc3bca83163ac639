"""Compile the kernels with the machine's own compiler, once per machine and version."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from shards.home import default_home

SOURCES = (
    "pack.cpp",
    "product.cpp",
    "linear.cpp",
    "gated_mlp.cpp",
    "attention.cpp",
    "elementwise.cpp",
    "threads.cpp",
    "shared_pages.cpp",
)
HEADERS = ("product.h", "silu.h", "simd.h", "spans.h", "threads.h")
COMPILERS = ("g++", "clang++")
# No -ffast-math, and no contraction: a multiply-add is fused where the source says fma(), nowhere else.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra")


class CompilerError(ValueError):
    """There is no C++ compiler, or it can not compile the kernels; a person has to install or choose one."""


def library_path() -> Path:
    """Return the shared library of the kernels; compile it first if this machine has not yet.

    It is kept in $TRADEWIND_HOME/kernels (default ~/.cache/tradewind/kernels) under a hash of everything that
    it is made from. Compiling blocks for some seconds; several processes may do so at once. Raises
    CompilerError.
    """
    compiler = _compiler()
    flags = (*FLAGS, "-mcpu=native" if platform.machine() == "aarch64" else "-march=native")
    library = default_home() / "kernels" / f"{_fingerprint(compiler, flags)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, flags, library)
    return library


def _compiler() -> str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise CompilerError(
        f"the CPU kernels need a C++17 compiler, and there is none: {' and '.join(names)} not found. "
        "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
        "macOS: xcode-select --install), or set CXX to its path."
    )


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    parts = [compiler, *flags, _output([compiler, "--version"]), _processor()]
    parts += [(Path(__file__).parent / name).read_text() for name in SOURCES + HEADERS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """Describe what -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile each source in a process of its own, and put the library in place in one step."""
    source = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = {name: str(Path(folder, name).with_suffix(".o")) for name in SOURCES}
        jobs = [
            subprocess.Popen(
                [compiler, *flags, "-c", str(source / name), "-o", target],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name, target in objects.items()
        ]
        messages = [job.communicate()[0] for job in jobs]
        if any(job.returncode for job in jobs):
            raise CompilerError(f"{compiler} could not compile the CPU kernels:\n{''.join(messages)}")
        finished = Path(folder, library.name)
        _output([compiler, "-shared", "-pthread", *objects.values(), "-o", str(finished)])
        os.replace(finished, library)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout
