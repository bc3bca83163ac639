"""What an expert group's process holds, and how it behaves on its host."""

import resource
from collections.abc import Callable, Iterator

import pytest

from cluster.actors.expert_process import ExpertProcess
from shards.cores import usable_cores
from tests.shards.tiny_models import TinyModel


@pytest.fixture
def start(tiny_model: Callable[..., TinyModel]) -> Iterator[Callable[..., ExpertProcess]]:
    started: list[ExpertProcess] = []

    def start(num_threads: int = 0) -> ExpertProcess:
        directory = tiny_model("mixtral").directory
        started.append(ExpertProcess.start("model/0", directory, 12, num_threads, b"one cluster's secret"))
        return started[-1]

    yield start
    for process in started:
        process.stager.close()
        process.service.stop()


def test_it_may_have_as_many_files_open_as_the_system_allows(start):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 900), hard))
    try:
        start()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("num_threads", "abreast"),
    [(0, usable_cores()), (1, usable_cores()), (usable_cores(), 1), (3 * usable_cores(), 1)],
)
def test_it_knows_how_many_like_it_the_cores_can_run_at_once(start, num_threads: int, abreast: int):
    assert start(num_threads).abreast == abreast
