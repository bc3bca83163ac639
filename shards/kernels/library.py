"""The compiled kernels, as ctypes sees them."""

import ctypes
import functools

from shards.kernels import build

POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CSpans(ctypes.Structure):
    """`struct Spans` of spans.h."""

    _fields_ = (
        ("num_chunks", INT64),
        ("table_width", INT64),
        ("token_start", POINTER),
        ("position", POINTER),
        ("block_table", POINTER),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Load the kernels, compiled first if need be; see `build.library_path` for what that raises."""
    loaded = ctypes.CDLL(str(build.library_path()), use_errno=True)
    spans = ctypes.POINTER(CSpans)
    shapes = [INT64] * 4  # num_blocks, num_heads, num_kv_heads, head_dim
    signatures = {
        "tw_set_threads": (None, [ctypes.c_int, INT64]),
        "tw_pack": (None, [POINTER, ctypes.c_int, INT64, INT64, POINTER, ctypes.c_int]),
        "tw_linear": (None, [POINTER, INT64, POINTER, ctypes.c_int, INT64, INT64, POINTER]),
        "tw_rms_norm": (None, [POINTER, POINTER, INT64, INT64, FLOAT, POINTER]),
        "tw_gated_mlps": (None, [POINTER, INT64, POINTER, INT64, INT64, POINTER]),
        "tw_rope_and_cache": (INT64, [POINTER, spans, *[POINTER] * 4, *shapes, POINTER]),
        "tw_attention": (INT64, [POINTER, spans, *[POINTER] * 2, *shapes, FLOAT, INT64, POINTER]),
        "tw_map_shared": (POINTER, [ctypes.c_int, INT64, ctypes.c_int]),
        "tw_unmap": (None, [POINTER, INT64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
