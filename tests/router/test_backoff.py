from router.backoff import LONGEST_PAUSE_S, pause_s


def test_each_failure_doubles_the_pause():
    assert [pause_s(num_failures) for num_failures in (1, 2, 3)] == [0.5, 1.0, 2.0]


def test_after_any_number_of_failures_the_pause_is_the_longest():
    assert {pause_s(num_failures) for num_failures in (7, 100, 5000)} == {LONGEST_PAUSE_S}
