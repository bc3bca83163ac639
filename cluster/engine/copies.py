"""Which blocks of running requests the engines have copies of that would go on with them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.engine.blocks import BlockPool
from cluster.engine.request_state import RequestState
from shards.kv_cache import BLOCK_SIZE

# Of copies that one step may delay others by, sending or adopting: 22 blocks of the demo model.
MAX_STEP_BYTES = 16 << 20
_REFRESH_PERIOD = 16  # blocks of one request; see `BlockRun.digests`


@dataclass(frozen=True)
class BlockRun:
    """Consecutive full blocks of one request, on their way to another engine; or only the question for them.

    B blocks   N numbers of a block
    """

    # Of blocks at the end of a prefix, among them the one before the first that is sent. Now and then of the
    # whole prefix, so that the other engine does not evict its beginning before its end.
    digests: tuple[bytes, ...]
    rows_BN: Tensor | None  # fp32, in host memory, of the last B digests; None: which of them are there?

    @property
    def num_bytes(self) -> int:
        """The memory that its rows take."""
        return 0 if self.rows_BN is None else self.rows_BN.nbytes


class Standby(Protocol):
    """A link to an engine that may have to go on with answers of this one. No call blocks."""

    @property
    def has_room(self) -> bool:
        """Whether it takes more blocks now."""

    def send(self, run: BlockRun, note: "Sent") -> None:
        """Send blocks, or a question, in the background. It is lost if the engine is."""

    def heard(self) -> "list[tuple[Sent, int]]":
        """Return what came back: with each note, how many of its run's digests, the first ones, are there."""


class Standbys(Protocol):
    """The other engines of the model that can be reached, as one engine sees them. No call blocks."""

    def all(self) -> Iterable[Standby]:
        """Return each."""

    def standby(self, answer_id: str) -> Standby | None:
        """Return the engine that goes on with an answer if this one is lost; None if there is none."""


@dataclass(eq=False)
class Progress:
    """How far the copies of one running request have come."""

    standby: Standby
    ask_from: int = 1  # full blocks; with fewer, it is not worth a question
    was_asked: bool = False
    num_copied: int | None = None  # full blocks, the first ones, there or on their way; None: unknown


@dataclass(frozen=True)
class Sent:
    """What an answer is about."""

    progress: Progress
    num_digests: int
    is_question: bool


class BlockCopier:
    """Sends every full block of a running request, once, to the engine that goes on if this one is lost.

    That engine is first asked what it has, and says of each block whether it has kept it. One that was
    refused, for want of memory or of the block before it, is no reason to go on behind it: the question is
    asked again when the request has filled another. What there is no room for waits until a later step; of a
    request that ends meanwhile, no copy is needed.
    """

    def __init__(
        self,
        blocks: BlockPool,
        standbys: Standbys,
        block_bytes: int,
        read_blocks: Callable[[Sequence[int]], Tensor],
    ) -> None:
        self._blocks = blocks
        self._standbys = standbys
        self._blocks_per_step = max(1, MAX_STEP_BYTES // block_bytes)
        self._read_blocks = read_blocks
        self._progress: dict[str, Progress] = {}  # by request id
        self.num_copied = 0  # blocks

    def copy(self, states: Iterable[RequestState]) -> None:
        """Copy what these requests, all that hold blocks, have filled; those first that come first."""
        for other in self._standbys.all():
            for sent, num_there in other.heard():
                self._hear(sent, num_there)
        left, progress = self._blocks_per_step, {}
        for state in states:
            standby = self._standbys.standby(state.request.answer_id)
            if standby is None:
                continue
            its = self._progress.get(state.id)
            if its is None or its.standby is not standby:
                its = Progress(standby)
            progress[state.id] = its
            left -= self._send(state, its, left)
        self._progress = progress

    def _hear(self, sent: Sent, num_there: int) -> None:
        its = sent.progress
        if sent.is_question:
            its.num_copied = num_there
        elif num_there < sent.num_digests and its.num_copied is not None:
            # What else was sent is answered before the next question is: by then, nothing is known.
            its.was_asked, its.ask_from, its.num_copied = False, its.num_copied + 1, None

    def _send(self, state: RequestState, its: Progress, most: int) -> int:
        """Ask, or send blocks, or do nothing; return how many blocks were sent."""
        num_full = state.num_computed // BLOCK_SIZE
        if not its.was_asked:
            if num_full >= its.ask_from:
                digests = tuple(state.digests(0, num_full))
                its.standby.send(BlockRun(digests, None), Sent(its, num_full, is_question=True))
                its.was_asked = True
            return 0
        if its.num_copied is None or its.num_copied >= num_full or not most or not its.standby.has_room:
            return 0
        start, end = its.num_copied, min(num_full, its.num_copied + most)
        has_to_refresh = start // _REFRESH_PERIOD < end // _REFRESH_PERIOD
        digests = tuple(state.digests(0 if has_to_refresh else max(0, start - 1), end))
        rows_BN = self._read_blocks(self._blocks.table(state.id)[start:end])
        its.standby.send(BlockRun(digests, rows_BN), Sent(its, len(digests), is_question=False))
        its.num_copied = end
        self.num_copied += end - start
        return end - start
