import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.sampler import likeliest, sample, uniform
from shards.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def reference_survivors(logits, params, prompt, answer):
    """What may be drawn, as (id, weight), by the slow and obvious way: sort everything, in Python floats."""
    logit = [float(x) for x in logits]
    for i in set(prompt) | set(answer):
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            logit[i] = float(np.float32(logit[i] / factor if logit[i] > 0 else logit[i] * factor))
    for i, count in Counter(answer).items():
        penalty = params.frequency_penalty * count + params.presence_penalty
        logit[i] = float(np.float32(logit[i] - penalty))
    best = max(logit)
    weight = {i: math.exp((x - best) / params.temperature) for i, x in enumerate(logit)}
    order = sorted(weight, key=lambda i: (-logit[i], i))
    order = [i for i in order if weight[i] >= params.min_p]
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        needed = params.top_p * math.fsum(weight[i] for i in order)
        count, mass = 0, 0.0
        while count < len(order) and (count == 0 or mass < needed):
            mass += weight[order[count]]
            count += 1
        order = order[:count]
    return [(i, weight[i]) for i in order]


def reference_draw(logits, params, prompt, answer):
    pairs = reference_survivors(logits, params, prompt, answer)
    if params.top_p >= 1.0 and not 0 < params.top_k < len(logits):
        pairs.sort()
    target = uniform(params.seed, len(answer)) * math.fsum(weight for _, weight in pairs)
    mass = 0.0
    for i, weight in pairs:
        mass += weight
        if mass > target:
            return i
    return pairs[-1][0]


def normal_logits(size, scale=3.0, seed=0):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def drawn(logits, params, num_draws=300):
    """Return the set of tokens that the seeds 0, 1, ... draw."""
    logits = np.array(logits, dtype=np.float32)
    return {
        sample(logits, SamplingParams(**(params | {"seed": seed})), [], []).token_id
        for seed in range(num_draws)
    }


token_lists = st.lists(st.integers(0, 7), max_size=6)
# Small integers tie often; the floats hardly ever.
any_logits = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-30, 30, width=32)), min_size=8, max_size=40
)
any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.6, -0.6]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=300, deadline=None)
@given(any_logits, any_params, token_lists, token_lists)
def test_a_draw_is_that_of_sorting_everything(logits, params, prompt, answer):
    logits_V = np.array(logits, dtype=np.float32)
    expected = reference_draw(logits_V, params, prompt, answer)
    assert sample(logits_V, params, prompt, answer).token_id == expected


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.5, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 700])
def test_a_draw_from_a_large_vocabulary_is_that_of_sorting_everything(scale, top_p, top_k):
    logits_V = normal_logits(9_000, scale)
    for seed in range(5):
        params = SamplingParams(top_p=top_p, top_k=top_k, seed=seed)
        assert sample(logits_V, params, [], []).token_id == reference_draw(logits_V, params, [], [])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, -1.5, -math.inf, 3e38]), min_size=1), st.integers(0, 12))
def test_likeliest_is_a_full_sort_by_logit_and_then_id(logits, count):
    expected = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:count]
    assert likeliest(np.array(logits, dtype=np.float32), count).tolist() == expected


def test_greedy_takes_the_lowest_of_the_best_ids():
    assert sample(np.array([1, 7, 3, 7], dtype=np.float32), GREEDY, [], []).token_id == 1


def test_draws_follow_the_softmax():
    logits_V = normal_logits(20, scale=1.0)
    num_draws = 20_000
    counts = np.zeros(20)
    for seed in range(num_draws):
        counts[sample(logits_V, SamplingParams(temperature=0.8, seed=seed), [], []).token_id] += 1
    expected = np.exp(logits_V.astype(np.float64) / 0.8)
    expected *= num_draws / expected.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded by chance once in 1,000


def test_neighbouring_positions_and_seeds_draw_independently():
    cells = np.zeros((4, 4, 4))
    for seed in range(-60, 60):
        for position in range(100):
            here, next_position, next_seed = (
                int(4 * uniform(*at)) for at in ((seed, position), (seed, position + 1), (seed + 1, position))
            )
            cells[here, next_position, next_seed] += 1
    expected = cells.sum() / cells.size
    assert ((cells - expected) ** 2 / expected).sum() < 103.4  # 63 degrees of freedom: once in 1,000


def test_random_numbers_never_change():
    # Written down: an answer that goes on in another process, or after an upgrade, must stay the same.
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(-1, 2**40)] == [
        0.011546754286331562,
        0.5023796042735054,
        0.3035680343067586,
        0.20353554039193045,
    ]


def test_any_64_bit_seed_is_a_seed_of_its_own():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32]
    assert len({uniform(seed, 5) for seed in seeds}) == len(seeds)


def test_a_position_alone_decides_the_random_number():
    logits_V = normal_logits(1000)
    params = SamplingParams(seed=3)
    assert sample(logits_V, params, [1, 2], [5, 6]) == sample(logits_V, params, [9], [7, 8])


def test_top_k_one_is_greedy():
    assert drawn([1, 5, 5, 2], {"top_k": 1}) == {1}


def test_top_k_breaks_ties_by_id():
    assert drawn([3, 3, 3, 3, 9], {"top_k": 3, "temperature": 5.0}) == {0, 1, 4}


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert drawn([1, 1, 1], {"top_k": 50}) == {0, 1, 2}


def test_top_p_keeps_the_token_that_crosses_it():
    assert drawn(np.log([0.5, 0.3, 0.15, 0.05]), {"top_p": 0.6}) == {0, 1}


def test_top_p_zero_keeps_the_likeliest():
    assert drawn([1, 5, 5, 2], {"top_p": 0.0}) == {1}


def test_top_p_among_equals_keeps_the_lowest_ids():
    assert drawn([2.0] * 8, {"top_p": 0.5}) == {0, 1, 2, 3}


def test_top_p_counts_the_mass_that_top_k_left():
    # Of all, 0.4 falls short of 0.55; of the two that top_k leaves, it is 0.57.
    assert drawn(np.log([0.4, 0.3, 0.2, 0.1]), {"top_p": 0.55, "top_k": 2}) == {0}
    assert drawn(np.log([0.4, 0.3, 0.2, 0.1]), {"top_p": 0.55}) == {0, 1}


def test_top_p_counts_the_mass_that_min_p_left():
    assert drawn(np.log([0.4, 0.3, 0.2, 0.1]), {"top_p": 0.55, "min_p": 0.6}) == {0}


def test_min_p_is_a_fraction_of_the_likeliest():
    assert drawn(np.log([0.4, 0.3, 0.2, 0.1]), {"min_p": 0.45}) == {0, 1, 2}


def test_min_p_one_keeps_only_the_equals_of_the_likeliest():
    assert drawn([1, 5, 5, 2], {"min_p": 1.0}) == {1, 2}


def test_a_forbidden_token_is_never_drawn():
    assert drawn([-np.inf, 0, -np.inf, 0], {}) == {1, 3}
    assert drawn([-np.inf, 0, -np.inf, 0], {"top_p": 0.999999}) == {1, 3}
    assert drawn([-np.inf, 0, -np.inf, 0], {"top_k": 3}) == {1, 3}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("knobs", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature, knobs):
    assert drawn([3e38, -3e38, 1, 2e38], {"temperature": temperature, **knobs}, 20) == {0}


def test_a_huge_temperature_is_nearly_uniform():
    assert drawn([10, -10, 0, 5], {"temperature": 1e30}) == {0, 1, 2, 3}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer():
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sample(np.array([4, 3, 1], np.float32), params, [0, 0, 0], []).token_id == 1
    assert sample(np.array([4, 3, 1], np.float32), params, [0], [1]).token_id == 0
    assert sample(np.array([0.5, 0.4, 0.0], np.float32), params, [0], []).token_id == 1
    assert sample(np.array([-1, -1.5, -9], np.float32), params, [0], []).token_id == 1


def test_frequency_penalty_counts_the_answer_only():
    params = SamplingParams(temperature=0.0, frequency_penalty=0.5)
    logits_V = np.array([2.0, 1.2, 0.0], np.float32)
    assert sample(logits_V, params, [0, 0, 0], [0]).token_id == 0
    assert sample(logits_V, params, [], [0, 0]).token_id == 1


def test_presence_penalty_counts_a_token_of_the_answer_once():
    params = SamplingParams(temperature=0.0, presence_penalty=0.5)
    logits_V = np.array([2.0, 1.2, 0.0], np.float32)
    assert sample(logits_V, params, [0], [0, 0, 0]).token_id == 0
    assert sample(np.array([2.0, 1.6, 0.0], np.float32), params, [], [0]).token_id == 1


def test_sampling_leaves_the_logits_as_they_were():
    logits_V = normal_logits(100)
    before = logits_V.copy()
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, top_p=0.9, num_logprobs=3)
    sample(logits_V, params, [1, 2, 3], [4, 5])
    np.testing.assert_array_equal(logits_V, before)


def test_no_logprobs_unless_asked_for():
    sampled = sample(normal_logits(10), GREEDY, [], [])
    assert (sampled.logprob, sampled.top_logprobs) == (None, ())


def test_zero_logprobs_are_that_of_the_chosen_token_alone():
    sampled = sample(np.zeros(4, np.float32), SamplingParams(temperature=0.0, num_logprobs=0), [], [])
    assert sampled.logprob == pytest.approx(math.log(0.25), rel=1e-12)
    assert sampled.top_logprobs == ()


def test_logprobs_are_those_of_the_model_before_any_knob():
    logits_V = normal_logits(1000)
    exact = logits_V.astype(np.float64)
    exact -= exact.max() + math.log(math.fsum(np.exp(exact - exact.max())))
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=1.7, num_logprobs=5)
    sampled = sample(logits_V, params, [int(logits_V.argmax())], [])
    assert sampled.logprob == pytest.approx(exact[sampled.token_id], rel=1e-12)
    expected = sorted(enumerate(exact), key=lambda pair: (-pair[1], pair[0]))[:5]
    assert [token_id for token_id, _ in sampled.top_logprobs] == [token_id for token_id, _ in expected]
    assert [x for _, x in sampled.top_logprobs] == pytest.approx([x for _, x in expected], rel=1e-12)


def test_more_logprobs_than_tokens_are_all_of_them():
    sampled = sample(normal_logits(7), SamplingParams(num_logprobs=20), [], [])
    assert len(sampled.top_logprobs) == 7


@pytest.mark.parametrize("logits", [[1, np.nan], [np.inf, 1], [-np.inf, -np.inf]])
def test_logits_without_a_finite_best_are_an_error(logits):
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(np.array(logits, np.float32), SamplingParams(), [], [])
