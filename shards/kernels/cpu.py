"""The model's arithmetic on a CPU: a row's result never depends on the rows beside it.

Contiguous CPU tensors; activations, cache and sums in fp32. Calls release the interpreter's lock, run on the
threads of `set_threads`, and take turns when two Python threads make them at once.

T tokens   N output features (or rows)   K input features   D hidden   F intermediate   P positions
X heads * head_dim (of qkv: (heads + 2 * kv_heads) * head_dim)   C chunks
B blocks   G KV heads   H head_dim   S BLOCK_SIZE
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from router.links.open_file import OpenFile
from shards.kernels import huge_pages, shared_pages
from shards.kernels.library import CSpans, library
from shards.kv_cache import BLOCK_SIZE

PANEL = 32  # columns of a panel, as in product.cpp
MAX_HEAD_DIM = 512  # as in attention.cpp
NO_WINDOW = 1 << 40  # more than any position


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix in the order in which `linear` reads it."""

    data: Tensor  # [panels, K, 32]; in bf16, columns n and n + 16 of a panel lie side by side
    out_features: int
    in_features: int
    file: OpenFile | None = None  # by which other processes of this host can map `data`

    @classmethod
    def empty(
        cls, out_features: int, in_features: int, dtype: torch.dtype, is_shared: bool = False
    ) -> "PackedWeight":
        """Reserve the memory of a bf16 or fp32 weight; what it holds is not defined.

        If `is_shared`, in memory that other processes can map, where the system has it.
        """
        shape = _packed_shape(out_features, in_features)
        if is_shared and (shared := shared_pages.create(prod(shape) * dtype.itemsize)):
            data, file = shared
            return cls(data.view(dtype).view(*shape), out_features, in_features, file)
        return cls(huge_pages.empty(shape, dtype), out_features, in_features)

    @classmethod
    def mapped(
        cls, out_features: int, in_features: int, dtype: torch.dtype, file: OpenFile
    ) -> "PackedWeight":
        """Map a weight that another process has packed. Raises as `shared_pages.adopt` does."""
        shape = _packed_shape(out_features, in_features)
        data = shared_pages.adopt(file, prod(shape) * dtype.itemsize).view(dtype).view(*shape)
        return cls(data, out_features, in_features, None if shared_pages.is_scarce(file) else file)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype


@dataclass(frozen=True)
class Spans:
    """Which tokens of a step belong to which chunk, and where their keys and values live."""

    token_start_C1: Tensor  # int32; chunk c has the tokens token_start[c] .. token_start[c + 1] - 1
    position_C: Tensor  # int32; of each chunk's first token
    block_table_CB: Tensor  # int32; anything behind the blocks that the chunk needs

    def __post_init__(self) -> None:
        num_chunks = self.position_C.numel()
        _check("token_start_C1", self.token_start_C1, torch.int32, (num_chunks + 1,))
        _check("position_C", self.position_C, torch.int32, (num_chunks,))
        _check("block_table_CB", self.block_table_CB, torch.int32, (num_chunks, self.block_table_CB.size(-1)))
        assert self._starts == sorted(self._starts), f"token_start_C1 must rise, not {self._starts}"
        assert self._starts[0] == 0, f"token_start_C1 must begin with 0, not {self._starts[0]}"
        assert (self.position_C >= 0).all(), f"position_C must be 0 or more, not {self.position_C.tolist()}"

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    @functools.cached_property
    def end(self) -> int:
        """One more than the last position of any chunk."""
        num_tokens_C = [after - start for start, after in zip(self._starts, self._starts[1:], strict=False)]
        positions = self.position_C.tolist()
        return max((p + n for p, n in zip(positions, num_tokens_C, strict=True)), default=0)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [int(start) for start in self.token_start_C1.tolist()]

    @functools.cached_property
    def c_struct(self) -> CSpans:
        """The same for C; the pointers are good as long as this object lives."""
        table = self.block_table_CB
        return CSpans(
            table.size(0),
            table.size(1),
            self.token_start_C1.data_ptr(),
            self.position_C.data_ptr(),
            table.data_ptr(),
        )


def set_threads(num_threads: int, spin_us: int) -> None:
    """Let every later call use `num_threads` threads, of which the caller is one; 1 until the first call.

    A thread without work spins for `spin_us` microseconds, then sleeps. Spin only on a core that nobody else
    needs. Blocks until the old threads are gone.
    """
    if num_threads < 1 or spin_us < 0:
        raise ValueError(
            f"num_threads must be 1 or more and spin_us 0 or more, not {num_threads} and {spin_us}"
        )
    library().tw_set_threads(num_threads, spin_us)


def pack(weight_NK: Tensor, alone: bool = False, is_shared: bool = False) -> PackedWeight:
    """Copy a weight into panels of 32 columns, padded with zeros: bf16 and fp32 stay, fp16 becomes fp32.

    If `alone`, on the calling thread, beside other calls rather than in turn: nobody waits for it. If
    `is_shared`, for other processes to map, too.
    """
    dtype = torch.bfloat16 if weight_NK.dtype == torch.bfloat16 else torch.float32
    weight_NK = weight_NK.to(dtype).contiguous()
    packed = PackedWeight.empty(weight_NK.size(0), weight_NK.size(1), dtype, is_shared)
    library().tw_pack(
        weight_NK.data_ptr(),
        dtype.itemsize,
        packed.out_features,
        packed.in_features,
        packed.data.data_ptr(),
        alone,
    )
    return packed


def linear(x_TK: Tensor, weight: PackedWeight, out: Tensor | None = None) -> Tensor:
    """Return x W^T as fp32 [T, N], in `out` if given; T may be 0.

    Each element is one chain of fused multiply-adds over k in order. Weights in bf16 are widened, which is
    exact: nothing is rounded but the sum.
    """
    _check("x_TK", x_TK, torch.float32, (x_TK.size(0), weight.in_features))
    if out is None:
        out = torch.empty(x_TK.size(0), weight.out_features)
    _check("out", out, torch.float32, (x_TK.size(0), weight.out_features))
    library().tw_linear(
        x_TK.data_ptr(),
        x_TK.size(0),
        weight.data.data_ptr(),
        weight.data.dtype == torch.bfloat16,
        weight.out_features,
        weight.in_features,
        out.data_ptr(),
    )
    return out


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, row by row."""
    num_rows, dim = x_TD.shape
    _check("x_TD", x_TD, torch.float32)
    _check("weight_D", weight_D, torch.float32, (dim,))
    y_TD = torch.empty_like(x_TD)
    library().tw_rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), num_rows, dim, eps, y_TD.data_ptr())
    return y_TD


def gated_mlps(x_ND: Tensor, parts: Sequence[tuple[int, PackedWeight, PackedWeight]], out_ND: Tensor) -> None:
    """Write down(silu(gate x) * up x) of each row to `out_ND`: rows of several networks, in one call.

    A part is how many of the rows go through a network, and its weights: gate and up as one [2F, D], and down
    [D, F]. The first part has the first rows, and so on; all have the same D and F, and together all rows.
    """
    _check("x_ND", x_ND, torch.float32)
    _check("out_ND", out_ND, torch.float32, tuple(x_ND.shape))
    counts = [rows for rows, _, _ in parts]
    is_all = sum(counts) == len(x_ND) and all(rows >= 0 for rows in counts)
    assert is_all, f"{counts} are not {len(x_ND)} rows"
    if not parts:
        return
    down = parts[0][2]
    shapes = {(each.out_features, each.in_features) for _, each, _ in parts}
    assert shapes == {(2 * down.in_features, x_ND.size(1))}, f"gate_up can't be {shapes} for {x_ND.shape}"
    shapes = {(each.out_features, each.in_features) for _, _, each in parts}
    assert shapes == {(x_ND.size(1), down.in_features)}, f"down can't be {shapes} for {x_ND.shape}"
    assert all(first.dtype == second.dtype for _, first, second in parts)
    networks = np.array(
        [
            (rows, first.data.data_ptr(), second.data.data_ptr(), first.dtype == torch.bfloat16)
            for rows, first, second in parts
        ],
        dtype=np.int64,
    )
    library().tw_gated_mlps(
        x_ND.data_ptr(), len(parts), networks.ctypes.data, x_ND.size(1), down.in_features, out_ND.data_ptr()
    )


def rope_and_cache(
    qkv_TX: Tensor,
    spans: Spans,
    cos_PH: Tensor,
    sin_PH: Tensor,
    keys_BGHS: Tensor,
    values_BGSH: Tensor,
    num_heads: int,
) -> Tensor:
    """Rotate queries and keys by position, write keys and values to the cache, return the queries [T, X].

    Pairs are (i, i + head_dim / 2), as Hugging Face's rotate_half has them; `cos_PH` and `sin_PH` are
    [positions, head_dim / 2]. Raises ValueError for a position or a block that is not there.
    """
    num_blocks, num_kv_heads, head_dim, _ = keys_BGHS.shape
    _check_cache(keys_BGHS, values_BGSH, num_heads)
    _check("qkv_TX", qkv_TX, torch.float32, (spans.num_tokens, (num_heads + 2 * num_kv_heads) * head_dim))
    for name, table in (("cos_PH", cos_PH), ("sin_PH", sin_PH)):
        _check(name, table, torch.float32, (cos_PH.size(0), head_dim // 2))
    if spans.end > cos_PH.size(0):
        raise ValueError(
            f"position {spans.end - 1} is past the {cos_PH.size(0)} positions of cos_PH and sin_PH"
        )
    q_TX = torch.empty(spans.num_tokens, num_heads * head_dim)
    bad_chunk = library().tw_rope_and_cache(
        qkv_TX.data_ptr(),
        ctypes.byref(spans.c_struct),
        cos_PH.data_ptr(),
        sin_PH.data_ptr(),
        keys_BGHS.data_ptr(),
        values_BGSH.data_ptr(),
        num_blocks,
        num_heads,
        num_kv_heads,
        head_dim,
        q_TX.data_ptr(),
    )
    _check_blocks(bad_chunk, spans, num_blocks)
    return q_TX


def attention(
    q_TX: Tensor,
    spans: Spans,
    keys_BGHS: Tensor,
    values_BGSH: Tensor,
    num_heads: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Let every token attend to its sequence up to itself, or to the last `window` of those tokens.

    Returns [T, X]. Query heads share KV heads in consecutive groups. Reads only keys and values that are
    seen: the rest of a block may hold anything. Raises ValueError for a block that is not there.
    """
    num_blocks, num_kv_heads, head_dim, _ = keys_BGHS.shape
    _check_cache(keys_BGHS, values_BGSH, num_heads)
    _check("q_TX", q_TX, torch.float32, (spans.num_tokens, num_heads * head_dim))
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more, or None, not {window}")
    out_TX = torch.empty_like(q_TX)
    bad_chunk = library().tw_attention(
        q_TX.data_ptr(),
        ctypes.byref(spans.c_struct),
        keys_BGHS.data_ptr(),
        values_BGSH.data_ptr(),
        num_blocks,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        NO_WINDOW if window is None else window,
        out_TX.data_ptr(),
    )
    _check_blocks(bad_chunk, spans, num_blocks)
    return out_TX


def _packed_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    return -(-out_features // PANEL), in_features, PANEL


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    assert tensor.dtype == dtype, f"{name} must be {dtype}, not {tensor.dtype}"
    assert tensor.is_cpu, f"{name} must be on the CPU"
    assert tensor.is_contiguous(), f"{name} must be contiguous"
    assert shape is None or tensor.shape == shape, f"{name} must be {shape}, not {tuple(tensor.shape)}"


def _check_cache(keys_BGHS: Tensor, values_BGSH: Tensor, num_heads: int) -> None:
    num_blocks, num_kv_heads, head_dim, _ = keys_BGHS.shape
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 16, at most {MAX_HEAD_DIM}, not {head_dim}")
    _check("keys_BGHS", keys_BGHS, torch.float32, (num_blocks, num_kv_heads, head_dim, BLOCK_SIZE))
    _check("values_BGSH", values_BGSH, torch.float32, (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim))
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads cannot share {num_kv_heads} KV heads"


def _check_blocks(bad_chunk: int, spans: Spans, num_blocks: int) -> None:
    if bad_chunk >= 0:
        raise ValueError(
            f"the blocks of chunk {bad_chunk}, {spans.block_table_CB[bad_chunk].tolist()}, do not cover its "
            f"positions with numbers from 0 to {num_blocks - 1}"
        )
