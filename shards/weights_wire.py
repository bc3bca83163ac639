"""How one expert's weights get from group to group: packed, as kernels want them, a few panels a frame.

Within a host they need not travel: a frame has the file by which the other group maps the same memory.

P panels   B bytes of a panel
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch

from router.links.base import Dtype, Frame, Kind
from router.links.rows import frame_of, rows_of
from shards import kernels
from shards.config import ModelConfig
from shards.kernels.cpu import PackedWeight
from shards.layers.mlp import GatedMlp

# Of a frame, unless one panel alone is larger. Rows that reach the sending group wait for one frame of each
# link that fetches; while rows keep coming, one frame of each leaves between two questions.
PIECE_BYTES = 1 << 20
_DTYPES = (torch.bfloat16, torch.float32)


def fetch_frame(layer: int, expert: int, sequence: int) -> Frame:
    """Return the question for the weights of one expert."""
    return Frame(Kind.FETCH, sequence, layer, expert.to_bytes(4, "little", signed=True))


def expert_of(frame: Frame) -> int:
    """Return the expert that a FETCH asks for. Raises ValueError if its meta does not name one."""
    meta = memoryview(frame.meta)
    if meta.nbytes != 4:
        raise ValueError(f"the meta of a FETCH must be one int32, the expert, not {meta.nbytes} bytes")
    return int.from_bytes(meta, "little", signed=True)


def weights_frames(mlp: GatedMlp, layer: int, sequence: int, with_files: bool = False) -> Iterator[Frame]:
    """Yield the answer to a FETCH: frames of whole panels, in order, that share the weights' memory.

    If `with_files`, a matrix that has a file is one frame with that file instead.
    """
    for name, weight in (("gate_up", mlp.gate_up), ("down", mlp.down)):
        if with_files and weight.file:
            meta = _meta(name, weight.dtype, weight.out_features, weight.in_features, 0)
            yield Frame(Kind.MEMORY, sequence, layer, meta, file=weight.file)
            continue
        bytes_PB = _bytes_of(weight)
        num_panels, panel_bytes = bytes_PB.shape
        step = max(1, PIECE_BYTES // panel_bytes)
        for start in range(0, num_panels, step):
            meta = _meta(name, weight.dtype, weight.out_features, weight.in_features, start)
            panels_PB = bytes_PB[start : start + step]
            yield frame_of(Kind.WEIGHTS, panels_PB, sequence=sequence, layer=layer, meta=meta)


def receive_mlp(frames: Iterable[Frame], config: ModelConfig) -> GatedMlp:
    """Assemble the weights of an expert of `config` from what `weights_frames` yields on the other side.

    Takes no frame beyond the last that it needs. Raises ValueError for the first frame that does not fit: of
    other shapes, out of order, or packed by kernels with another layout; OSError if a file can't be mapped.
    """
    frames, hidden, inner = iter(frames), config.hidden_size, config.intermediate_size
    gate_up = _receive(frames, "gate_up", 2 * inner, hidden)
    return GatedMlp(gate_up, _receive(frames, "down", hidden, inner))


def _receive(frames: Iterator[Frame], name: str, out_features: int, in_features: int) -> PackedWeight:
    weight: PackedWeight | None = None
    filled = 0
    for frame in frames:
        dtypes = _DTYPES if weight is None else (weight.dtype,)
        possible = {_meta(name, dtype, out_features, in_features, filled): dtype for dtype in dtypes}
        # Compared, not parsed: what a peer sends steers nothing here.
        if memoryview(frame.meta).nbytes > max(map(len, possible)) or bytes(frame.meta) not in possible:
            expected = " or ".join(meta.decode() for meta in possible)
            raise ValueError(f"the weights are {bytes(frame.meta[:300])!r}, but should be {expected}")
        if frame.file:
            if weight:
                raise ValueError(f"a file comes in the middle of {name}")
            return PackedWeight.mapped(out_features, in_features, possible[bytes(frame.meta)], frame.file)
        if weight is None:  # not sooner: a peer of other kernels costs no memory
            dtype = possible[bytes(frame.meta)]
            weight = PackedWeight.empty(out_features, in_features, dtype, is_shared=True)
        bytes_PB = _bytes_of(weight)
        num_panels, panel_bytes = bytes_PB.shape
        if frame.dtype != Dtype.UINT8 or not 0 < frame.num_rows <= num_panels - filled:
            raise ValueError(
                f"{name} lacks {num_panels - filled} panels, each a row of UINT8; "
                f"{frame.num_rows} rows of {frame.dtype.name} came"
            )
        end = filled + frame.num_rows
        bytes_PB[filled:end].copy_(rows_of(frame, panel_bytes))
        filled = end
        if filled == num_panels:
            return weight
    raise ValueError(f"the frames end in the middle of {name}")


def _bytes_of(weight: PackedWeight) -> torch.Tensor:
    return weight.data.flatten(1).view(torch.uint8)


def _meta(name: str, dtype: torch.dtype, out_features: int, in_features: int, first_panel: int) -> bytes:
    return json.dumps(
        {
            "matrix": name,
            "dtype": str(dtype).removeprefix("torch."),
            "out_features": out_features,
            "in_features": in_features,
            "first_panel": first_panel,
            "layout": _layout(),
        }
    ).encode()


@cache
def _layout() -> str:
    """Name the order of numbers in a panel, by a hash of the source that makes it: nobody can forget that."""
    source = Path(kernels.__path__[0], "pack.cpp").read_bytes()
    return hashlib.sha256(source).hexdigest()[:16]
