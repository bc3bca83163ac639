"""Who computes how many tokens in the next step."""

from collections import deque
from dataclasses import dataclass

from cluster.engine.blocks import BlockPool
from cluster.engine.request_state import RequestState
from shards.kv_cache import BLOCK_SIZE
from shards.step import Chunk, StepBatch


@dataclass(frozen=True)
class StepPlan:
    """What one step computes: `batch.chunks[i]` belongs to `requests[i]`."""

    requests: tuple[RequestState, ...]
    batch: StepBatch


class Scheduler:
    """Shares each step's tokens, and the blocks, among the requests.

    `running` followed by `waiting` is always in order of arrival, since only the youngest running request
    is preempted and only the oldest waiting one admitted. So the oldest request of all is never set
    back, and each request gets to be the oldest: nobody waits for ever. A request that comes from a lost
    engine arrived there, so it counts as older than all that have not begun.
    """

    def __init__(self, blocks: BlockPool, max_step_tokens: int, max_running: int):
        for name, value in (("max_step_tokens", max_step_tokens), ("max_running", max_running)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.blocks = blocks
        self.max_step_tokens = max_step_tokens
        self.max_running = max_running
        self.running: list[RequestState] = []
        self.waiting: deque[RequestState] = deque()
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # of prompts, found in the prefix cache at first admission

    def submit(self, state: RequestState) -> None:
        """Queue a request. Raises ValueError if the blocks could not hold it even if it ran alone."""
        # The last token of an answer is never computed: it is only emitted.
        num_needed = -(-(state.max_length - 1) // BLOCK_SIZE)
        if num_needed > self.blocks.num_blocks:
            raise ValueError(
                f"request {state.id!r}: prompt and answer may reach {state.max_length} tokens, which need "
                f"{num_needed} blocks of the KV cache, but the engine has {self.blocks.num_blocks}; "
                f"lower max_tokens, shorten the prompt or give the engine more blocks"
            )
        behind = len(self.waiting)
        if state.has_begun:
            behind = next((i for i, other in enumerate(self.waiting) if not other.has_begun), behind)
        self.waiting.insert(behind, state)

    def plan_step(self) -> StepPlan:
        """Choose how many tokens each request computes in this step, and reserve their blocks.

        A request owes the tokens whose keys and values are not cached yet: its prompt at first,
        then one per step. There is no prefill phase or decode phase, only a budget to share.
        """
        budget, preempted = self.max_step_tokens, False
        chunks: list[Chunk] = []  # chunks[i] belongs to running[i]

        # Running first, oldest first: the youngest, who is preempted, is never yet in `chunks`.
        while budget and len(chunks) < len(self.running):
            state = self.running[len(chunks)]
            size = min(state.num_owed, budget)
            if self.blocks.reserve(state.id, state.num_computed + size):
                chunks.append(self._chunk(state, size))
                budget -= size
            else:
                self._preempt_youngest()  # may be `state` itself
                preempted = True

        # Then admit in arrival order, but nobody in a step that was short of memory.
        while budget and self.waiting and len(self.running) < self.max_running and not preempted:
            state = self.waiting[0]
            # The last token is always computed, since the next one is chosen from its logits.
            prefix = self.blocks.find_prefix(state.digests(0, (len(state.token_ids) - 1) // BLOCK_SIZE))
            num_cached = len(prefix) * BLOCK_SIZE
            size = min(len(state.token_ids) - num_cached, budget)
            if not self.blocks.reserve(state.id, num_cached + size, prefix):
                break
            self._admit(num_cached)
            chunks.append(self._chunk(state, size))
            budget -= size
        return StepPlan(tuple(self.running[: len(chunks)]), StepBatch(tuple(chunks)))

    def commit(self, plan: StepPlan) -> None:
        """Record that a plan was computed, and publish the blocks that it filled."""
        for state, chunk in zip(plan.requests, plan.batch.chunks, strict=True):
            state.num_computed = chunk.end
            first, last = chunk.start // BLOCK_SIZE, chunk.end // BLOCK_SIZE
            self.blocks.publish(state.id, first, state.digests(first, last))

    def remove(self, state: RequestState) -> None:
        """Forget a request, running or waiting, and free its blocks."""
        if state in self.running:
            self.running.remove(state)
        else:
            self.waiting.remove(state)
        self.blocks.free(state.id)

    def _chunk(self, state: RequestState, size: int) -> Chunk:
        start, end = state.num_computed, state.num_computed + size
        token_ids = tuple(state.token_ids[start:end])
        return Chunk(token_ids, start, self.blocks.table(state.id), wants_logits=end == len(state.token_ids))

    def _admit(self, num_cached: int) -> None:
        state = self.waiting.popleft()
        self.running.append(state)
        state.num_computed = num_cached
        if state.num_cached is None:
            state.num_cached = min(num_cached, len(state.request.prompt))
            self.num_cached_tokens += state.num_cached

    def _preempt_youngest(self) -> None:
        state = self.running.pop()
        self.blocks.free(state.id)
        state.num_computed = 0
        self.waiting.appendleft(state)
        self.num_preemptions += 1
