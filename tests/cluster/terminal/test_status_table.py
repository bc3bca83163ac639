import io
import socket

import httpx
import pytest
from rich.console import Console

from cluster.terminal.status import current, render, show
from tests.cluster.terminal.http_endpoint import HttpEndpoint, QuietHandler


def process(kind, name, pid):
    return {"kind": kind, "name": name, "pid": pid, "node": "10.0.0.7"}


GROUPS = [
    {
        "process": process("ExpertGroup", "group-0", 401),
        "experts": {"0": 30, "10": 30},
        "rows": {"0": 1500, "10": 500},
        "num_links": 2,
        "num_threads": 1,
    },
    {
        "process": process("ExpertGroup", "group-1", 402),
        "experts": {"2": 29},
        "rows": {},
        "num_links": 1,
        "num_threads": 2,
    },
]
ENGINE = {
    "process": process("Engine", "sparse/abc", 301),
    "epoch": 4,
    "num_running": 7,
    "num_waiting": 3,
    "used_blocks": 12,
    "total_blocks": 640,
    "tokens_per_s": 81.25,
    "shards": [],
}
PROGRESS = {
    "wished_groups": 4,
    "groups": {"starting": 1, "live": 2, "suspect": 0, "draining": 0},
    "missing_replicas": 118,
    "lost_experts": 0,
    "imbalance": 1.082,
    "is_settled": False,
}
SPARSE = {
    "model": "sparse",
    "epoch": 4,
    "progress": PROGRESS,
    "router": process("Router", "sparse/router", 201),
    "engines": [ENGINE],
    "groups": GROUPS,
}
DENSE = {
    "model": "dense",
    "epoch": 0,
    "progress": None,
    "router": process("Router", "dense/router", 202),
    "engines": [{**ENGINE, "process": process("Engine", "dense/xyz", 302), "epoch": 0}],
    "groups": [],
}


def tables(*models):
    """Return the tables for these models as lists of rows; they must also print."""
    shown = render({"gateway": process("Gateway", "gateway-1", 101), "models": models})
    Console(file=io.StringIO()).print(shown)
    return [
        list(zip(*(column.cells for column in table.columns), strict=True)) for table in shown.renderables
    ]


def test_every_process_has_a_row():
    assert [row[:4] for row in tables(SPARSE, DENSE)[0]] == [
        ("Gateway", "gateway-1", "101", "10.0.0.7"),
        ("Router", "sparse/router", "201", "10.0.0.7"),
        ("Engine", "sparse/abc", "301", "10.0.0.7"),
        ("ExpertGroup", "group-0", "401", "10.0.0.7"),
        ("ExpertGroup", "group-1", "402", "10.0.0.7"),
        ("Router", "dense/router", "202", "10.0.0.7"),
        ("Engine", "dense/xyz", "302", "10.0.0.7"),
    ]


def test_the_shards_of_an_engine_follow_it():
    shards = [process("Shard", f"dense/xyz/{rank}", 310 + rank) for rank in (1, 2)]
    (engine,) = DENSE["engines"]
    rows = tables({**DENSE, "engines": [{**engine, "shards": shards}]})[0]
    assert [(row[0], row[1], row[4]) for row in rows[-2:]] == [
        ("Shard", "dense/xyz/1", "rank 1 of 3"),
        ("Shard", "dense/xyz/2", "rank 2 of 3"),
    ]


def test_a_row_says_what_its_process_does():
    assert [row[4] for row in tables(SPARSE)[0]] == [
        "HTTP, text, journal",
        "epoch 4; 2 of 4 groups live, 1 starting, 118 copies to go; imbalance 1.08",
        "81.2 tokens/s, 7 running, 3 waiting, 12 of 640 KV blocks",
        "experts 0, 10; 2,000 rows, 2 links, 1 threads",
        "experts 2; 0 rows, 1 links, 2 threads",
    ]


def test_a_router_without_expert_groups_says_so():
    assert tables(DENSE)[0][1][4] == "no expert groups"


def test_experts_that_no_live_group_has_are_told():
    lost = {**SPARSE, "progress": {**PROGRESS, "groups": {"live": 0, "suspect": 2}, "lost_experts": 1}}
    assert tables(lost)[0][1][4] == (
        "epoch 4; 0 of 4 groups live, 2 suspect, 118 copies to go, 1 expert in no live group; imbalance 1.08"
    )


def test_experts_are_listed_by_number_with_their_share_of_the_rows():
    assert tables(SPARSE)[1] == [
        ("0", "group-0", "30", "1,500", "75.0%"),
        ("2", "group-1", "29", "0", "0.0%"),
        ("10", "group-0", "30", "500", "25.0%"),
    ]


def test_experts_that_have_had_no_row_share_nothing():
    idle = {**SPARSE, "groups": [{**group, "rows": {}} for group in GROUPS]}
    assert {row[4] for row in tables(idle)[1]} == {"0.0%"}


def test_a_model_without_groups_has_no_table_of_experts():
    (processes,) = tables(DENSE)
    assert [row[0] for row in processes] == ["Gateway", "Router", "Engine"]


def test_a_deployment_whose_processes_are_gone_shows_what_is_left():
    (processes,) = tables({**SPARSE, "engines": [], "groups": []})
    assert [row[0] for row in processes] == ["Gateway", "Router"]


@pytest.fixture
def failing():
    """The URL of a real HTTP server that answers everything with 503, as our gateway words it."""

    class Handler(QuietHandler):
        def do_GET(self):
            self.reply(503, '{"error": {"message": "the router does not answer"}}')

    endpoint = HttpEndpoint(Handler)
    yield endpoint.url
    endpoint.close()


def test_an_error_stands_where_the_table_was(failing):
    assert str(current(failing)) == f"{failing}/status answers: the router does not answer"


def test_an_endpoint_that_is_gone_for_now_is_named():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert str(current(url)).startswith(f"nobody answers at {url}/")


def test_what_fails_at_first_is_raised(failing):
    with pytest.raises(httpx.HTTPStatusError):
        show(failing, Console(file=io.StringIO(), force_terminal=True))
