import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards.background import import_stepped_back, step_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a weight")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_that_steps_back_leaves_the_others_where_they_are():
    before = niceness()

    def work() -> int:
        step_back()
        return niceness()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() > before
    assert niceness() == before


def test_a_module_is_imported_at_a_lower_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import os, threading\nniceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = niceness()
    import_stepped_back("slow_to_import")
    assert sys.modules.pop("slow_to_import").niceness > before
    assert niceness() == before
