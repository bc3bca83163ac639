"""Rows of several gated networks in one call, against one network after the other, slowly."""

import pytest
import torch

from shards.kernels import cpu

DTYPES = (torch.bfloat16, torch.float32)
# Rows of each network: of one, of many, of none, and more than are packed at once (1008).
COUNTS = ([1], [0, 2, 0], [3, 1, 14, 29, 8], [1] * 16, [300, 1, 40], [990, 30, 1100])


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    cpu.set_threads(1, 0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_networks(number, hidden, inner, dtype):
    weights = [
        (random(2 * inner, hidden, seed=2 * n).to(dtype), random(hidden, inner, seed=2 * n + 1).to(dtype))
        for n in range(number)
    ]
    return weights, [(cpu.pack(gate_up), cpu.pack(down)) for gate_up, down in weights]


def run(networks, counts, x_ND):
    out_ND = torch.full_like(x_ND, float("nan"))
    cpu.gated_mlps(x_ND, [(rows, *network) for rows, network in zip(counts, networks, strict=True)], out_ND)
    return out_ND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inner"), [(5, 1), (48, 100), (64, 96), (33, 65)])
@pytest.mark.parametrize("counts", COUNTS)
def test_each_row_goes_through_its_network_as_float64_has_it(counts, hidden, inner, dtype):
    weights, networks = random_networks(len(counts), hidden, inner, dtype)
    x_ND = random(sum(counts), hidden)
    exact = []
    for x, (gate_up, down) in zip(x_ND.double().split(counts), weights, strict=True):
        gate, up = (x @ gate_up.double().T).chunk(2, dim=1)
        exact.append((torch.nn.functional.silu(gate) * up) @ down.double().T)
    scale = inner**0.5 * hidden
    assert (run(networks, counts, x_ND) - torch.cat(exact)).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("spin_us", [0, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_rows_and_networks_beside_it(dtype, spin_us, num_threads):
    counts = [3, 1, 14, 29, 8, 1, 60, 2]
    _, networks = random_networks(len(counts), 96, 200, dtype)
    x_ND = random(sum(counts), 96)
    alone = [
        run([network], [1], row[None])
        for network, x in zip(networks, x_ND.split(counts), strict=True)
        for row in x
    ]
    cpu.set_threads(num_threads, spin_us)
    for _ in range(20):
        assert torch.equal(run(networks, counts, x_ND), torch.cat(alone))


def activated(gates: list[float]) -> torch.Tensor:
    """Return silu of the gates, by networks that do nothing else: up is 1, and down adds nothing."""
    eye = torch.eye(len(gates))
    gate = torch.cat([eye, torch.zeros(len(gates), 1)], dim=1)
    up = torch.cat([torch.zeros_like(eye), torch.ones(len(gates), 1)], dim=1)
    down = torch.cat([eye, torch.zeros(1, len(gates))])
    x_ND = torch.tensor([[*gates, 1.0]])
    return run([(cpu.pack(torch.cat([gate, up])), cpu.pack(down))], [1], x_ND)[0, :-1]


def test_silu_of_extreme_gates_is_zero_or_the_gate():
    gates = [-3e38, -200.0, -0.0, 0.0, 200.0, 3e38]
    assert torch.equal(activated(gates), torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 3e38]))


def test_silu_agrees_with_float64():
    gates = torch.linspace(-90, 30, 1000)
    exact = torch.nn.functional.silu(gates.double())
    torch.testing.assert_close(activated(gates.tolist()).double(), exact, rtol=1e-6, atol=1e-30)


def test_a_gate_that_is_not_a_number_stays_so():
    assert activated([float("nan")]).isnan().all()


@pytest.mark.parametrize("counts", [[2, 0], [2, 2], [-1, 4]])
def test_counts_that_are_not_the_rows_are_refused(counts):
    _, networks = random_networks(2, 8, 4, torch.float32)
    with pytest.raises(AssertionError, match="are not 3 rows"):
        run(networks, counts, random(3, 8))


def test_networks_of_another_width_are_refused():
    _, networks = random_networks(2, 8, 4, torch.float32)
    _, wider = random_networks(1, 8, 5, torch.float32)
    with pytest.raises(AssertionError, match="gate_up can't be"):
        run([*networks, *wider], [1, 1, 1], random(3, 8))
    with pytest.raises(AssertionError, match="gate_up can't be"):
        run(networks, [1, 1], random(2, 9))
