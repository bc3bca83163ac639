import pytest
import torch

from shards.kernels import cpu


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    cpu.set_threads(1, 0)


def random_rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("dim", [1, 15, 64, 100, 576, 4096])
def test_rms_norm_agrees_with_float64(dim):
    x, weight = random_rows(5, dim), random_rows(dim)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_norm_of_a_row_does_not_depend_on_the_rows_beside_it(num_threads):
    x, weight = random_rows(300, 200), random_rows(200)
    norm = torch.cat([cpu.rms_norm(row[None], weight, 1e-6) for row in x])
    cpu.set_threads(num_threads, 20)
    assert torch.equal(cpu.rms_norm(x, weight, 1e-6), norm)


def test_no_rows_give_no_rows():
    assert cpu.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
