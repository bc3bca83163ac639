import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.router.served_experts import ServedGroup


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServedGroup]]:
    """Return a starter of expert groups, `serve(name, slots)`; they end with the test."""
    served: list[ServedGroup] = []

    def start(name: str, slots, **knobs) -> ServedGroup:
        served.append(ServedGroup(name, slots, tmp_path, **knobs))
        return served[-1]

    yield start
    for group in served:
        group.kill()


@pytest.fixture
def gate(serve) -> Iterator[Callable[[], threading.Event]]:
    """Return a maker of events for groups to wait for; all come when the test is over, so that groups end."""
    gates: list[threading.Event] = []

    def make() -> threading.Event:
        gates.append(threading.Event())
        return gates[-1]

    yield make
    for each in gates:
        each.set()


@pytest.fixture
def never(gate) -> threading.Event:
    return gate()
