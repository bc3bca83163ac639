"""What the model computes in one step: some tokens of some sequences."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence that a step computes.

    Their keys and values go to the sequence's blocks: position p lives in `block_ids[p // BLOCK_SIZE]`.
    All positions before `start` are there already.
    """

    token_ids: tuple[int, ...]
    start: int  # position of the first of them
    block_ids: tuple[int, ...]  # every block that positions 0 .. start + len(token_ids) - 1 need
    wants_logits: bool  # of the last token; false while a prompt is still being read

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class StepBatch:
    """The chunks of one step. Which chunks share a step must not change any result (promise 2)."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)
