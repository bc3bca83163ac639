"""From one row of logits to one token.

V vocabulary   C candidates, likeliest first

Penalties, temperature, min_p, top_k and top_p act in this order, that of vLLM's V1 sampler; top_p counts
the mass that min_p and top_k have left. Among equal logits the lower id is the likelier token,
and top_k keeps exactly k tokens (vLLM keeps all that tie with the k-th).

The arithmetic is numpy's, on one row alone, and probabilities are fp64. It is done in place where V is long:
fresh memory for each result was measured to cost more than the arithmetic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.sampling_params import SamplingParams


@dataclass(frozen=True)
class Sampled:
    """A chosen token, with natural logarithms of what the model alone thought of it and of its rivals."""

    token_id: int
    logprob: float | None = None  # None: not asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob) of the likeliest, best first


def sample(
    logits_V: NDArray[np.float32],
    params: SamplingParams,
    prompt_ids: Sequence[int] | NDArray[np.int64],
    answer_ids: Sequence[int] | NDArray[np.int64],
) -> Sampled:
    """Choose the token that follows `prompt_ids` and `answer_ids`.

    A pure function: its random number is `uniform(params.seed, len(answer_ids))`. A logit of -inf forbids its
    token. Raises FloatingPointError if a logit is NaN or +inf, also by a penalty, or if all are -inf.
    """
    penalized_V = _penalize(logits_V, params, prompt_ids, answer_ids)
    if not math.isfinite(penalized_V.max()):
        raise FloatingPointError(
            "the largest logit is not finite: the model's weights may be damaged, or a penalty too large"
        )
    if params.is_greedy:
        token_id = int(penalized_V.argmax())
    else:
        token_id = _draw(penalized_V, params, uniform(params.seed, len(answer_ids)))

    if params.num_logprobs is None:
        return Sampled(token_id)
    best = float(logits_V.max())
    shifted_V = np.subtract(logits_V, best, dtype=np.float64)
    log_total = best + math.log(np.exp(shifted_V, out=shifted_V).sum())
    top_logprobs = (
        (int(i), float(logits_V[i]) - log_total) for i in likeliest(logits_V, params.num_logprobs)
    )
    return Sampled(token_id, float(logits_V[token_id]) - log_total, tuple(top_logprobs))


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) that belongs to one position of the answer of one seed.

    Philox4x64-10 (Salmon et al. 2011) is a keyed function of a counter: number p comes without the p - 1
    before it, so a continuation elsewhere draws what would have been drawn here. Key: the seed modulo 2**64.
    Counter: the position. Result: the upper 53 bits of the first word.
    """
    word = np.random.Philox(key=seed % 2**64, counter=position).random_raw()
    return float(int(word) >> 11) * 2.0**-53


def likeliest(logits_V: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest logits, or of all if they are fewer, by (-logit, id)."""
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    if count < logits_V.size:
        threshold = np.partition(logits_V, -count)[-count]
        id_C = np.flatnonzero(logits_V >= threshold)  # all that tie with the last one, too
    else:
        id_C = np.arange(logits_V.size)
    # One integer per token sorts by (-logit, id): the bits of a positive fp32 order as an integer, those of
    # a negative one the wrong way round. Adding zero turns -0.0, whose bits are smaller, into 0.0.
    bits_C = (logits_V[id_C] + np.float32(0.0)).view(np.int32)
    rank_C = (bits_C ^ ((bits_C >> 31) & 0x7FFFFFFF)).astype(np.int64)
    key_C = (-rank_C << 32) | id_C
    key_C.sort()
    return key_C[:count] & 0xFFFFFFFF


def _penalize(
    logits_V: NDArray[np.float32],
    params: SamplingParams,
    prompt_ids: Sequence[int] | NDArray[np.int64],
    answer_ids: Sequence[int] | NDArray[np.int64],
) -> NDArray[np.float32]:
    """Lower the logits of tokens seen before: first the repetition penalty, then frequency and presence.

    Each of the two steps is rounded to fp32 once.
    """
    if params.repetition_penalty == 1.0 and not params.frequency_penalty and not params.presence_penalty:
        return logits_V
    penalized_V = logits_V.copy()
    answer = np.asarray(answer_ids, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.concatenate([np.asarray(prompt_ids, dtype=np.int64), answer])
        value = penalized_V[seen].astype(np.float64)  # a token seen twice is written twice, with one value
        penalized_V[seen] = np.where(
            value > 0, value / params.repetition_penalty, value * params.repetition_penalty
        )
    if params.frequency_penalty or params.presence_penalty:
        token, occurrences = np.unique(answer, return_counts=True)
        penalty = params.frequency_penalty * occurrences + params.presence_penalty
        penalized_V[token] = penalized_V[token].astype(np.float64) - penalty
    return penalized_V


def _draw(logits_V: NDArray[np.float32], params: SamplingParams, u: float) -> int:
    """Draw a token: lay the weights of those that may be chosen end to end, and see where `u` of it falls.

    They lie likeliest first; without top_k and top_p in the order of ids, for that needs no sort.
    """
    best = float(logits_V.max())
    if 0 < params.top_k < logits_V.size:
        id_C = likeliest(logits_V, params.top_k)
        mass_C = _cumulate(_weigh(logits_V[id_C], best, params))
        needed = params.top_p * mass_C[-1]
    elif params.top_p < 1.0:
        needed = params.top_p * _weigh(logits_V, best, params).sum()
        # How many tokens that takes is not known beforehand. Few, mostly; so sort few, then more.
        for count in (256, 4096, 65536, logits_V.size):
            id_C = likeliest(logits_V, count)
            mass_C = _cumulate(_weigh(logits_V[id_C], best, params))
            if mass_C[-1] >= needed:
                break
    else:
        return _pick(_cumulate(_weigh(logits_V, best, params)), u)

    if params.top_p < 1.0:
        mass_C = mass_C[: np.searchsorted(mass_C, needed, side="left") + 1]
    return int(id_C[_pick(mass_C, u)])


def _weigh(logits: NDArray[np.float32], best: float, params: SamplingParams) -> NDArray[np.float64]:
    """Return each token's probability, relative to the likeliest token's; 0 if below min_p."""
    weight = np.subtract(logits, best, dtype=np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, as it should be
        weight /= params.temperature
    np.exp(weight, out=weight)
    if params.min_p > 0.0:
        weight[weight < params.min_p] = 0.0
    return weight


def _cumulate(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cumsum(weight, out=weight)


def _pick(mass: NDArray[np.float64], u: float) -> int:
    """Return the first index whose cumulated mass exceeds `u` of the whole."""
    return int(np.searchsorted(mass, u * mass[-1], side="right"))
