"""How far the engine has come with a request."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.engine.blocks import block_hash, prefix_root
from cluster.engine.request import FinishReason, GenerationRequest
from shards.kv_cache import BLOCK_SIZE


@dataclass(eq=False)
class RequestState:
    """The tokens of one request, known and computed.

    A token is computed when its keys and values are in the request's blocks. Preemption only sets
    `num_computed` back: the answer so far is then computed again as if it were prompt.
    """

    request: GenerationRequest
    context_length: int
    model: bytes = b""  # as `prefix_root` has it
    token_ids: list[int] = field(init=False)  # prompt and answer
    prompt_ids: NDArray[np.int64] = field(init=False)  # once more for the sampler's penalties
    num_computed: int = 0
    num_cached: int | None = None  # prompt tokens found in the prefix cache when first admitted
    _digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt, *self.request.emitted]
        self.prompt_ids = np.array(self.request.prompt, dtype=np.int64)
        self._root = prefix_root(self.model, self.request.cache_salt)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def has_begun(self) -> bool:
        """Whether an engine has had it: this one, before a preemption, or one that was lost."""
        return self.request.is_resumed or self.num_cached is not None

    @property
    def num_owed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def answer(self) -> list[int]:
        return self.token_ids[len(self.request.prompt) :]

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together when the answer is cut off."""
        return min(len(self.request.prompt) + self.request.max_tokens, self.context_length)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Say why the answer ends with the tokens so far, or None if it goes on."""
        has_answer = len(self.token_ids) > len(self.request.prompt)
        if has_answer and self.token_ids[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_length else None

    def digests(self, first: int, last: int) -> Iterator[bytes]:
        """Yield the digests of full blocks `first` .. `last - 1`, computing each at most once."""
        for index in range(first, last):
            while len(self._digests) <= index:
                start = len(self._digests) * BLOCK_SIZE
                parent = self._digests[-1] if self._digests else self._root
                self._digests.append(block_hash(parent, self.token_ids[start : start + BLOCK_SIZE]))
            yield self._digests[index]
