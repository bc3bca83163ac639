"""How a request wants its tokens chosen. Free of torch, so that a gateway can import it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """The knobs of one request, with the meaning that the OpenAI API and vLLM give them."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the likeliest tokens whose probabilities first sum to this
    top_k: int = 0  # keep this many of the likeliest tokens; 0: all
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # over prompt and answer (Keskar et al. 2019)
    frequency_penalty: float = 0.0  # over the answer, per occurrence
    presence_penalty: float = 0.0  # over the answer, once
    seed: int = 0  # whoever submits a request draws one if its user gave none
    num_logprobs: int | None = None  # None: no logprobs; n: the chosen token's and the n likeliest

    def __post_init__(self) -> None:
        """Raise ValueError for a value that the sampler could not make sense of."""
        for name, ok, expected in (
            ("temperature", 0.0 <= self.temperature < math.inf, "a number of at least 0"),
            ("top_p", 0.0 <= self.top_p <= 1.0, "from 0 to 1"),
            ("top_k", self.top_k >= 0, "at least 0, and 0 means all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("num_logprobs", self.num_logprobs is None or self.num_logprobs >= 0, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {expected}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0
