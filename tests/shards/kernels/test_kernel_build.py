import ctypes
import os
import subprocess
import sys

import pytest

from shards.kernels import build


def test_a_missing_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.CompilerError, match=r"g\+\+ and clang\+\+ not found.*apt-get install g\+\+"):
        build.library_path()


def test_a_compiler_that_fails_shows_its_messages(monkeypatch, tmp_path):
    fake = tmp_path / "c++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho no such luck\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("TRADEWIND_HOME", str(tmp_path))
    with pytest.raises(build.CompilerError, match=r"(?s)could not compile the CPU kernels:\n.*no such luck"):
        build.library_path()
    assert list((tmp_path / "kernels").iterdir()) == []


def test_two_processes_may_build_at_once(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\nexec {build._compiler()} "$@" -O0\n'
    )  # the last -O counts; this one is quick
    compiler.chmod(0o755)
    command = [sys.executable, "-c", "from shards.kernels import build; print(build.library_path())"]
    environment = {**os.environ, "TRADEWIND_HOME": str(tmp_path), "CXX": str(compiler)}
    builders = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {builder.communicate(timeout=240)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    (path,) = paths
    assert ctypes.CDLL(path).tw_linear
    assert [str(left) for left in (tmp_path / "kernels").iterdir()] == [path]


def test_a_finished_build_is_used_again(monkeypatch):
    path = build.library_path()
    made = path.stat().st_mtime_ns
    assert build.library_path() == path
    assert path.stat().st_mtime_ns == made


def test_every_source_file_is_part_of_the_build():
    folder = build.Path(build.__file__).parent
    assert {path.name for path in folder.glob("*.cpp")} == set(build.SOURCES)
    assert {path.name for path in folder.glob("*.h")} == set(build.HEADERS)
