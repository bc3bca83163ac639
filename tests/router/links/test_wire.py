"""The frame codec, alone."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.open_file import OpenFile
from router.links.wire import HEADER_BYTES, MAX_FRAME_BYTES, VERSION, decode_body, decode_header, encode

UINT32 = st.integers(0, 2**32 - 1)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    dtype = draw(st.sampled_from(Dtype))
    num_rows = draw(st.integers(0, 5)) if dtype else 0
    row_bytes = dtype.element_bytes * draw(st.integers(0, 9)) * num_rows
    rows = draw(st.binary(min_size=row_bytes, max_size=row_bytes))
    kind, meta = draw(st.sampled_from(Kind)), draw(st.binary(max_size=50))
    file = None
    if kind == Kind.MEMORY:
        file, meta = OpenFile(os.open(os.devnull, os.O_RDONLY)), meta or b"x"
    return Frame(kind, draw(UINT32), draw(UINT32), meta, dtype, num_rows, memoryview(rows), file=file)


def decoded(data: bytes) -> Frame:
    header = decode_header(data[:HEADER_BYTES])
    return decode_body(header, memoryview(data)[HEADER_BYTES:])


def header_of(num_rows: int, row_bytes: int, meta_bytes: int) -> bytes:
    return struct.pack(
        "<4sHBB5I", b"TWND", VERSION, Kind.ROWS, Dtype.FLOAT32, 0, 0, num_rows, row_bytes, meta_bytes
    )


@given(frames())
def test_a_frame_comes_back_as_it_went(frame: Frame):
    assert decoded(b"".join(encode(frame))) == frame


def test_rows_are_not_copied():
    rows = bytearray(8)
    parts = encode(Frame(Kind.ROWS, dtype=Dtype.FLOAT32, num_rows=2, rows=memoryview(rows)))
    rows[0] = 7
    assert bytes(parts[-1])[0] == 7


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_a_random_header_is_refused(data: bytes):
    with pytest.raises(LinkLost):
        decode_header(data)


@given(st.binary(min_size=HEADER_BYTES - 7, max_size=HEADER_BYTES - 7))
def test_a_random_header_behind_the_right_magic_is_good_or_refused(data: bytes):
    try:
        header = decode_header(b"TWND" + VERSION.to_bytes(2, "little") + bytes([1]) + data)
    except LinkLost:
        return
    assert 0 <= header.body_bytes <= MAX_FRAME_BYTES


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "meta_bytes"),
    [(1, 4, 2**32 - 1), (2**32 - 1, 2**32 - 4, 0), (2_500_000, 4096, 0), (1, 2**30, 1)],
)
def test_a_frame_above_the_bound_is_refused_and_nothing_allocated(
    num_rows: int, row_bytes: int, meta_bytes: int
):
    header = header_of(num_rows, row_bytes, meta_bytes)
    tracemalloc.start()
    with pytest.raises(LinkLost, match="at most 1073741824"):
        decode_header(header)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000


def test_a_link_may_have_a_tighter_bound():
    with pytest.raises(LinkLost, match="at most 1000"):
        decode_header(header_of(10, 100, 1), max_frame_bytes=1000)
    assert decode_header(header_of(10, 100, 0), max_frame_bytes=1000).body_bytes == 1000


@pytest.mark.parametrize(("num_rows", "row_bytes"), [(3, 6), (0, 4)])
def test_rows_that_do_not_hold_whole_elements_are_refused(num_rows: int, row_bytes: int):
    with pytest.raises(LinkLost):
        decode_header(header_of(num_rows, row_bytes, 0))


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.ROWS, dtype=Dtype.FLOAT32, num_rows=3, rows=memoryview(bytes(16))),
        Frame(Kind.ROWS, dtype=Dtype.FLOAT32, num_rows=0, rows=memoryview(bytes(16))),
        Frame(Kind.ROWS, dtype=Dtype.FLOAT32, num_rows=1, rows=memoryview(bytes(6))),
        Frame(Kind.ROWS, dtype=Dtype.NONE, num_rows=1),
        Frame(Kind.ROWS, sequence=2**32),
        Frame(Kind.ROWS, layer=-1),
        Frame(Kind.ROWS, dtype=Dtype.FLOAT32, num_rows=1, device_rows=np.zeros(1)),
        Frame(Kind.MEMORY, meta=b"without a file"),
        Frame(Kind.MEMORY, file=OpenFile(os.open(os.devnull, os.O_RDONLY))),
        Frame(Kind.WEIGHTS, meta=b"with one", file=OpenFile(os.open(os.devnull, os.O_RDONLY))),
    ],
)
def test_a_frame_that_a_peer_would_refuse_is_not_encoded(frame: Frame):
    with pytest.raises(ValueError, match=r".+"):
        encode(frame)
