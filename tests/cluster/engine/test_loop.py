import sys
import threading
from concurrent.futures import wait
from queue import SimpleQueue

import pytest
from fake_runner import VOCAB_SIZE, ExpertGone, FakeRunner
from prometheus_client import CollectorRegistry

from cluster.engine.blocks import block_hash
from cluster.engine.copies import MAX_STEP_BYTES, BlockRun
from cluster.engine.engine import Engine
from cluster.engine.loop import LEAST_RUN_BYTES, EngineLoop
from cluster.engine.observer import EngineObserver
from cluster.engine.request import EngineFull, EngineStopped, Generated, GenerationRequest
from cluster.metrics import EngineMetrics
from shards.kv_cache import BLOCK_SIZE
from shards.sampling_params import SamplingParams
from shards.step import Chunk, StepBatch
from tests.stepped_back import is_in_foreground, made_stepped_back

DEADLINE_S = 10.0

pytestmark = pytest.mark.timeout(60)


class Gate:
    """A runner that stands still, inside a step, while its gate is closed."""

    def __init__(self, runner):
        self.runner = runner
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Semaphore(0)  # released once for each step
        self.broken = None  # raised by the next step that passes the gate

    def run(self, batch):
        self.reached.release()
        assert self.open.wait(DEADLINE_S)
        if self.broken:
            raise self.broken
        return self.runner.run(batch)

    def write_blocks(self, block_ids, rows_BN):
        self.runner.write_blocks(block_ids, rows_BN)


class Served:
    """An engine's loop, and what it delivered: {gateway: [events]}, receipts apart from all else."""

    def __init__(self, max_open=8, max_running=8, context_length=1000, on_failure=lambda: None):
        self.gate = Gate(FakeRunner(64, 64))
        self.engine = Engine(
            self.gate,
            vocab_size=VOCAB_SIZE,
            context_length=context_length,
            num_blocks=64,
            max_step_tokens=64,
            max_running=max_running,
            request_errors=(ExpertGone,),
        )
        self.registry = CollectorRegistry()
        self.delivered = {}
        self.receipts = SimpleQueue()  # (gateway, request id)
        self.loop = EngineLoop(
            self.engine,
            self.deliver,
            EngineObserver(EngineMetrics(self.registry), "m"),
            max_open,
            on_failure,
        )

    def deliver(self, gateway, events):
        if events[0].is_receipt:
            (receipt,) = events
            self.receipts.put((gateway, receipt.request_id))
        else:
            self.delivered.setdefault(gateway, []).extend(events)

    def tokens(self, gateway, request_id):
        return [event.token_id for event in self.delivered[gateway] if event.request_id == request_id]


def request(id="a", max_tokens=5, prompt=(1, 2, 3), is_resumed=False):
    return GenerationRequest(id, prompt, max_tokens, SamplingParams(temperature=0.0), is_resumed=is_resumed)


@pytest.fixture
def served():
    started = []

    def start(**knobs):
        started.append(Served(**knobs))
        return started[-1]

    yield start
    for one in started:
        one.gate.open.set()
        one.loop.stop()


def endless(served):
    """Submit a long request, and wait until its first step stands at the closed gate."""
    served.gate.open.clear()
    future = served.loop.submit(request("endless", max_tokens=900), "gateway 1")
    assert served.gate.reached.acquire(timeout=DEADLINE_S)
    return future


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a weight")
def test_steps_run_in_the_foreground_whoever_makes_the_loop():
    served = made_stepped_back(Served)
    assert is_in_foreground("engine-steps")
    served.loop.stop()


def test_a_request_ends_with_its_number_of_tokens(served):
    one = served()
    assert one.loop.submit(request(max_tokens=5), "gateway").result(DEADLINE_S) == Generated("length", 5)


def test_each_gateway_gets_the_events_of_its_own_requests_before_their_end(served):
    one = served()
    futures = {id: one.loop.submit(request(id), f"gateway {id}") for id in "abc"}
    for id, future in futures.items():
        assert future.result(DEADLINE_S) == Generated("length", 5)
        assert {event.request_id for event in one.delivered[f"gateway {id}"]} == {id}
        assert len(one.tokens(f"gateway {id}", id)) == 5
    assert one.delivered["gateway a"][-1].finish_reason == "length"


def test_one_step_is_one_delivery_to_a_gateway(served):
    one = served()
    deliveries = []
    one.loop._deliver = lambda gateway, events: deliveries.append([event.request_id for event in events])
    endless(one)
    futures = [one.loop.submit(request(id, max_tokens=3), "gateway 1") for id in "ab"]
    deliveries.clear()  # of receipts
    one.gate.open.set()
    wait(futures, DEADLINE_S)
    assert [ids for ids in deliveries if "a" in ids] == [["endless", "a", "b"]] * 3


def test_a_request_that_can_never_be_served_is_a_value_error(served):
    one = served()
    with pytest.raises(ValueError, match="prompt is empty"):
        one.loop.submit(request(prompt=()), "gateway").result(DEADLINE_S)
    assert one.loop.submit(request(), "gateway").result(DEADLINE_S).num_tokens == 5


def test_an_id_is_free_again_only_when_its_end_is_reported(served):
    one = served()
    first = endless(one)
    one.loop.abort("endless")
    second = one.loop.submit(request("endless"), "gateway")  # read in one go with the abort
    one.gate.open.set()
    with pytest.raises(ValueError, match="'endless' is here already"):
        second.result(DEADLINE_S)
    assert first.result(DEADLINE_S).finish_reason == "abort"
    assert one.loop.submit(request("endless"), "gateway").result(DEADLINE_S).num_tokens == 5


def test_one_request_more_than_max_open_is_turned_away(served):
    one = served(max_open=2)
    futures = [endless(one), *(one.loop.submit(request(id), "gateway") for id in "ab")]
    one.gate.open.set()
    with pytest.raises(EngineFull, match="already holds 2 requests"):
        futures[2].result(DEADLINE_S)
    assert futures[1].result(DEADLINE_S).num_tokens == 5
    assert one.loop.submit(request("c"), "gateway").result(DEADLINE_S).num_tokens == 5


def test_a_request_of_a_lost_engine_is_never_one_too_many(served):
    one = served(max_open=1)
    endless(one)
    resumed = one.loop.submit(request("a", is_resumed=True), "gateway")
    one.gate.open.set()
    assert resumed.result(DEADLINE_S).num_tokens == 5


def test_a_gateway_hears_at_once_that_its_request_is_here_also_while_a_step_takes_its_time(served):
    one = served()
    endless(one)
    one.loop.submit(request("a"), "gateway 2")
    assert [one.receipts.get(timeout=DEADLINE_S) for _ in range(2)] == [
        ("gateway 1", "endless"),
        ("gateway 2", "a"),
    ]


def test_a_request_that_its_caller_cancelled_before_the_step_is_never_run(served):
    one = served()
    endless(one)
    future = one.loop.submit(request(), "gateway 2")
    assert future.cancel()
    last = one.loop.submit(request("b"), "gateway 1")
    one.gate.open.set()
    last.result(DEADLINE_S)
    assert "gateway 2" not in one.delivered


def test_an_abort_ends_a_running_request_and_no_other(served):
    one = served()
    future = endless(one)
    other = one.loop.submit(request("b", max_tokens=5), "gateway 1")
    one.loop.abort("endless")
    one.gate.open.set()
    assert future.result(DEADLINE_S).finish_reason == "abort"
    assert other.result(DEADLINE_S) == Generated("length", 5)


def test_an_abort_ends_a_waiting_request(served):
    one = served(max_running=1)
    endless(one)
    future = one.loop.submit(request("b"), "gateway 1")
    one.loop.abort("b")
    one.gate.open.set()
    assert future.result(DEADLINE_S) == Generated("abort", 0)


def test_aborting_an_unknown_request_is_ignored(served):
    one = served()
    one.loop.abort("nobody")
    assert one.loop.submit(request(), "gateway").result(DEADLINE_S).num_tokens == 5


def test_a_lost_gateway_takes_its_requests_along_and_no_others(served):
    one = served()
    lost = [endless(one), one.loop.submit(request("b", 900), "gateway 1")]
    kept = one.loop.submit(request("c"), "gateway 2")
    one.loop.abort_gateway("gateway 1")
    one.gate.open.set()
    assert [future.result(DEADLINE_S).finish_reason for future in lost] == ["abort", "abort"]
    assert kept.result(DEADLINE_S) == Generated("length", 5)


def test_an_error_of_the_requests_of_one_step_leaves_the_engine_alive(served):
    one = served()
    future = endless(one)
    one.gate.runner.next_error = ExpertGone("expert 3 has no replica")
    one.gate.open.set()
    assert future.result(DEADLINE_S).finish_reason == "error"
    assert one.delivered["gateway 1"][-1].error == "expert 3 has no replica"
    assert one.loop.submit(request(), "gateway").result(DEADLINE_S).num_tokens == 5
    assert one.loop.failure is None


def test_stopping_lets_the_step_end_and_refuses_what_is_left(served):
    one = served()
    future = endless(one)
    waiting = one.loop.submit(request("b"), "gateway 1")
    stopping = threading.Thread(target=one.loop.stop)
    stopping.start()
    one.gate.open.set()
    stopping.join(DEADLINE_S)
    assert not stopping.is_alive()
    for refused in (future, waiting, one.loop.submit(request("c"), "gateway 1")):
        with pytest.raises(EngineStopped):
            refused.result(DEADLINE_S)
    assert one.loop.failure is None


def test_an_idle_loop_stops_and_stopping_twice_does_no_harm(served):
    one = served()
    one.loop.stop()
    one.loop.stop()
    one.loop.abort("a")
    one.loop.abort_gateway("gateway")
    with pytest.raises(EngineStopped):
        one.loop.submit(request(), "gateway").result(DEADLINE_S)


def test_a_failed_step_stops_every_request_also_those_that_come_later(served):
    one = served()
    running = endless(one)
    waiting = [one.loop.submit(request(id), "gateway 1") for id in "ab"]
    one.loop.abort("a")
    one.gate.broken = RuntimeError("out of memory")
    one.gate.open.set()
    for future in (running, *waiting, one.loop.submit(request("c"), "gateway 1")):
        with pytest.raises(EngineStopped):
            future.result(DEADLINE_S)
    one.loop.stop()
    assert one.loop.failure is one.gate.broken
    with pytest.raises(EngineStopped):
        one.loop.submit(request("d"), "gateway 1").result(DEADLINE_S)


def test_no_request_is_forgotten_however_close_to_the_failure_it_comes(served):
    one = served()
    endless(one)
    one.gate.broken = RuntimeError("out of memory")
    futures = []

    def keep_submitting(caller):
        for number in range(300):
            futures.append(one.loop.submit(request(f"{caller}-{number}"), "gateway 1"))
            one.loop.abort(f"{caller}-{number}")

    callers = [threading.Thread(target=keep_submitting, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    one.gate.open.set()
    for caller in callers:
        caller.join(DEADLINE_S)
    assert len(futures) == 1200
    assert not wait(futures, DEADLINE_S).not_done


def test_a_request_that_breaks_the_engine_is_stopped_like_all_others(served):
    one = served()
    with pytest.raises(EngineStopped):
        one.loop.submit(request(prompt=("no token",)), "gateway").result(DEADLINE_S)
    one.loop.stop()
    assert isinstance(one.loop.failure, TypeError)


def test_the_time_to_the_first_token_is_observed_once_per_request(served):
    one = served()
    for id in "ab":
        one.loop.submit(request(id), "gateway").result(DEADLINE_S)
    one.loop.stop()
    name = "tradewind_engine_time_to_first_token_seconds_count"
    assert one.registry.get_sample_value(name, {"model": "m"}) == 2


def test_the_time_to_the_first_token_begins_before_the_step_that_a_request_waits_for(served):
    one = served(max_running=1)
    endless(one)
    future = one.loop.submit(request("a"), "gateway")
    assert not one.gate.reached.acquire(timeout=0.2), "a step began while another one stood at the gate"
    one.loop.abort("endless")
    one.gate.open.set()
    future.result(DEADLINE_S)
    one.loop.stop()
    # 0.2 s for each of the two: the endless one was aborted behind its first token.
    name = "tradewind_engine_time_to_first_token_seconds_sum"
    assert one.registry.get_sample_value(name, {"model": "m"}) >= 0.4


def test_an_engine_that_never_stepped_says_how_many_blocks_it_has(served):
    one = served()
    assert one.registry.get_sample_value("tradewind_engine_kv_blocks", {"model": "m"}) == 64


def test_a_failed_step_is_told_once_and_a_stop_is_not(served):
    told = []
    stopped = served(on_failure=lambda: told.append("stopped"))
    broken = served(on_failure=lambda: told.append("broken"))
    stopped.loop.stop()
    with pytest.raises(EngineStopped):
        broken.loop.submit(request(prompt=("no token",)), "gateway").result(DEADLINE_S)
    broken.loop.stop()
    assert told == ["broken"]


def runs_of(prompt):
    """Return what an engine sends another of a prompt of one block: a question, and the block."""
    runner, digests = FakeRunner(1, BLOCK_SIZE), (block_hash(b"", prompt),)
    runner.run(StepBatch((Chunk(prompt, 0, (0,), wants_logits=False),)))
    return BlockRun(digests, None), BlockRun(digests, runner.read_blocks([0]))


def test_copies_are_taken_in_while_nothing_runs_and_each_is_answered():
    one, answers = Served(), SimpleQueue()
    for run in runs_of((7,) * BLOCK_SIZE):
        one.loop.adopt(run, answers.put)
    assert [answers.get(timeout=DEADLINE_S) for _ in range(2)] == [0, 1]
    one.loop.stop()
    assert one.registry.get_sample_value("tradewind_engine_kv_blocks_adopted_total", {"model": "m"}) == 1


def test_copies_wait_for_the_end_of_a_step_and_no_request_for_many_of_them():
    one, answers, num_answers = Served(), SimpleQueue(), []
    one.gate.open.clear()
    deliver = one.loop._deliver
    one.loop._deliver = lambda *step: (num_answers.append(answers.qsize()), deliver(*step))
    running = one.loop.submit(request(max_tokens=3), "gateway")
    assert one.gate.reached.acquire(timeout=DEADLINE_S)
    question, _ = runs_of((7,) * BLOCK_SIZE)
    at_once = MAX_STEP_BYTES // LEAST_RUN_BYTES
    for _ in range(5 * at_once):
        one.loop.adopt(question, answers.put)
    one.gate.open.set()
    running.result(DEADLINE_S)
    assert num_answers == [0, 0, at_once, 2 * at_once], "with the receipt, and with each token"
    for _ in range(5 * at_once):
        answers.get(timeout=DEADLINE_S)
    one.loop.stop()


def test_a_loop_that_has_ended_takes_no_copies():
    one, answers = Served(), SimpleQueue()
    one.loop.stop()
    for run in runs_of((7,) * BLOCK_SIZE):
        one.loop.adopt(run, answers.put)
    assert answers.empty()
