"""Tensors as rows, and back."""

from dataclasses import replace

import pytest
import torch

from router.links.base import Dtype, Frame, Kind
from router.links.rows import frame_of, rows_of

DTYPES = {torch.float32: Dtype.FLOAT32, torch.bfloat16: Dtype.BFLOAT16, torch.uint8: Dtype.UINT8}


@pytest.mark.parametrize(("torch_dtype", "dtype"), DTYPES.items())
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4)])
def test_a_tensor_comes_back_from_its_frame(torch_dtype, dtype: Dtype, shape):
    x_ND = torch.arange(shape[0] * shape[1]).to(torch_dtype).view(shape)
    frame = frame_of(Kind.ROWS, x_ND, sequence=1, layer=2, meta=b"meta")
    assert (frame.dtype, frame.num_rows, frame.rows.nbytes) == (dtype, shape[0], x_ND.nbytes)
    assert torch.equal(rows_of(frame, shape[1]), x_ND)


def test_rows_are_the_tensors_own_memory_both_ways():
    x_ND = torch.zeros(2, 3)
    y_ND = rows_of(frame_of(Kind.ROWS, x_ND), 3)
    x_ND[1, 2] = 5
    assert y_ND[1, 2] == 5


@pytest.mark.parametrize("torch_dtype", DTYPES)
def test_device_rows_come_back_from_flat_bytes(torch_dtype):
    x_ND = torch.arange(12).to(torch_dtype).view(3, 4)
    frame = replace(
        frame_of(Kind.ROWS, x_ND), rows=memoryview(b""), device_rows=x_ND.flatten().view(torch.uint8)
    )
    assert torch.equal(rows_of(frame, 4), x_ND)


def test_rows_of_another_size_are_refused():
    frame = frame_of(Kind.ROWS, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="rows must have 4 elements; 2 rows of FLOAT32 in 24 bytes do not"):
        rows_of(frame, 4)
    with pytest.raises(ValueError, match="rows must have 3 elements"):
        rows_of(Frame(Kind.TOKENS), 3)


def test_tensors_that_do_not_travel_are_refused_by_type():
    with pytest.raises(ValueError, match=r"uint8 to travel, but they are torch\.float64"):
        frame_of(Kind.ROWS, torch.zeros(1, 1, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_on_a_gpu_stays_there():
    x_ND = torch.arange(12, dtype=torch.bfloat16, device="cuda").view(3, 4)
    frame = frame_of(Kind.ROWS, x_ND)
    assert (frame.device_rows is x_ND, frame.rows.nbytes, frame.num_rows) == (True, 0, 3)
