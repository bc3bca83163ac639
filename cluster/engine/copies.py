"""Which blocks of running requests the engines have copies of that would go on with them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.engine.blocks import BlockPool
from cluster.engine.request_state import RequestState
from shards.kv_cache import BLOCK_SIZE

# Requests wait for it: of the demo model, 16 blocks are 12 MB. One prompt may fill more in a step; the rest
# is copied behind the next ones.
MAX_BLOCKS_PER_STEP = 16


@dataclass(frozen=True)
class BlockCopy:
    """A full block on its way to another engine."""

    digests: tuple[bytes, ...]  # of the prefix that ends with it
    row: Tensor  # fp32, in host memory: what `Shard.read_blocks` gives


class Standbys(Protocol):
    """The other engines of the model, as one engine sees them. No call blocks."""

    def standby(self, answer_id: str) -> str | None:
        """Name the engine that goes on with an answer if this one is lost; None if there is none."""

    def room(self, standby: str) -> int:
        """Return how many copies may be sent there now."""

    def has(self, standby: str, digest: bytes) -> bool:
        """Say whether a copy of the block was sent there already."""

    def send(self, standby: str, copy: BlockCopy) -> None:
        """Send a copy, in the background. It is lost if the engine is, and nobody minds."""


@dataclass(frozen=True)
class _Due:
    standby: str
    digests: tuple[bytes, ...]
    block: int


class BlockCopier:
    """Sends every full block of a running request, once, to the engine that goes on if this one is lost.

    What it has no room for waits until a later step: of a request that ends meanwhile, no copy is needed.
    """

    def __init__(
        self, blocks: BlockPool, standbys: Standbys, read_blocks: Callable[[Sequence[int]], Tensor]
    ) -> None:
        self._blocks = blocks
        self._standbys = standbys
        self._read_blocks = read_blocks
        self.num_copied = 0  # blocks

    def copy(self, states: Iterable[RequestState]) -> None:
        """Copy what these requests have filled, those first that come first. They must hold their blocks."""
        due = self._choose(states)
        if due:
            rows_BN = self._read_blocks([one.block for one in due])
            for one, row_N in zip(due, rows_BN, strict=True):
                self._standbys.send(one.standby, BlockCopy(one.digests, row_N))
            self.num_copied += len(due)

    def _choose(self, states: Iterable[RequestState]) -> list[_Due]:
        due: list[_Due] = []
        chosen: defaultdict[str, set[bytes]] = defaultdict(set)  # by standby: two requests may share blocks
        for state in states:
            standby = self._standbys.standby(state.request.answer_id)
            if standby != state.copied_to:
                state.copied_to, state.num_copied = standby, 0
            num_full = state.num_computed // BLOCK_SIZE
            if standby is None or state.num_copied >= num_full:
                continue
            digests, table = tuple(state.digests(0, num_full)), self._blocks.table(state.id)
            for index in range(state.num_copied, num_full):
                digest, new = digests[index], chosen[standby]
                if digest not in new and not self._standbys.has(standby, digest):
                    if len(due) == MAX_BLOCKS_PER_STEP or len(new) >= self._standbys.room(standby):
                        break
                    new.add(digest)
                    due.append(_Due(standby, digests[: index + 1], table[index]))
                state.num_copied += 1
        return due
