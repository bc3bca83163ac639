"""Does anything survive what it should not, or not survive what it should?

    .venv/bin/python bench/fault_sequences.py --seeds 200
    .venv/bin/python bench/fault_sequences.py --seeds 1 --first 59 --story

Each seed is a fleet of real expert groups, engines, links, a journal and a router, in threads of this
process, and a random sequence of faults under load (tests/cluster/fault_sequence.py). Every answer must be
the undisturbed one, bit for bit, and nothing may be left behind. The exit code is 1 if something is wrong.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from about import describe_run

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests are not installed

from shards.kernels.cpu import set_threads
from tests.cluster.fault_sequence import Outcome, run_sequence
from tests.cluster.workload import Workload
from tests.shards.tiny_models import TinyModel, save_random_model

WARM_UP = 10  # sequences, before memory is looked at
PROBLEMS = ("failed", "differing", "hang", "broken", "blocks", "threads", "fds")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run random sequences of faults against a tiny fleet.")
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--story", action="store_true", help="tell what happened in each")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()

    about = describe_run()
    logging.disable(logging.CRITICAL)  # every fault is logged, as it should be
    set_threads(1, spin_us=0)
    torch.set_num_threads(1)
    started_at, started_cpu_s = time.monotonic(), time.process_time()
    outcomes, megabytes = [], []
    with tempfile.TemporaryDirectory() as directory:
        save_random_model("mixtral", torch.bfloat16, Path(directory, "model"))
        workload = Workload.make(TinyModel(Path(directory, "model")))
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            outcomes.append(run_sequence(seed, workload, Path(directory, "sockets")))
            megabytes.append(_resident_mb())
            if outcomes[-1].problems or arguments.story:
                print(f"\n{outcomes[-1].story()}", flush=True)
            _show_progress(len(outcomes), arguments.seeds)

    results = _results(outcomes, megabytes)
    results["wall time, s"] = round(time.monotonic() - started_at, 1)
    results["CPU time, s"] = round(time.process_time() - started_cpu_s, 1)
    print()
    for name, value in results.items():
        print(f"{name:28}{value}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=1))
    sys.exit(1 if results["seeds that failed"] else 0)


def _results(outcomes: list[Outcome], megabytes: list[float]) -> dict[str, object]:
    faults = sum((outcome.faults for outcome in outcomes), Counter[str]())
    problems = Counter(kind for outcome in outcomes for kind, _ in outcome.problems)
    seconds = sorted(outcome.seconds for outcome in outcomes)
    return {
        "sequences": len(outcomes),
        **{f"  {kind}": number for kind, number in faults.most_common()},
        "faults": faults.total(),
        "requests": sum(outcome.num_requests for outcome in outcomes),
        "tokens": sum(outcome.num_tokens for outcome in outcomes),
        "resubmissions": sum(outcome.num_resubmissions for outcome in outcomes),
        "failovers": sum(outcome.num_failovers for outcome in outcomes),
        "adopted blocks": sum(outcome.num_adopted_blocks for outcome in outcomes),
        **{f"wrong: {kind}": problems[kind] for kind in PROBLEMS},
        "MB grown": round(megabytes[-1] - megabytes[min(WARM_UP, len(megabytes) - 1)], 1),
        "median sequence, s": round(seconds[len(seconds) // 2], 2),
        "longest sequence, s": round(seconds[-1], 2),
        "seeds that failed": [outcome.seed for outcome in outcomes if outcome.problems],
    }


def _resident_mb() -> float:
    """Return what this process holds of the machine's memory, without what it has freed and not returned."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process(os.getpid()).memory_info().rss / 1e6


def _show_progress(done: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\r{done} of {total}", end="", flush=True)


if __name__ == "__main__":
    main()
