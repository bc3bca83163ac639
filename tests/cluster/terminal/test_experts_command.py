"""`tradewind experts`: one command to a deployment, watched until everything is in its place."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from cluster.terminal.experts import Experts
from tests.cluster.terminal.http_endpoint import HttpEndpoint, QuietHandler

pytestmark = pytest.mark.timeout(60)

TRADEWIND = Path(sys.executable).with_name("tradewind")
RESTARTING = (503, json.dumps({"error": {"message": "an engine or its router does not answer"}}))
NO_GATEWAY = (404, "Path '/status' not found")  # HAProxy's own words


def progress(live, wished, settled=False, missing=0, **others):
    return {
        "wished_groups": wished,
        "groups": {"starting": 0, "live": live, "suspect": 0, "draining": 0, **others},
        "missing_replicas": missing,
        "lost_experts": 0,
        "imbalance": 1.0,
        "is_settled": settled,
    }


def model(progress, name="sparse", epoch=17, pids=(401, 402)):
    groups = [
        {"process": {"kind": "ExpertGroup", "name": f"{name}/{i}", "pid": pid, "node": "10.0.0.7"}}
        for i, pid in enumerate(pids)
    ]
    return {"model": name, "epoch": epoch, "progress": progress, "groups": groups}


def shown(*models):
    return 200, json.dumps({"models": models})


DENSE = model(None, "dense", 0, pids=())
AT_FIRST = shown(DENSE, model(progress(2, 2, settled=True)))


class Endpoint(HttpEndpoint):
    """A real HTTP server: each GET, and each POST, gets the next answer that there is; the last one stays."""

    def __init__(self):
        self.statuses = [AT_FIRST]
        self.answers = [(202, "{}")]
        self.posts = []  # (path, authorization, body)
        self.has_shown_all = threading.Event()
        endpoint = self

        class Handler(QuietHandler):
            def do_GET(self):
                assert self.path == "/status"
                if len(endpoint.statuses) == 1:
                    endpoint.has_shown_all.set()
                self.reply_next(endpoint.statuses)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.headers["content-type"] == "application/json"
                endpoint.posts.append((self.path, self.headers["authorization"], json.loads(body)))
                self.reply_next(endpoint.answers)

            def reply_next(self, answers):
                status, body = answers.pop(0) if len(answers) > 1 else answers[0]
                if status is None:  # a gateway dies in the middle of it
                    self.close_connection = True
                    return
                self.reply(status, body)

        super().__init__(Handler)

    def then(self, *statuses):
        """Add what /status says after the first time."""
        self.statuses += [item if isinstance(item, tuple) else shown(DENSE, item) for item in statuses]


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def run(endpoint):
    """Return a function that gives a command and returns the lines that are shown."""

    def give(command, *arguments, model=None, api_key=None, timeout_s=30.0):
        console = Console(file=io.StringIO(), width=200, highlight=False)
        experts = Experts(endpoint.url, model, api_key, timeout_s, console, period_s=0.001)
        getattr(experts, command)(*arguments)
        return console.file.getvalue().splitlines()

    return give


def without_seconds(lines):
    return [re.sub(r"\d+\.\d s", "N s", line) for line in lines]


def test_scaling_is_watched_until_every_expert_is_in_its_place(endpoint, run):
    endpoint.then(
        model(progress(2, 4, starting=2)),
        model(progress(3, 4, starting=1, missing=118)),
        model(progress(3, 4, starting=1, missing=118)),
        model(progress(4, 4, missing=1)),
        model(progress(4, 4, settled=True)),
    )
    assert without_seconds(run("scale", 4)) == [
        "2 of 4 groups live, 2 starting",
        "3 of 4 groups live, 1 starting, 118 copies to go",
        "4 of 4 groups live, 1 copy to go",
        "4 of 4 groups live",
        "4 groups live, every expert in its place (epoch 17, N s)",
    ]
    assert endpoint.posts == [("/admin/models/sparse/experts/scale", None, {"groups": 4})]


def test_an_expert_that_no_live_group_has_is_told(endpoint, run):
    lost = {**progress(1, 1, starting=1), "lost_experts": 1200}
    endpoint.then(model(lost), model(progress(1, 1, settled=True)))
    lines = run("scale", 1)
    assert lines[0] == "1 of 1 group live, 1 starting, 1,200 experts in no live group"
    assert lines[-1].startswith("1 group live, every expert in its place")


def test_rebalancing_is_done_when_all_copies_are_made(endpoint, run):
    endpoint.then(model(progress(2, 2, missing=7)), model(progress(2, 2, settled=True), epoch=18))
    assert without_seconds(run("rebalance")) == [
        "2 of 2 groups live, 7 copies to go",
        "2 of 2 groups live",
        "2 groups live, every expert in its place (epoch 18, N s)",
    ]
    assert endpoint.posts == [("/admin/models/sparse/experts/rebalance", None, {})]


@pytest.mark.parametrize("group", ["1", "sparse/1"])
def test_draining_is_done_when_the_groups_process_is_gone(endpoint, run, group):
    endpoint.then(
        model(progress(2, 2, draining=1), pids=(401, 402, 403)),
        model(progress(2, 2, settled=True), pids=(401, 402, 403)),  # the parts of it are of two moments
        model(progress(2, 2, settled=True), pids=(401, 409)),  # another group of the same name
    )
    assert run("drain", group)[0] == "2 of 2 groups live, 1 draining"
    assert endpoint.posts == [("/admin/models/sparse/experts/drain", None, {"group": "sparse/1"})]
    assert len(endpoint.statuses) == 1


def test_a_group_that_is_silent_can_be_drained(endpoint, run):
    endpoint.then(model(progress(1, 2, suspect=1)), model(progress(2, 2, settled=True)))
    assert run("drain", "7")[-1].startswith("2 groups live")
    assert endpoint.posts[0][2] == {"group": "sparse/7"}


@pytest.mark.parametrize("failure", [RESTARTING, NO_GATEWAY, (500, "Internal Server Error"), (None, "")])
def test_what_dies_meanwhile_does_not_end_the_command(endpoint, run, failure):
    endpoint.answers = [failure, failure, (202, "{}")]
    endpoint.then(failure, failure, model(progress(4, 4, settled=True)))
    lines = run("scale", 4)
    assert lines[0].endswith("(still trying)")
    assert lines[-1].startswith("4 groups live")
    assert len(endpoint.posts) == 3


def test_a_refusal_ends_the_command(endpoint, run):
    endpoint.answers = [(400, json.dumps({"error": {"message": "groups is 1, but it takes 2"}}))]
    with pytest.raises(httpx.HTTPStatusError):
        run("scale", 1)
    assert len(endpoint.posts) == 1


def test_a_missing_key_is_asked_for_by_its_option(endpoint, run):
    endpoint.answers = [(401, json.dumps({"error": {"message": "this server needs a valid admin key"}}))]
    with pytest.raises(ValueError, match="needs a valid admin key: --api-key, or TRADEWIND_ADMIN_KEY"):
        run("rebalance")


def test_the_key_goes_along(endpoint, run):
    endpoint.then(model(progress(2, 2, settled=True)))
    run("rebalance", api_key="secret")
    assert endpoint.posts[0][1] == "Bearer secret"


def test_a_command_that_is_overtaken_says_so(endpoint, run):
    endpoint.then(model(progress(3, 3, settled=True)))
    with pytest.raises(ValueError, match=r"not as asked \(3 of 3 groups live\): another command"):
        run("scale", 4)


def test_when_the_time_is_up_it_says_how_far_it_is(endpoint, run):
    endpoint.then(model(progress(2, 4, starting=2)))
    with pytest.raises(TimeoutError, match=r"not done after 0\.5 s; .* with it: 2 of 4 groups live, 2"):
        run("scale", 4, timeout_s=0.5)


def test_when_the_time_is_up_before_the_command_was_taken_it_says_so(endpoint, run):
    endpoint.answers = [RESTARTING]
    with pytest.raises(TimeoutError, match=r"not done after 0\.1 s; nobody took the command"):
        run("scale", 4, timeout_s=0.1)


def test_a_model_may_be_chosen(endpoint, run):
    endpoint.then(model(progress(2, 2, settled=True)))
    run("rebalance", model="sparse")
    with pytest.raises(ValueError, match=f"'third' is not served at {endpoint.url}; choose one of dense, sp"):
        run("rebalance", model="third")


def test_a_deployment_without_expert_groups_has_nothing_to_change(endpoint, run):
    endpoint.statuses = [shown(DENSE)]
    with pytest.raises(ValueError, match=f"no model at {endpoint.url} has expert groups"):
        run("rebalance")


def test_in_a_terminal_only_the_last_line_stays(endpoint):
    endpoint.then(model(progress(3, 4, starting=1)), model(progress(4, 4, settled=True)))
    console = Console(file=io.StringIO(), force_terminal=True, width=200, highlight=False)
    Experts(endpoint.url, None, None, 30.0, console, period_s=0.001).scale(4)
    # Everything before it is a line that was erased.
    assert re.sub(r"\d+\.\d s", "N s", console.file.getvalue()).endswith(
        "\x1b[2K4 groups live, every expert in its place (epoch 17, N s)\n"
    )


def start(endpoint, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRADEWIND_")}
    return subprocess.Popen(
        [TRADEWIND, "experts", *arguments, "--url", endpoint.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_the_command_ends_with_status_0_when_it_is_done(endpoint):
    endpoint.then(model(progress(4, 4, settled=True)))
    with start(endpoint, "scale", "4") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "every expert in its place" in out


def test_the_command_ends_with_status_1_and_one_sentence_when_it_is_refused(endpoint):
    endpoint.answers = [(400, json.dumps({"error": {"message": "there is no expert group 'sparse/9'"}}))]
    with start(endpoint, "drain", "9") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    answers = f"error: {endpoint.url}/admin/models/sparse/experts/drain answers: "
    assert err == answers + "there is no expert group 'sparse/9'\n"


def test_ctrl_c_ends_the_watching_and_not_the_command(endpoint):
    endpoint.then(model(progress(2, 4, starting=2)))
    with start(endpoint, "scale", "4") as process:
        assert endpoint.has_shown_all.wait(30)
        assert endpoint.posts
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert out.endswith("The cluster goes on with it; `tradewind status` shows how far it is.\n")
