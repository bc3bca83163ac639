"""The loop that turns requests into tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.engine.blocks import BlockPool
from cluster.engine.copies import BlockCopier, BlockRun, Standbys
from cluster.engine.request import FinishReason, GenerationRequest, Logprob, TokenEvent
from cluster.engine.request_state import RequestState
from cluster.engine.scheduler import Scheduler, StepPlan
from shards.sampler import sample
from shards.step import StepBatch


class Runner(Protocol):
    """The model, as the engine calls it."""

    def run(self, batch: StepBatch) -> Tensor:
        """Compute a step; return logits_RV in fp32, a row for each chunk with `wants_logits`, in order."""

    def read_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """Return all keys and values of some blocks: fp32, a row for each, in host memory."""

    def write_blocks(self, block_ids: Sequence[int], rows_BN: Tensor) -> None:
        """Fill blocks with rows of `read_blocks`."""


@dataclass(frozen=True)
class EngineStats:
    """Numbers of one moment, and counts since the engine was made."""

    num_running: int
    num_waiting: int
    used_blocks: int  # held by requests; a cached block that nobody holds is not used
    total_blocks: int
    num_preemptions: int
    num_computed_tokens: int  # what was run, tokens computed again after a preemption included
    num_cached_tokens: int  # of prompts, found in the prefix cache instead
    num_copied_blocks: int  # sent to other engines
    num_adopted_blocks: int  # taken in from other engines


class Engine:
    """Runs requests in shared steps; what a request gets does not depend on who shares them.

    Not thread-safe: whoever owns it calls `submit` and `abort` between steps, where they take effect at
    once and cost microseconds (a submit also copies the prompt).
    """

    def __init__(
        self,
        runner: Runner,
        *,
        vocab_size: int,
        context_length: int,
        num_blocks: int,
        max_step_tokens: int,
        max_running: int,
        prefix_caching: bool = True,
        model: bytes = b"",
        standbys: Standbys | None = None,
        block_bytes: int = 1,
        request_errors: tuple[type[Exception], ...] = (),
    ):
        """Make an idle engine.

        `context_length` bounds prompt and answer together; `model` tells apart engines whose keys and values
        differ, in up to 64 bytes. `standbys` get copies of what is computed, `block_bytes` for each block. A
        `runner` that raises one of `request_errors` fails the requests of that step; anything else it raises
        comes out of `step`, and the engine should then be thrown away.
        """
        for name, value in (("vocab_size", vocab_size), ("context_length", context_length)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.runner = runner
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.model = model
        self.request_errors = request_errors
        self.blocks = BlockPool(num_blocks, prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_step_tokens, max_running)
        self._requests: dict[str, RequestState] = {}
        self._copier = (
            BlockCopier(self.blocks, standbys, block_bytes, runner.read_blocks) if standbys else None
        )
        self._num_adopted_blocks = 0
        self._ended: list[TokenEvent] = []  # ends without a token, for the next step to report
        self._num_computed_tokens = 0

    @property
    def has_work(self) -> bool:
        """Say whether a step would do or report anything."""
        return bool(self._requests or self._ended)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request for the next step. Raises ValueError if it can never be served."""
        self._check(request)
        state = RequestState(request, self.context_length, self.model)
        if state.finish_reason:
            # Resubmitted after its last token: only the word that it is over was lost.
            self._ended.append(TokenEvent(request.id, None, state.finish_reason))
            return
        self.scheduler.submit(state)
        self._requests[request.id] = state

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks; the next step reports it. Does nothing if it is not here."""
        if request_id in self._requests:
            self._ended.append(self._end(self._requests[request_id], "abort"))

    def adopt(self, run: BlockRun) -> int:
        """Keep another engine's copies of blocks in the prefix cache, as far as there is room.

        Returns how many of the run's digests, from the first on, are of blocks that are here now.
        """
        if run.rows_BN is not None:
            first = len(run.digests) - len(run.rows_BN)
            block_of = {}  # by row, of those that are wanted
            for row in range(len(run.rows_BN)):
                block = self.blocks.adopt(run.digests[: first + row + 1])
                if block is not None:
                    block_of[row] = block
            if block_of:
                self.runner.write_blocks([*block_of.values()], run.rows_BN[[*block_of]])
                self._num_adopted_blocks += len(block_of)
        return self.blocks.refresh(run.digests)

    def step(self) -> list[TokenEvent]:
        """Compute one step and return what came of it: at most one event per request.

        Blocks while the model runs.
        """
        ended, self._ended = self._ended, []
        if not self._requests:
            return ended
        plan = self.scheduler.plan_step()
        try:
            logits_RV = self._run(plan.batch)
        except self.request_errors as error:
            return ended + self._fail(plan, error)
        return ended + self._commit(plan, logits_RV)

    def copy_blocks(self) -> None:
        """Send other engines copies of what the steps have filled; for when their tokens are on their way."""
        if self._copier:
            self._copier.copy(self.scheduler.running)

    def stats(self) -> EngineStats:
        """Return how busy the engine is and what it has done."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            used_blocks=self.blocks.num_used,
            total_blocks=self.blocks.num_blocks,
            num_preemptions=self.scheduler.num_preemptions,
            num_computed_tokens=self._num_computed_tokens,
            num_cached_tokens=self.scheduler.num_cached_tokens,
            num_copied_blocks=self._copier.num_copied if self._copier else 0,
            num_adopted_blocks=self._num_adopted_blocks,
        )

    def _check(self, request: GenerationRequest) -> None:
        name = f"request {request.id!r}"
        if request.id in self._requests:
            raise ValueError(f"{name} is here already; give each request an id of its own")
        if not request.prompt:
            raise ValueError(f"{name}: prompt is empty; it needs at least 1 token")
        if request.max_tokens < 1:
            raise ValueError(f"{name}: max_tokens is {request.max_tokens}; it must be at least 1")
        if len(request.prompt) >= self.context_length:
            raise ValueError(
                f"{name}: prompt has {len(request.prompt)} tokens; prompt and answer share a context of "
                f"{self.context_length}, so it may have at most {self.context_length - 1}"
            )
        token_ids = request.prompt + request.emitted
        for token_id in (min(token_ids), max(token_ids)):
            # The step that reads such a token would fail, and everybody's requests with it.
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"{name}: token {token_id} is outside the vocabulary, 0 to {self.vocab_size - 1}"
                )

    def _run(self, batch: StepBatch) -> NDArray[np.float32]:
        self._num_computed_tokens += batch.num_tokens
        return self.runner.run(batch).cpu().numpy()

    def _commit(self, plan: StepPlan, logits_RV: NDArray[np.float32]) -> list[TokenEvent]:
        """Keep what the step computed, and choose a token for each request that owes nothing more."""
        self.scheduler.commit(plan)
        complete = [
            state for state, chunk in zip(plan.requests, plan.batch.chunks, strict=True) if chunk.wants_logits
        ]
        return [self._choose(state, logits_V) for state, logits_V in zip(complete, logits_RV, strict=True)]

    def _choose(self, state: RequestState, logits_V: NDArray[np.float32]) -> TokenEvent:
        request, answer = state.request, state.answer
        try:
            sampled = sample(logits_V, request.sampling, state.prompt_ids, answer)
        except FloatingPointError as error:
            return self._end(state, "error", str(error))
        state.token_ids.append(sampled.token_id)
        if state.finish_reason:
            self._end(state, state.finish_reason)
        first = len(answer) == len(request.emitted)
        return TokenEvent(
            request.id,
            sampled.token_id,
            state.finish_reason,
            None if sampled.logprob is None else Logprob(sampled.token_id, sampled.logprob),
            tuple(Logprob(token_id, logprob) for token_id, logprob in sampled.top_logprobs),
            num_cached=(state.num_cached or 0) if first else 0,
        )

    def _fail(self, plan: StepPlan, error: Exception) -> list[TokenEvent]:
        # What this step wrote was never committed, so nobody can find it in the prefix cache.
        return [self._end(state, "error", str(error)) for state in plan.requests]

    def _end(self, state: RequestState, reason: FinishReason, error: str | None = None) -> TokenEvent:
        del self._requests[state.id]
        self.scheduler.remove(state)
        return TokenEvent(state.id, None, reason, error=error)
