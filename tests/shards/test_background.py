import os
import subprocess
import sys
import threading

import pytest

from shards.background import in_foreground
from tests.stepped_back import made_stepped_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a weight")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_that_steps_back_leaves_the_others_where_they_are():
    before = niceness()
    assert made_stepped_back(niceness) > before
    assert niceness() == before


def test_what_a_process_starts_in_the_foreground_stays_where_the_process_was():
    program = """
import os, threading
from shards.background import in_foreground, step_back_whole

def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

def of_a_thread(start):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(niceness()))
    start(thread.start)
    thread.join()
    return seen[0]

step_back_whole()
print(niceness(), of_a_thread(lambda start: start()), of_a_thread(in_foreground))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    main, ordinary, in_front = map(int, ran.stdout.split())
    assert in_front == niceness()
    assert main == ordinary > in_front


def test_what_goes_wrong_in_the_foreground_is_raised():
    with pytest.raises(ZeroDivisionError):
        in_foreground(lambda: 1 // 0)
