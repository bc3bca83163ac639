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
