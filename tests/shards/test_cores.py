import os
import subprocess
import sys

import pytest

from shards.cores import cpu_quota, usable_cores


@pytest.fixture
def cgroups(tmp_path):
    """Return a function that writes cpu.max of each cgroup, by its path, and returns the root of all."""

    def write(limits):
        for path, limit in limits.items():
            folder = tmp_path / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cpu.max").write_text(limit + "\n")
        return tmp_path

    return write


def test_there_is_at_least_one_core_and_no_more_than_the_machine_has():
    assert 1 <= usable_cores() <= os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="macOS has no affinity")
def test_a_process_bound_to_one_core_has_one():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from shards.cores import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_a_quota_is_counted_in_cores(cgroups):
    assert cpu_quota(cgroups({"app": "250000 100000"}), "/app") == 2.5


def test_the_tightest_quota_of_a_cgroup_and_those_around_it_counts(cgroups):
    root = cgroups({"a": "150000 100000", "a/b": "400000 100000", "a/b/c": "max 100000"})
    assert cpu_quota(root, "/a/b/c") == 1.5


def test_a_container_finds_its_quota_at_the_root(cgroups):
    assert cpu_quota(cgroups({".": "50000 100000"}), "/") == 0.5


@pytest.mark.parametrize("limits", [{}, {"app": "max 100000"}])
def test_without_a_quota_there_is_no_limit(cgroups, limits):
    assert cpu_quota(cgroups(limits), "/app") is None
