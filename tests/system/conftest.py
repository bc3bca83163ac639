"""One real deployment for most system tests: `tradewind serve configs/demo.yaml`, as a user starts it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.demo_deployment import REPOSITORY, Deployment, serving


@pytest.fixture(scope="session")
def deployment(sparse_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Serve the demo until the last test is done."""
    with serving(
        REPOSITORY / "configs" / "demo.yaml", tmp_path_factory.mktemp("serve") / "output"
    ) as running:
        yield running
