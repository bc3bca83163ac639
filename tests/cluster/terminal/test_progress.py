from cluster.terminal.progress import in_words

UNDER_WAY = {
    "wished_groups": 4,
    "groups": {"live": 3, "starting": 1},
    "missing_replicas": 2,
    "lost_experts": 1,
}


def test_what_is_missing_is_counted_in_words():
    assert in_words(UNDER_WAY) == "3 of 4 groups live, 1 starting, 2 copies to go, 1 expert in no live group"


def test_the_reason_why_something_is_missing_comes_last():
    assert in_words(UNDER_WAY | {"failure": "layer 1 expert 2: no room"}).endswith(
        "1 expert in no live group, but layer 1 expert 2: no room"
    )
