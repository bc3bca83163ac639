"""The two ends of a link, of every kind, as the conformance suite sees them."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from router.device import CudaDevice, Device
from router.links.base import Dtype, Frame, Kind, Link
from router.links.nccl import NcclLink
from router.links.stream import StreamLink
from router.links.wire import MAX_FRAME_BYTES, encode
from tests.router.nccl_double import World

Pair = tuple[Link, Link]


@dataclass
class Ends:
    """Both ends; `links[0]` is where most tests send, and `links[1]` where they receive."""

    links: Pair
    sockets: tuple[socket.socket, socket.socket]
    devices: tuple[Device, Device] | None = None  # where rows lie, if not in host memory
    on_kill: Callable[[int], None] = lambda side: None
    hold: Callable[[], object] = lambda: None  # keeps the sending device busy, so that rows do not leave

    def frame(
        self,
        data: bytes,
        num_rows: int = 1,
        dtype: Dtype = Dtype.FLOAT32,
        sequence: int = 0,
        side: int = 0,
    ) -> Frame:
        """Return a frame for `side` to send, with rows where links of this kind want them.

        The data may be any, up to 256 bytes; beyond, it must repeat.
        """
        if self.devices is None:
            return Frame(Kind.ROWS, sequence, 3, b"meta", dtype, num_rows, memoryview(data))
        rows = self.devices[side].empty(len(data))
        rows.copy_(
            torch.tensor(list(data[:256]), dtype=torch.uint8).repeat(len(data) // 256 + 1)[: len(data)]
        )
        return Frame(Kind.ROWS, sequence, 3, b"meta", dtype, num_rows, device_rows=rows)

    def kill(self, side: int) -> None:
        """End one side as the system does when its process is killed."""
        self.on_kill(side)
        self.sockets[side].close()

    def send_in_part(self, frame: Frame) -> None:
        """Let a frame begin to arrive, and no more; the receiving side then has to wait for the rest."""
        if self.devices is None:
            self.sockets[0].sendall(b"".join(encode(frame))[:-1])
        else:
            self.hold()
            self.links[0].send(frame)

    def close(self) -> None:
        for link in self.links:
            link.close()


def data_of(frame: Frame) -> bytes:
    """Return a copy of the rows of a frame."""
    if frame.device_rows is None:
        return bytes(frame.rows)
    return bytes(frame.device_rows.cpu().numpy())


def unix_sockets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connecting = socket.create_connection(server.getsockname())
        return connecting, server.accept()[0]


def stream_links(sockets, max_frame_bytes: int = MAX_FRAME_BYTES, send_timeout_s: float = 30) -> Pair:
    knobs = {"max_frame_bytes": max_frame_bytes, "send_timeout_s": send_timeout_s}
    left, right = (StreamLink(sock, name, **knobs) for sock, name in zip(sockets, "ba", strict=True))
    return left, right


def open_both(streams: tuple[StreamLink, StreamLink], devices: tuple[Device, Device], **knobs) -> Pair:
    """Open both ends of an NcclLink, each in a thread of its own; raise what either raises."""
    with ThreadPoolExecutor(2) as pool:
        opening = [pool.submit(NcclLink, *args, **knobs) for args in zip(streams, devices, strict=True)]
        left, right = (each.result(60) for each in opening)
    return left, right


@contextlib.contextmanager
def over_stream(sockets, **knobs) -> Iterator[Ends]:
    ends = Ends(stream_links(sockets, **knobs), sockets)
    yield ends
    ends.close()


@contextlib.contextmanager
def over_double(sockets, *, host_rows: bool = False, **knobs) -> Iterator[Ends]:
    world = World()
    devices = world.device("device of a"), world.device("device of b")
    bound = {"max_frame_bytes": knobs.get("max_frame_bytes", MAX_FRAME_BYTES)}
    links = open_both(stream_links(sockets, **bound), devices, **knobs)
    ends = Ends(
        links,
        sockets,
        None if host_rows else devices,
        on_kill=lambda side: devices[side].die(),
        hold=lambda: devices[0].current_stream().run(lambda: None),
    )
    yield ends
    ends.close()
    world.check()


@contextlib.contextmanager
def over_cuda(sockets, **knobs) -> Iterator[Ends]:
    """Use two GPUs; or one twice, which NCCL 2.30 allows if this variable is set before its first call."""
    if torch.cuda.device_count() == 1:
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    devices = CudaDevice(0), CudaDevice(torch.cuda.device_count() - 1)
    links = open_both(stream_links(sockets), devices, **knobs)
    ends = Ends(links, sockets, devices, hold=lambda: torch.cuda._sleep(5 * 10**9))  # cycles: seconds
    yield ends
    ends.close()


KINDS: dict[str, Callable[..., contextlib.AbstractContextManager[Ends]]] = {
    "unix": lambda **knobs: over_stream(unix_sockets(), **knobs),
    "tcp": lambda **knobs: over_stream(tcp_sockets(), **knobs),
    "nccl": lambda **knobs: over_double(unix_sockets(), **knobs),
    "nccl, host rows": lambda **knobs: over_double(tcp_sockets(), host_rows=True, **knobs),
    "cuda": lambda **knobs: over_cuda(unix_sockets(), **knobs),
}
