import pytest

from shards.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("num_logprobs", -1),
    ],
)
def test_a_value_without_meaning_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be"):
        SamplingParams(**{name: value})


def test_temperature_zero_is_greedy():
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=1e-300).is_greedy
