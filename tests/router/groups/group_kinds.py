"""The ranks of a group, of every kind, as the conformance suite sees them; each lives in a thread."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from router.device import CudaDevice, Device
from router.groups.base import TensorGroup
from router.groups.gloo import GlooGroup, MeetingPoint
from router.groups.nccl import NcclGroup
from tests.router.nccl_double import World

Join = Callable[..., TensorGroup]  # join(rank, size, timeout_s=..., meet_timeout_s=...)


@dataclass
class Kind:
    join: Join
    place: str = "cpu"  # where this kind wants its tensors

    def run(self, work: Callable[[int], Any], size: int) -> list[Any]:
        """Run `work(rank)` for all ranks at once; return what each returned, or the exception it raised."""
        with ThreadPoolExecutor(size) as pool:
            running = [pool.submit(work, rank) for rank in range(size)]
            return [each.exception(60) or each.result() for each in running]

    def join_all(self, size: int, **knobs: float) -> list[TensorGroup]:
        return self.run(lambda rank: self.join(rank, size, **knobs), size)


@contextlib.contextmanager
def gloo() -> Iterator[Kind]:
    meeting_point = MeetingPoint("127.0.0.1")
    yield Kind(lambda rank, size, **knobs: GlooGroup(meeting_point.address, rank, size, "127.0.0.1", **knobs))


def nccl(device_of: Callable[[int], Device], place: str) -> Kind:
    unique_id = device_of(0).nccl.get_unique_id()
    return Kind(lambda rank, size, **knobs: NcclGroup(device_of(rank), unique_id, rank, size, **knobs), place)


@contextlib.contextmanager
def double() -> Iterator[Kind]:
    world = World()
    devices = [world.device(f"device {rank}") for rank in range(3)]
    yield nccl(devices.__getitem__, "cpu")
    world.check()


@contextlib.contextmanager
def cuda() -> Iterator[Kind]:
    """Use as many GPUs as there are; NCCL 2.30 uses one twice if this is set before its first call."""
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    devices = [CudaDevice(rank % torch.cuda.device_count()) for rank in range(3)]
    yield nccl(devices.__getitem__, "cuda")


KINDS = {"gloo": gloo, "nccl": double, "cuda": cuda}
