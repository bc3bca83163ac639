"""One real deployment for most system tests: `tradewind serve configs/demo.yaml`, as a user starts it."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.demo_deployment import REPOSITORY, Deployment, serving

RAY_SESSIONS = Path("/tmp/ray")
LOG_AGE_S = 300.0  # what was written to later than this may have to do with a failure
MAX_LOG_LINES = 15  # of all processes together, in the report of a failure
TROUBLE = re.compile(r"\b(WARNING|ERROR|Error|Traceback|lost|refused|killed)\b")


@pytest.fixture(scope="session")
def deployment(sparse_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Serve the demo until the last test is done."""
    with serving(
        REPOSITORY / "configs" / "demo.yaml", tmp_path_factory.mktemp("serve") / "output"
    ) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to a failure what the deployments' processes had to say: they are gone when someone reads it."""
    report = yield
    if report.failed and item.path.is_relative_to(Path(__file__).parent):
        report.sections.append(("last words of the processes", "\n".join(_last_words())))
    return report


def _last_words() -> list[str]:
    """Return the lines of trouble in the logs of Ray's processes that were written to lately."""
    lines = []
    for path in RAY_SESSIONS.glob("session_2*/logs/*.err"):
        if time.time() - path.stat().st_mtime < LOG_AGE_S:
            words = path.read_text(errors="replace").splitlines()
            pid = path.stem.rpartition("-")[2]
            lines += [f"{pid}: {line}"[:300] for line in words if TROUBLE.search(line)]
    return lines[-MAX_LOG_LINES:]
