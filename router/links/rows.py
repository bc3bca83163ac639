"""Tensors as the rows of a frame, and back, without a copy."""

import numpy as np
import torch
from torch import Tensor

from router.links.base import Dtype, Frame, Kind

# N rows   D elements of a row

_TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.UINT8: torch.uint8,
}
_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in _TORCH_DTYPES.items()}


def frame_of(
    kind: Kind, x_ND: Tensor, *, sequence: int = 0, layer: int = 0, meta: bytes | memoryview = b""
) -> Frame:
    """Return a frame whose rows are the memory of `x_ND`: contiguous, of fp32, bf16 or uint8, on any device.

    Rows on a GPU are given away: nobody may write to them afterwards.
    """
    assert x_ND.is_contiguous()
    dtype = _DTYPES.get(x_ND.dtype)
    if dtype is None:
        raise ValueError(f"rows must be float32, bfloat16 or uint8 to travel, but they are {x_ND.dtype}")
    if x_ND.is_cuda:
        return Frame(kind, sequence, layer, meta, dtype, len(x_ND), device_rows=x_ND)
    rows = x_ND.view(torch.int16) if dtype == Dtype.BFLOAT16 else x_ND  # numpy knows no bf16
    return Frame(kind, sequence, layer, meta, dtype, len(x_ND), rows.numpy().data)


def rows_of(frame: Frame, row_size: int) -> Tensor:
    """Return the rows of a received frame as a tensor [num_rows, row_size] over the link's own buffer.

    It is valid until the next `receive` on that link. Raises ValueError if the rows are not of that size.
    """
    rows_bytes = frame.rows.nbytes if frame.device_rows is None else frame.device_rows.nbytes
    expected_bytes = frame.num_rows * row_size * frame.dtype.element_bytes
    if frame.dtype == Dtype.NONE or rows_bytes != expected_bytes:
        raise ValueError(
            f"rows must have {row_size} elements; {frame.num_rows} rows of {frame.dtype.name} in "
            f"{rows_bytes} bytes do not"
        )
    if frame.device_rows is None:
        flat = torch.from_numpy(np.frombuffer(frame.rows, np.uint8))
    else:
        assert isinstance(frame.device_rows, Tensor)
        flat = frame.device_rows
    return flat.view(_TORCH_DTYPES[frame.dtype]).view(frame.num_rows, row_size)
