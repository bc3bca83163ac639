"""How a request wants its tokens chosen. Free of torch, so that a gateway can import it."""

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

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0
