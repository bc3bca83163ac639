"""What travels between two processes, and what any link promises."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from router.links.open_file import OpenFile


class LinkLost(ConnectionError):
    """The peer is gone, or broke the protocol; this link is closed and will not come back."""


class Kind(IntEnum):
    """What a frame is for, and what its `meta` holds."""

    ROWS = 1  # engine -> expert group; meta: int32 pairs (expert, number of rows), rows in that order
    RESULTS = 2  # expert group -> engine, with the sequence of its ROWS; the rows in the same order
    ERROR = 3  # expert group -> engine, with the sequence of its ROWS; meta: UTF-8 text
    TOKENS = 4  # engine -> gateway; meta: JSON, the events of one step
    FETCH = 5  # expert group -> expert group: asks for the weights of one expert; meta: int32 expert
    WEIGHTS = 6  # the answer, with the sequence of its FETCH; meta: JSON, what the rows are
    OPEN = 7  # link -> link, before the first frame of its owner: how its rows will travel
    STEP = 8  # engine -> shard; meta: a step, as shards/step_wire.py has it
    COPY = 9  # engine -> engine; meta: digests at the end of a prefix, 32 bytes each; its last KV blocks
    HELD = 10  # the answer, with the sequence of its COPY; meta: uint32, how many of these are there
    READ = 11  # engine -> shard: asks all ranks to gather KV blocks; meta: uint32 block ids
    WRITE = 12  # engine -> shard; meta: uint32 block ids; what this rank has in them
    MEMORY = 13  # instead of WEIGHTS, within a host; meta: as there; with the file that has them


class Dtype(IntEnum):
    """Element types of rows on the wire."""

    NONE = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    UINT8 = 3  # bytes: weights, and rows in FP8, of which neither numpy nor NCCL knows more

    @property
    def element_bytes(self) -> int:
        return (0, 4, 2, 1)[self]


class DeviceRows(Protocol):
    """Contiguous rows in a device's memory: what a `torch.Tensor` offers, named without importing torch."""

    @property
    def nbytes(self) -> int: ...

    def data_ptr(self) -> int: ...


_NO_ROWS = memoryview(b"")


@dataclass(frozen=True)
class Frame:
    """One message. `rows` is a contiguous buffer of `num_rows` rows; empty if `dtype` is NONE.

    Rows in a device's memory are `device_rows` instead, and `rows` is empty; only some links carry them.
    They are given away with the frame: the link keeps them until they have left, and nobody may write to
    them again.

    A `file` is open on both sides; it goes with a MEMORY frame, and with no other, over a Unix socket.

    In a received frame, `meta`, `rows` and `device_rows` lie in the link's own buffer: they are valid until
    the next `receive` on that link, and for all that the receiving thread's current stream then holds.
    """

    kind: Kind
    sequence: int = 0  # chosen by the asking side, repeated in the answer; unsigned 32 bits
    layer: int = 0
    meta: bytes | memoryview = b""
    dtype: Dtype = Dtype.NONE
    num_rows: int = 0
    rows: memoryview = _NO_ROWS
    device_rows: DeviceRows | None = field(default=None, compare=False)
    file: OpenFile | None = field(default=None, compare=False)


class Link(Protocol):
    """A connection of exactly two processes. Not thread-safe per direction: one sender, one receiver."""

    @property
    def peer(self) -> str:
        """Name of the other side, as it gave it in the handshake."""

    def send(self, frame: Frame) -> None:
        """Send one frame; block while the peer's buffers are full. Raises LinkLost."""

    def receive(self, timeout_s: float | None = None) -> Frame:
        """Wait for one frame. Raises LinkLost, also when `timeout_s` seconds pass without a whole frame."""

    def post(self, frame: Frame) -> bool:
        """Start to send a frame, without blocking; return whether all of it has left. Raises LinkLost.

        If not, its meta and rows must stay as they are until `flush` returns True.
        """

    def flush(self) -> bool:
        """Send what the peer takes now; return whether nothing is left. Raises LinkLost."""

    def poll(self) -> Frame | None:
        """Take in what has arrived and return a frame once it is whole, without blocking. Raises LinkLost."""

    def fileno(self) -> int:
        """Return the file descriptor that turns readable when a frame arrives, for a selector.

        It may be readable earlier, while a frame is on its way; `poll` then returns None. It turns writable
        when `flush` can go on, but not on every kind of link: who has something left calls `flush` anyway,
        now and then.
        """

    def close(self) -> None:
        """Close this end; the peer sees it at once. Closing twice does no harm."""
