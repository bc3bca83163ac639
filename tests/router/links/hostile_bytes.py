"""What a peer may send, whoever it is, and what must then be true. For tests and for fuzz_frames.py."""

import random
import socket
import struct

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.handshake import greet_as_connector, greet_as_listener
from router.links.stream import StreamLink
from router.links.wire import VERSION, encode

MAX_FRAME_BYTES = 10_000
MAX_BYTES = 50_000  # what a socket takes although nobody reads


def feed_link(data: bytes) -> int:
    """Let a link read `data` and then the end of file; return how many frames it took.

    Raises whatever is not LinkLost, and AssertionError if a frame is not exactly what arrived.
    """
    theirs, ours = socket.socketpair()
    link = StreamLink(ours, "stranger", max_frame_bytes=MAX_FRAME_BYTES)
    with theirs:
        theirs.sendall(data)
    num_frames, taken = 0, 0
    try:
        while True:
            frame = link.receive(5)
            size = check_frame(frame, data[taken:])
            num_frames, taken = num_frames + 1, taken + size
    except LinkLost:
        return num_frames
    finally:
        link.close()


def check_frame(frame: Frame, arrived: bytes) -> int:
    """Raise AssertionError unless `arrived` starts with this frame; return how many bytes it has."""
    assert len(frame.meta) + frame.rows.nbytes <= MAX_FRAME_BYTES
    encoded = b"".join(encode(frame))
    assert arrived.startswith(encoded)
    return len(encoded)


def feed_handshake(data: bytes) -> None:
    """Let both sides of a handshake read `data` instead of a peer's; neither may believe it."""
    for greet in (greet_as_listener, greet_as_connector):
        theirs, ours = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            try:
                name = greet(ours, b"a secret that nobody knows", "me", deadline_s=5)
            except LinkLost:
                continue
        raise AssertionError(f"{greet.__name__} believes that this is {name!r}")


def random_frames(rng: random.Random) -> bytes:
    """Return some good frames."""
    frames = []
    for _ in range(rng.randrange(1, 4)):
        dtype = rng.choice(list(Dtype))
        num_rows = rng.randrange(5) if dtype else 0
        rows = memoryview(rng.randbytes(num_rows * rng.randrange(20) * dtype.element_bytes))
        kinds = [kind for kind in Kind if kind != Kind.MEMORY]  # which needs a file
        kind, sequence, layer = rng.choice(kinds), rng.getrandbits(32), rng.getrandbits(32)
        frames += encode(
            Frame(kind, sequence, layer, rng.randbytes(rng.randrange(40)), dtype, num_rows, rows)
        )
    return b"".join(frames)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with a few bytes changed, cut out, doubled or added."""
    bytes_ = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at, length = rng.randrange(len(bytes_) + 1), rng.randrange(1, 9)
        match rng.randrange(4):
            case 0:
                bytes_[at : at + length] = rng.randbytes(len(bytes_[at : at + length]))
            case 1:
                del bytes_[at : at + length]
            case 2:
                bytes_[at:at] = bytes_[at : at + length]
            case _:
                bytes_[at:at] = rng.choice([bytes(length), b"\xff" * length, b"TWND", b"TWHS"])
    return bytes(bytes_)


def announced(num_rows: int, row_bytes: int) -> bytes:
    """Return the header of a frame with such rows."""
    return struct.pack("<4sHBB5I", b"TWND", VERSION, Kind.ROWS, Dtype.FLOAT32, 0, 0, num_rows, row_bytes, 0)


TEN_GIGABYTES = announced(2_500_000, 4096)
A_GIGABYTE = announced(262_000, 4096)
