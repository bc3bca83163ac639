import pytest
import torch

from shards.kernels import cpu

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((1, 1), (16, 5), (33, 17), (96, 64), (100, 301), (192, 576), (31, 1030))


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    cpu.set_threads(1, 0)


def random_weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)


def random_rows(num_rows: int, k: int) -> torch.Tensor:
    return torch.randn(num_rows, k, generator=torch.Generator().manual_seed(num_rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_agrees_with_float64(n, k, dtype):
    weight = random_weight(n, k, dtype)
    packed = cpu.pack(weight)
    for num_rows in range(68):
        x = random_rows(num_rows, k)
        y = cpu.linear(x, packed)
        # The error of a chain of k roundings grows with the sum of the terms' sizes, not with the result.
        size = x.abs().double() @ weight.abs().double().T
        assert y.shape == (num_rows, n)
        assert ((y - x.double() @ weight.double().T).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_output_is_one_chain_of_fused_multiply_adds_over_k(dtype):
    weight, x = random_weight(40, 37, dtype), random_rows(3, 37)
    y = torch.zeros(3, 40)
    for k in range(37):
        # Products of two fp32 are exact in fp64; adding rounds to 53 bits and then to 24, which is the fused
        # result unless the first rounding lands on a tie of the second (it does not with these numbers).
        y = (y.double() + x[:, k, None].double() * weight[:, k].double()).float()
    assert torch.equal(cpu.linear(x, cpu.pack(weight)), y)


@pytest.mark.parametrize("spin_us", [0, 30, 1000])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype, num_threads, spin_us):
    n, k = 200, 600
    packed, x = cpu.pack(random_weight(n, k, dtype)), random_rows(300, k)
    alone = torch.cat([cpu.linear(x[i : i + 1], packed) for i in range(300)])
    cpu.set_threads(num_threads, spin_us)
    for num_rows in (1, 2, 3, 4, 5, 7, 8, 13, 14, 15, 27, 28, 29, 64, 67, 252, 253, 300):
        for first in {0, 1, 300 - num_rows} & set(range(301 - num_rows)):
            rows = slice(first, first + num_rows)
            assert torch.equal(cpu.linear(x[rows], packed), alone[rows])


def test_more_rows_than_are_packed_at_once_change_nothing():
    packed, x = cpu.pack(random_weight(48, 300, torch.bfloat16)), random_rows(1100, 300)
    halves = torch.cat([cpu.linear(x[:500], packed), cpu.linear(x[500:], packed)])
    assert torch.equal(cpu.linear(x, packed), halves)


def test_bf16_weights_give_what_the_same_numbers_in_fp32_give():
    weight, x = random_weight(77, 130, torch.bfloat16), random_rows(20, 130)
    assert torch.equal(cpu.linear(x, cpu.pack(weight)), cpu.linear(x, cpu.pack(weight.float())))


def test_fp16_weights_are_packed_as_fp32():
    weight = random_weight(10, 20, torch.float16)
    packed = cpu.pack(weight)
    assert packed.dtype == torch.float32
    x = random_rows(2, 20)
    assert torch.equal(cpu.linear(x, packed), cpu.linear(x, cpu.pack(weight.float())))


def test_linear_writes_to_the_tensor_it_is_given():
    packed, x = cpu.pack(random_weight(50, 60, torch.float32)), random_rows(4, 60)
    buffer = torch.full((6, 50), 7.0)
    assert cpu.linear(x, packed, out=buffer[1:5]).data_ptr() == buffer[1:5].data_ptr()
    assert torch.equal(buffer[1:5], cpu.linear(x, packed))
    assert buffer[0].eq(7).all()
    assert buffer[5].eq(7).all()


def test_rows_of_another_width_are_refused():
    with pytest.raises(AssertionError, match=r"x_TK must be \(2, 60\), not \(2, 61\)"):
        cpu.linear(random_rows(2, 61), cpu.pack(random_weight(5, 60, torch.float32)))
