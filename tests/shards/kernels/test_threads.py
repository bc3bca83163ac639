import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shards.kernels import cpu


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    cpu.set_threads(1, 0)


def problem(seed: int) -> tuple[torch.Tensor, cpu.PackedWeight]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(320, 128, generator=generator)
    return torch.randn(20, 128, generator=generator), cpu.pack(weight)


@pytest.mark.parametrize("spin_us", [0, 100])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_two_python_threads_may_call_at_once(num_threads, spin_us):
    problems = [problem(seed) for seed in range(2)]
    expected = [cpu.linear(*p) for p in problems]
    cpu.set_threads(num_threads, spin_us)
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(lambda p=p: [cpu.linear(*p) for _ in range(200)]) for p in problems]
        for job, y in zip(jobs, expected, strict=True):
            assert all(torch.equal(found, y) for found in job.result(timeout=60))


def test_the_number_of_threads_may_change_while_others_compute():
    x, weight = problem(0)
    expected = cpu.linear(x, weight)
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(lambda: [cpu.linear(x, weight) for _ in range(300)])
        for i in range(30):
            cpu.set_threads(1 + i % 4, (0, 50)[i % 2])
        assert all(torch.equal(found, expected) for found in job.result(timeout=60))


def _send_product(x: torch.Tensor, weight: cpu.PackedWeight, connection) -> None:
    cpu.linear(x, weight)
    cpu.set_threads(2, 10)
    connection.send(cpu.linear(x, weight).tolist())


def test_a_forked_child_computes_without_the_threads_of_its_parent():
    x, weight = problem(0)
    cpu.set_threads(3, 10)
    expected = cpu.linear(x, weight)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_send_product, args=(x, weight, sender))
    child.start()
    assert receiver.poll(timeout=60)
    assert receiver.recv() == expected.tolist()
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.parametrize(("num_threads", "spin_us"), [(0, 0), (-1, 0), (1, -1)])
def test_impossible_settings_are_refused(num_threads, spin_us):
    with pytest.raises(ValueError, match=f"not {num_threads} and {spin_us}"):
        cpu.set_threads(num_threads, spin_us)
