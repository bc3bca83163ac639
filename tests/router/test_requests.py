"""Engines and gateways find the same standby for an answer, without a word between them."""

from collections import Counter

from router.requests import choose_standby

ENGINES = ["aaa", "bbb", "ccc", "ddd"]
ANSWERS = [f"cmpl-{number}-0" for number in range(400)]


def test_the_order_of_the_engines_does_not_matter() -> None:
    for answer in ANSWERS:
        assert choose_standby(answer, ENGINES) == choose_standby(answer, set(ENGINES))
        assert choose_standby(answer, ENGINES) == choose_standby(answer, ENGINES[::-1])


def test_a_lost_engines_answers_are_spread_over_all_others() -> None:
    chosen = Counter(choose_standby(answer, ENGINES) for answer in ANSWERS)
    assert chosen.keys() == set(ENGINES)
    assert max(chosen.values()) < 1.5 * len(ANSWERS) / len(ENGINES)


def test_an_engine_that_goes_changes_the_choice_only_where_it_was_chosen() -> None:
    left = ENGINES[1:]
    for answer in ANSWERS:
        before = choose_standby(answer, ENGINES)
        assert before == ENGINES[0] or choose_standby(answer, left) == before


def test_the_only_engine_has_no_standby() -> None:
    assert choose_standby("cmpl-1-0", []) is None
