"""Tensors as the rows of a frame, and back, without a copy. The only file of the links that needs torch."""

import numpy as np
import torch
from torch import Tensor

from router.links.base import Dtype, Frame, Kind

# N rows   D elements of a row


def frame_of(
    kind: Kind, x_ND: Tensor, *, sequence: int = 0, layer: int = 0, meta: bytes | memoryview = b""
) -> Frame:
    """Return a frame whose rows are the memory of `x_ND`: contiguous, on the CPU, fp32 or bf16."""
    assert x_ND.is_contiguous()
    if x_ND.dtype == torch.float32:
        dtype, rows = Dtype.FLOAT32, x_ND.numpy()
    elif x_ND.dtype == torch.bfloat16:
        dtype, rows = Dtype.BFLOAT16, x_ND.view(torch.int16).numpy()  # numpy knows no bf16
    else:
        raise ValueError(f"rows must be float32 or bfloat16 to travel, but they are {x_ND.dtype}")
    return Frame(kind, sequence, layer, meta, dtype, len(rows), rows.data)


def rows_of(frame: Frame, row_size: int) -> Tensor:
    """Return the rows of a received frame as a tensor [num_rows, row_size] over the link's own buffer.

    It is valid until the next `receive` on that link. Raises ValueError if the rows are not of that size.
    """
    if frame.dtype == Dtype.NONE or frame.rows.nbytes != frame.num_rows * row_size * _ITEM_BYTES[frame.dtype]:
        raise ValueError(
            f"rows must have {row_size} elements; {frame.num_rows} rows of {frame.dtype.name} in "
            f"{frame.rows.nbytes} bytes do not"
        )
    if frame.dtype == Dtype.FLOAT32:
        return torch.from_numpy(np.frombuffer(frame.rows, np.float32).reshape(frame.num_rows, row_size))
    bits = torch.from_numpy(np.frombuffer(frame.rows, np.int16).reshape(frame.num_rows, row_size))
    return bits.view(torch.bfloat16)


_ITEM_BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2}
