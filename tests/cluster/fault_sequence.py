"""One random sequence of faults under load, drawn from a seed, and everything that must hold behind it."""

import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cluster.engine.request import GenerationRequest
from router.links.address import Address
from router.links.base import Frame, Kind
from router.links.stream import connect
from router.membership import Patience
from router.policy import Policy
from shards.background import in_foreground
from tests.cluster.belongings import Belongings
from tests.cluster.live_engine import Answer
from tests.cluster.live_fleet import Hang, LiveFleet
from tests.cluster.live_group import SECRET
from tests.cluster.workload import Workload

DEADLINE_S = 20.0  # of a sequence
CLOSING_S = 10.0
MOST_ENGINE_DEATHS = 3  # the journal gives up a request that more engines in a row do not survive
WEIGHTS = {
    "kill group": 6,
    "kill group unseen": 3,  # by Ray, for a while
    "kill all groups": 1,
    "stop group": 5,
    "restart router": 4,
    "scale": 3,
    "drain": 3,
    "rebalance": 1,
    "skew load": 2,
    "kill engine": 4,
    "deafen engine": 2,  # to new placements
    "stranger": 3,
}


@dataclass
class Outcome:
    """What became of one sequence."""

    seed: int
    log: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (kind, what exactly)
    num_requests: int = 0
    num_tokens: int = 0
    num_resubmissions: int = 0
    num_failovers: int = 0
    num_adopted_blocks: int = 0
    seconds: float = 0.0

    def story(self) -> str:
        """Tell all of it, for whoever has to find the cause."""
        problems = "\n".join(f"{kind}: {what}" for kind, what in self.problems)
        return f"seed {self.seed}\n{problems}\n" + "\n".join(self.log)


def run_sequence(seed: int, workload: Workload, directory: Path) -> Outcome:
    """Do it all, end everything, and look what is left. Takes DEADLINE_S + CLOSING_S at most."""
    outcome = Outcome(seed)
    started_at = time.monotonic()
    hook, threading.excepthook = threading.excepthook, _ignore_killed(threading.excepthook)
    in_foreground(lambda: None)  # its one thread stays
    before = Belongings.now()
    sequence = _Sequence(seed, workload, directory, outcome)
    try:
        sequence.run()
    except Hang as hang:
        outcome.problems.append(("hang", str(hang)))
    except Exception as error:
        outcome.problems.append(("broken", repr(error)))
    closing = threading.Thread(target=sequence.close, name="closing", daemon=True)
    closing.start()
    closing.join(CLOSING_S)
    if closing.is_alive():
        outcome.problems.append(("hang", str(Hang("closing the fleet"))))
    else:
        del sequence, closing  # a closed listener's last sockets go with the listener
        outcome.problems += before.leaks()
    outcome.seconds = time.monotonic() - started_at
    threading.excepthook = hook
    return outcome


def _ignore_killed(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[..., object]:
    """Pass on to `hook` all but the SystemExit of a killed group: that of pytest would keep its frames."""
    return lambda arguments: None if arguments.exc_type is SystemExit else hook(arguments)


class _Sequence:
    def __init__(self, seed: int, workload: Workload, directory: Path, outcome: Outcome) -> None:
        self._draw = random.Random(seed)
        self._outcome, self._workload = outcome, workload
        self._began_at = time.monotonic()
        config = workload.model.config
        draw = self._draw
        slots_per_layer = draw.randint(2, config.num_experts)
        self._policy = Policy(
            config.num_layers,
            config.num_experts,
            num_groups=draw.randint(2, 4),
            slots_per_layer=slots_per_layer,
            min_replicas=draw.randint(1, 2),
            patience=Patience(suspect_after_s=2.0, dead_after_s=10.0),
        )
        num_engines = draw.randint(1, 2)
        self._note(f"{self._policy.num_groups} groups with {slots_per_layer} slots for each layer, "
                   f"{self._policy.min_replicas} replicas, {num_engines} engines")  # fmt: skip
        self._strangers: list[socket.socket] = []
        self._running: list[tuple[GenerationRequest, Future[Answer]]] = []
        self._fleet = LiveFleet(workload.model, self._policy, num_engines, directory)

    def run(self) -> None:
        draw, fleet = self._draw, self._fleet
        if draw.random() < 0.8:  # else faults hit a fleet that is only starting
            fleet.wait_until("the first placement", self._is_placed, self._left_s)
        for _ in range(draw.randint(3, 10)):
            self._keep_busy(at_least=3)
            if draw.random() < 0.8:  # else two at once
                fleet.gateway.wait_tokens(draw.randint(1, 60), timeout_s=draw.uniform(0.005, 0.12))
            (kind,) = draw.choices([*WEIGHTS], [*WEIGHTS.values()])
            self._outcome.faults[kind] += 1
            self._do(kind)
        self._keep_busy(at_least=1)
        for group in fleet.groups:
            group.resume()
        for engine in fleet.engines:
            engine.placements.follows = True
        self._check_answers()
        self._note("all requests have ended")
        what: list[str | None] = ["never looked"]

        def is_settled() -> bool:
            what[0] = fleet.unsettled()
            return what[0] is None

        try:
            fleet.wait_until("settling", is_settled, self._left_s)
        except Hang as hang:
            raise Hang(f"the fleet does not settle: {what[0]}\n{fleet.describe()}") from hang
        self._note("settled")
        self._check_engines()

    def close(self) -> None:
        for stranger in self._strangers:
            stranger.close()
        self._fleet.close()
        self._outcome.num_tokens = self._fleet.gateway.num_tokens
        self._outcome.num_resubmissions = int(self._fleet.gateway.resubmissions._value.get())

    @property
    def _left_s(self) -> float:
        return self._began_at + DEADLINE_S - time.monotonic()

    def _note(self, what: str) -> None:
        self._outcome.log.append(f"{time.monotonic() - self._began_at:7.3f} s  {what}")

    def _is_placed(self) -> bool:
        return all(engine.placements.known.epoch for engine in self._fleet.engines)

    def _keep_busy(self, at_least: int) -> None:
        """Submit requests until so many are on their way."""
        while sum(not answer.done() for _, answer in self._running) < at_least:
            request = self._draw.choice(self._workload.requests)
            submission = replace(request, id=f"{request.id}/{len(self._running)}")
            self._running.append((request, self._fleet.gateway.submit(submission)))

    def _do(self, kind: str) -> None:
        draw, fleet, router = self._draw, self._fleet, self._fleet.router
        groups = fleet.groups
        group = draw.choice(groups) if groups else None
        engine = draw.choice(fleet.engines)
        name = group.name if group else "nobody"
        match kind:
            case "kill group" | "kill group unseen" if group:
                known_after_s = draw.uniform(1, 15) if kind == "kill group unseen" else 0.0
                self._note(f"kill {name}; Ray tells after {known_after_s:.1f} s")
                group.kill(router.now_s + known_after_s)
            case "kill all groups":
                self._note(kind)
                for each in groups:
                    each.kill()
            case "stop group" if group:
                for_s = draw.choice((0.5, 3.0, 8.0, 15.0)) * draw.uniform(0.5, 1.0)
                self._note(f"stop {name} for {for_s:.1f} s of the router's")
                group.stop(router.now_s + for_s)
            case "restart router":
                self._note(kind)
                router.restart()
            case "scale":
                num_groups = draw.randint(self._policy.smallest_num_groups, self._policy.largest_num_groups)
                self._note(f"scale to {num_groups}")
                router.do(lambda controller, epochs: controller.scale(num_groups))
            case "drain" if group and draw.random() < 0.3:
                self._note(f"the system wants {name} to end")
                group.leave()
            case "drain" if group:
                self._note(f"drain {name}")
                with suppress(ValueError):  # it has gone at this moment
                    router.do(lambda controller, epochs: controller.drain(name))
            case "rebalance":
                self._note(kind)
                router.do(lambda controller, epochs: controller.rebalance())
            case "skew load":
                shape = self._policy.num_layers, self._policy.num_experts
                load_LE = np.random.default_rng(draw.randrange(1000)).integers(0, 20_000, shape)
                self._note(kind)
                router.do(lambda it, epochs: it.saw_engine("another", it.epoch, load_LE, router.now_s))
            case "kill engine" if self._outcome.faults[kind] <= MOST_ENGINE_DEATHS:
                self._note(f"kill {engine.name}")
                fleet.add_engine()
                fleet.kill_engine(engine)
            case "deafen engine":
                self._note(f"{engine.name} {'no longer follows' if engine.placements.follows else 'follows'}")
                engine.placements.follows = not engine.placements.follows
            case "stranger" if group:
                self._note(f"a stranger at {name}: {self._visit(group.address)}")
            case _:
                self._outcome.faults[kind] -= 1

    def _visit(self, text: str) -> str:
        """Send something unfit to a group's port, and stay connected; return what it was."""
        address = Address.parse(text)
        kind = self._draw.choice(("noise", "silence", "half a hello", "a wrong secret", "unfit frames"))
        with suppress(OSError):  # LinkLost is one
            if kind == "a wrong secret":
                connect(address, b"guessed", "stranger", 1.0)
            elif kind == "unfit frames":
                link = connect(address, SECRET, "stranger", 1.0)
                self._strangers.append(link)
                link.post(Frame(Kind.TOKENS, 7, 1, b"?"))
                link.post(Frame(Kind.ROWS, 8, 1, b"???"))
                link.post(Frame(Kind.FETCH, 9, 99, bytes(4)))
            else:
                stranger = socket.create_connection((address.tcp_host, address.tcp_port), 1.0)
                self._strangers.append(stranger)
                if kind != "silence":
                    hello = b"TWHS" + bytes(10)
                    stranger.sendall(hello if kind == "half a hello" else secrets.token_bytes(300))
        return kind

    def _check_answers(self) -> None:
        self._outcome.num_requests = len(self._running)
        if wait([answer for _, answer in self._running], self._left_s).not_done:
            raise Hang(f"some requests do not end\n{self._fleet.describe()}")
        for request, answer in self._running:
            if error := answer.exception():
                self._outcome.problems.append(("failed", f"request {request.id}: {error!r}"))
            elif answer.result() != self._workload.answers[request.id]:
                expected = self._workload.answers[request.id]
                self._outcome.problems.append(
                    ("differing", f"request {request.id}: {answer.result()} instead of {expected}")
                )

    def _check_engines(self) -> None:
        for engine in self._fleet.engines:
            self._outcome.num_failovers += engine.dispatcher.counts.failovers
            self._outcome.num_adopted_blocks += engine.engine.stats().num_adopted_blocks
            if num_used := engine.engine.blocks.num_used:
                self._outcome.problems.append(("blocks", f"{engine.name} still holds {num_used}"))
            engine.engine.blocks.check()
