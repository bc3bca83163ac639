"""What does it cost, and what does it bring, to divide an engine among processes of one machine?

    python bench/tensor_parallel.py                 # the dense demo model, one and two ranks
    python bench/tensor_parallel.py --json tp.json  # the same for programs

Two tables: one exchange of a few rows among the ranks, and whole steps, without the engine around them. Times
are wall clock on rank 0, best and median. Run it on an idle machine: ranks wait for each other many times in
a step, so each pays for whatever else the others' cores do.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import Queue
from pathlib import Path

import torch
from about import describe_run

from cluster.actors.rank import SPIN_US_ALONE
from cluster.demo import DENSE
from cluster.demo.build import build
from router.groups.base import TensorGroup
from router.groups.gloo import GlooGroup, MeetingPoint
from router.groups.single import SingleRank
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.home import default_home
from shards.kernels.cpu import set_threads
from shards.kv_cache import BLOCK_SIZE
from shards.shard import load_shard
from shards.step import Chunk, StepBatch

HOST = "127.0.0.1"
CONTEXT = 64  # tokens that every sequence has before the measured step
EXCHANGED_ROWS = (1, 8, 32, 512)
SEQUENCES = (1, 8)  # that decode in one step
PROMPT = 256
LAYOUTS = ((1, 1), (1, 2), (2, 1))  # ranks, threads of each

Row = dict[str, str | int | float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tensor parallelism over gloo.")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()

    about = describe_run()
    checkpoint = build(DENSE, default_home(), lambda what, done, total: None)
    exchanges = run_ranks(2, measure_exchanges, checkpoint, 1)
    print_table(exchanges)
    steps = [row for size, threads in LAYOUTS for row in run_ranks(size, measure_steps, checkpoint, threads)]
    print_table(steps)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "exchanges": exchanges, "steps": steps}, indent=1))


Measure = Callable[[TensorGroup, Path, int], list[Row]]


def run_ranks(size: int, measure: Measure, checkpoint: Path, threads: int) -> list[Row]:
    """Run `measure` on `size` processes at once; return what rank 0 found."""
    meeting_point, context = MeetingPoint(HOST), multiprocessing.get_context("spawn")
    results: Queue[list[Row]] = context.Queue()
    arguments = measure, size, meeting_point.address, checkpoint, threads, results
    processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        return results.get(timeout=600)
    finally:
        for process in processes:
            process.join(60)
            process.kill()


def run_rank(
    rank: int,
    measure: Measure,
    size: int,
    meeting_point: tuple[str, int],
    checkpoint: Path,
    threads: int,
    results: "Queue[list[Row]]",
) -> None:
    torch.set_num_threads(1)
    set_threads(threads, SPIN_US_ALONE if size == 1 else 0)
    group = GlooGroup(meeting_point, rank, size, HOST) if size > 1 else SingleRank()
    rows = measure(group, checkpoint, threads)
    if rank == 0:
        results.put(rows)


def measure_exchanges(group: TensorGroup, checkpoint: Path, threads: int) -> list[Row]:
    hidden = ModelConfig.from_checkpoint(checkpoint).hidden_size
    rows: list[Row] = []
    for num_rows in EXCHANGED_ROWS:
        x_TD = torch.randn(num_rows, hidden)
        times = measure_s(partial(group.all_reduce, x_TD), 300 if num_rows < 100 else 50)
        rows.append({"rows": num_rows, "bytes": x_TD.nbytes, **in_units("us", 1e6, times)})
    return rows


def measure_steps(group: TensorGroup, checkpoint: Path, threads: int) -> list[Row]:
    config = ModelConfig.from_checkpoint(checkpoint)
    num_blocks = max(max(SEQUENCES) * blocks_for(CONTEXT + 1), blocks_for(PROMPT))
    shard = load_shard(Checkpoint(checkpoint), config, None, num_blocks, lambda done, total: None, group)
    steps = {}
    for count in SEQUENCES:
        shard.run(StepBatch(tuple(chunk(index, 0, CONTEXT) for index in range(count))))
        steps[f"decode {count}"] = StepBatch(tuple(chunk(index, CONTEXT, 1) for index in range(count)))
    prompt = Chunk(tuple(range(PROMPT)), 0, tuple(range(blocks_for(PROMPT))), wants_logits=True)
    steps[f"prompt {PROMPT}"] = StepBatch((prompt,))
    return [
        {
            "ranks": group.size,
            "threads of each": threads,
            "step": name,
            **in_units(
                "ms", 1e3, measure_s(partial(shard.run, step), 5 if name.startswith("prompt") else 30)
            ),
        }
        for name, step in steps.items()
    ]


def chunk(sequence: int, start: int, num_tokens: int) -> Chunk:
    size = blocks_for(CONTEXT + 1)
    blocks = tuple(range(sequence * size, (sequence + 1) * size))
    return Chunk(tuple(range(100, 100 + num_tokens)), start, blocks[: blocks_for(start + num_tokens)], True)


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def measure_s(do: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count + 3):
        started_at = time.perf_counter()
        do()
        times.append(time.perf_counter() - started_at)
    return times[3:]


def in_units(unit: str, factor: float, times: list[float]) -> Row:
    return {
        f"best {unit}": round(factor * min(times), 2),
        f"median {unit}": round(factor * statistics.median(times), 2),
    }


def print_table(rows: list[Row]) -> None:
    print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
