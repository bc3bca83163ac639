"""How a frame looks on a socket: a fixed header, then meta, then rows. Pure functions, no pickle."""

import struct
from typing import NamedTuple

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.open_file import OpenFile

# Little-endian: magic, version, kind, dtype, layer, sequence, num_rows, row_bytes, meta_bytes.
_HEADER = struct.Struct("<4sHBB5I")
_MAGIC = b"TWND"
VERSION = 3  # of the frames and of the handshake: peers of different versions refuse each other
HEADER_BYTES = _HEADER.size
MAX_FRAME_BYTES = 1 << 30  # of meta and rows together; a receiver allocates no more than this for a frame

_UINT32_MAX = (1 << 32) - 1


class Header(NamedTuple):
    """What the first HEADER_BYTES of a frame say, already checked."""

    kind: Kind
    dtype: Dtype
    layer: int
    sequence: int
    num_rows: int
    row_bytes: int  # of one row; 0 if there are none
    meta_bytes: int

    @property
    def body_bytes(self) -> int:
        return self.meta_bytes + self.num_rows * self.row_bytes


def encode(frame: Frame) -> list[bytes | memoryview]:
    """Return the buffers that make up the frame on the wire: header, meta, rows, without copying the rows.

    A file is not among them: it goes with the first byte of the meta. Raises ValueError for a frame that a
    peer would refuse, and for rows that a socket can't carry.
    """
    if (frame.kind == Kind.MEMORY) != (frame.file is not None):
        raise ValueError(
            f"a file goes with each MEMORY frame and no other, not with a {frame.kind.name} frame"
        )
    if frame.file and not memoryview(frame.meta).nbytes:
        raise ValueError("a MEMORY frame needs meta, which its file goes with")
    if frame.device_rows is not None:
        raise ValueError(
            "device_rows do not travel on a socket; use an NcclLink, or move them to host memory"
        )
    return [encode_header(frame, frame.rows.nbytes), frame.meta, frame.rows]


def encode_header(frame: Frame, rows_bytes: int) -> bytes:
    """Return the header of a frame whose rows, wherever they are, have `rows_bytes` bytes.

    Raises ValueError for a frame that a peer would refuse.
    """
    meta_bytes = memoryview(frame.meta).nbytes
    row_bytes = rows_bytes // frame.num_rows if frame.num_rows > 0 else 0
    if row_bytes * frame.num_rows != rows_bytes:
        raise ValueError(f"rows of {rows_bytes} bytes do not divide into num_rows {frame.num_rows}")
    if meta_bytes + rows_bytes > MAX_FRAME_BYTES:
        raise ValueError(
            f"meta and rows hold {meta_bytes + rows_bytes} bytes; a frame holds at most {MAX_FRAME_BYTES}"
        )
    if problem := _row_problem(frame.dtype, frame.num_rows, row_bytes):
        raise ValueError(problem)
    numbers = frame.layer, frame.sequence, frame.num_rows, row_bytes, meta_bytes
    try:
        return _HEADER.pack(_MAGIC, VERSION, frame.kind, frame.dtype, *numbers)
    except struct.error:
        raise ValueError(
            f"layer {frame.layer}, sequence {frame.sequence} and num_rows {frame.num_rows} must be unsigned "
            "integers of 32 bits"
        ) from None


def decode_header(data: bytes | memoryview, max_frame_bytes: int = MAX_FRAME_BYTES) -> Header:
    """Read and check the HEADER_BYTES bytes of a header. Raises LinkLost for anything but a good one."""
    magic, version, kind, dtype, *numbers = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise LinkLost(f"protocol: a frame starts with {_MAGIC!r}, not with {magic!r}")
    if version != VERSION:
        raise LinkLost(f"protocol: the peer speaks version {version}, we speak version {VERSION}")
    try:
        header = Header(Kind(kind), Dtype(dtype), *numbers)
    except ValueError as error:
        raise LinkLost(f"protocol: {error}") from None
    if problem := _row_problem(header.dtype, header.num_rows, header.row_bytes):
        raise LinkLost(f"protocol: {problem}")
    if header.kind == Kind.MEMORY and not header.meta_bytes:
        raise LinkLost("protocol: a MEMORY frame without meta, which its file would go with")
    if header.body_bytes > max_frame_bytes:
        raise LinkLost(
            f"protocol: a frame of {header.body_bytes} bytes; this link takes at most {max_frame_bytes}"
        )
    return header


def decode_body(header: Header, body: memoryview, file: OpenFile | None = None) -> Frame:
    """Return the frame of a header and its `body_bytes` bytes; meta and rows are views of `body`."""
    return Frame(
        header.kind,
        header.sequence,
        header.layer,
        body[: header.meta_bytes],
        header.dtype,
        header.num_rows,
        body[header.meta_bytes : header.body_bytes],
        file=file,
    )


def _row_problem(dtype: Dtype, num_rows: int, row_bytes: int) -> str | None:
    element_bytes = dtype.element_bytes
    if element_bytes == 0:
        return f"{num_rows} rows without a dtype" if num_rows or row_bytes else None
    if row_bytes % element_bytes or row_bytes > _UINT32_MAX:
        return f"a row of {row_bytes} bytes does not hold elements of {element_bytes} bytes"
    return f"rows of {row_bytes} bytes, but there are none" if row_bytes and not num_rows else None
