"""A model's fleet in this process: real groups, engines, links and a journal around a real Controller."""

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

from router.controller import Controller
from router.epochs import Epochs
from router.policy import Policy
from tests.cluster.live_engine import LiveEngine, LiveEngines, LiveGateway
from tests.cluster.live_group import LiveGroup
from tests.cluster.live_router import LiveRouter
from tests.shards.tiny_models import TinyModel

SPARE_SLOTS = 2


class Hang(AssertionError):
    """Something did not come to pass in time; says what every thread was doing then."""

    def __init__(self, what: str) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"{names.get(ident, ident)}: "
            + " > ".join(
                f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_stack(frame)[-6:]
            )
            for ident, frame in sys._current_frames().items()
        ]
        super().__init__("\n  ".join((what, *stacks)))


class LiveFleet:
    """Call `close` in the end. For the thread of a test."""

    def __init__(self, model: TinyModel, policy: Policy, num_engines: int, directory: Path) -> None:
        self._model, self._policy, self._directory = model, policy, directory
        self._num_slots = policy.num_layers * policy.slots_per_layer + SPARE_SLOTS
        self._engine_numbers = count()
        self._engines = LiveEngines()
        for _ in range(num_engines):
            self.add_engine()
        self.gateway = LiveGateway(self._engines)
        self.router = LiveRouter(policy, self._start_group, self._engines)

    @property
    def engines(self) -> list[LiveEngine]:
        return self._engines.engines

    @property
    def groups(self) -> list[LiveGroup]:
        """Those that live, by name."""
        return [group for _, group in sorted(self.router.groups.items()) if not group.is_killed]

    def add_engine(self) -> None:
        engine = LiveEngine(f"engine {next(self._engine_numbers)}", self._model, self._directory)
        self._engines.replace([*self.engines, engine])

    def kill_engine(self, engine: LiveEngine) -> None:
        self._engines.replace([each for each in self.engines if each is not engine])
        engine.kill()

    def wait_until(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Raises Hang if it does not come to pass."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.router.failure:
                raise AssertionError("the router's thread failed") from self.router.failure
            if time.monotonic() > deadline:
                raise Hang(f"{what}: not within {timeout_s:g} s")
            time.sleep(0.002)

    def unsettled(self) -> str | None:
        """Say what is still to be done, if anything: a slot too few, a slot too many, old news."""
        report: str | None = self.router.do(self._unsettled)
        return report

    def describe(self) -> str:
        """Say who holds what, and who knows what."""

        def describe(controller: Controller, epochs: Epochs) -> str:
            lines = [f"{controller.progress(self.router.now_s)}", f"the router publishes {epochs.newest}"]
            lines += [
                f"{name} at {group.address} holds {sorted(group.store.held)} "
                f"and stages {sorted(group.stager.pending)}"
                for name, group in self.router.groups.items()
                if not group.is_killed
            ]
            lines += [f"{engine.name} knows {engine.placements.known}" for engine in self.engines]
            return "\n".join(lines)

        description: str = self.router.do(describe)
        return description

    def close(self) -> None:
        """End everything, and wait for it."""
        for engine in self.engines:
            self.kill_engine(engine)
        self.gateway.close()
        self.router.close()

    def _start_group(self, name: str) -> LiveGroup:
        return LiveGroup(name, self._model, self._num_slots, self._directory)

    def _unsettled(self, controller: Controller, epochs: Epochs) -> str | None:
        progress = controller.progress(self.router.now_s)
        if not progress.is_settled:
            return f"{progress}"
        listed = {group.name: frozenset(group.slots) for group in epochs.newest.groups}
        replicas = Counter(slot for slots in listed.values() for slot in slots)
        room = len(listed) * self._policy.slots_per_layer // self._policy.num_experts
        num_replicas = min(self._policy.min_replicas, len(listed), room)
        if len(replicas) < self._policy.num_layers * self._policy.num_experts:
            return f"only {sorted(replicas)} have a replica"
        if min(replicas.values()) < num_replicas:
            return f"some experts have less than {num_replicas} replicas: {replicas}"
        for name, group in self.router.groups.items():
            if pending := group.stager.pending:
                return f"{name} is still staging {sorted(pending)}"
            if (held := frozenset(group.store.held)) != listed.get(name, frozenset()):
                return f"{name} holds {sorted(held)}, but is asked for {sorted(listed.get(name, ()))}"
        for engine in self.engines:
            if engine.placements.known.epoch != epochs.newest.epoch:
                return f"{engine.name} knows epoch {engine.placements.known.epoch} of {epochs.newest.epoch}"
        return None
