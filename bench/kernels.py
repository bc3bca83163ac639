"""How fast are our CPU kernels, and whose results depend on the batch? Ours beside torch's, in one run.

    python bench/kernels.py                      # all tables
    python bench/kernels.py --tables rows        # only: linear, experts, attention or rows
    python bench/kernels.py --json kernels.json  # the same for programs

Times are the best of several tries in wall clock: run it on an idle machine. GB/s counts each weight (or each
cached key and value) once, which is what memory must deliver; torch is given what it would use itself, bf16
or fp32 weights with activations of the same dtype, and contiguous keys and values instead of blocks.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from about import describe_run
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from shards.kernels import cpu
from shards.kv_cache import BLOCK_SIZE

# N x K: of SmolLM2-135M (qkv, out, gate and up, down, head), and of models a hundred times larger.
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (4096, 4096), (14336, 4096))
ROWS = (1, 2, 8, 32, 256, 1024)
MAX_TERAFLOP = 0.04  # per call; larger products say nothing new, and take long
# heads, KV heads, head_dim, chunks, tokens of each chunk, context.
ATTENTIONS = (
    (9, 3, 64, 1, 1, 512),
    (9, 3, 64, 1, 1, 4096),
    (9, 3, 64, 32, 1, 512),
    (9, 3, 64, 1, 1500, 1500),
    (32, 8, 128, 1, 1, 4096),
    (32, 8, 128, 1, 1500, 1500),
)
# Experts, hidden and intermediate size: of the demo model; rows of each expert, of a token's two, at random.
EXPERTS = (8, 576, 1536)
EXPERT_ROWS = (2, 16, 32, 64, 256, 1024)
BATCHES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 100, 128, 200, 256, 300, 512)
SPIN_US = 100

Row = dict[str, str | int | float]
Packed = tuple[cpu.PackedWeight, cpu.PackedWeight]  # gate and up; down


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure our CPU kernels beside torch's.")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()

    about = describe_run()
    results: dict[str, list[Row]] = {}
    for name in arguments.tables:
        results[name] = print_table(name, TABLES[name](arguments.threads))
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, **results}, indent=1))


def linear_table(threads: list[int]) -> Iterator[Row]:
    for num_threads in threads:
        use_threads(num_threads)
        for n, k in SHAPES:
            weight = torch.randn(n, k).bfloat16()
            for dtype in (torch.bfloat16, torch.float32):
                typed = weight.to(dtype)
                packed = cpu.pack(typed)
                for rows in ROWS:
                    if 2 * rows * n * k > MAX_TERAFLOP * 1e12:
                        continue
                    x = torch.randn(rows, k)
                    x_typed = x.to(dtype)
                    ours_s, torch_s = best_times(
                        partial(cpu.linear, x, packed), partial(linear, x_typed, typed)
                    )
                    yield {
                        "threads": num_threads,
                        "N": n,
                        "K": k,
                        "weights": str(dtype).removeprefix("torch."),
                        "M": rows,
                        "ours us": ours_s * 1e6,
                        "torch us": torch_s * 1e6,
                        "ours GB/s": n * k * dtype.itemsize / ours_s / 1e9,
                        "torch GB/s": n * k * dtype.itemsize / torch_s / 1e9,
                        "ours GFLOP/s": 2 * rows * n * k / ours_s / 1e9,
                        "torch GFLOP/s": 2 * rows * n * k / torch_s / 1e9,
                        "speedup": torch_s / ours_s,
                    }


def experts_table(threads: list[int]) -> Iterator[Row]:
    """Time the experts of a layer: all in one call, one call for each, and each by torch."""
    num_experts, hidden, inner = EXPERTS
    layers = 16  # in turn, so that no weight is in a cache
    weights = torch.randn(layers, num_experts, 3 * inner, hidden).bfloat16()
    packed = [
        [(cpu.pack(each[: 2 * inner]), cpu.pack(each[2 * inner :].T.contiguous())) for each in layer]
        for layer in weights
    ]
    for num_threads in threads:
        use_threads(num_threads, spin_us=0)  # as in an expert group
        for rows in EXPERT_ROWS:
            seeded = torch.Generator().manual_seed(rows)
            chosen = torch.randint(num_experts, (rows,), generator=seeded)
            counts = chosen.bincount(minlength=num_experts).tolist()
            x, out = torch.randn(rows, hidden), torch.empty(rows, hidden)

            runs = (counts, x, out)
            calls = (
                partial(together, packed, *runs),
                partial(each, packed, *runs),
                partial(by_torch, weights, *runs),
            )
            together_s, each_s, torch_s = (best_s / layers for best_s in best_times(*calls))
            used = sum(map(bool, counts))
            yield {
                "threads": num_threads,
                "rows": rows,
                "experts used": used,
                "one call us": together_s * 1e6,
                "a call each us": each_s * 1e6,
                "torch us": torch_s * 1e6,
                "one call GB/s": used * 3 * inner * hidden * 2 / together_s / 1e9,
                "against a call each": each_s / together_s,
                "speedup": torch_s / together_s,
            }


def together(packed: list[list[Packed]], counts: list[int], x: Tensor, out: Tensor) -> None:
    for layer in packed:
        parts = [(count, *expert) for count, expert in zip(counts, layer, strict=True) if count]
        cpu.gated_mlps(x, parts, out)


def each(packed: list[list[Packed]], counts: list[int], x: Tensor, out: Tensor) -> None:
    for layer in packed:
        split = zip(counts, layer, x.split(counts), out.split(counts), strict=True)
        for count, expert, x_part, out_part in split:
            if count:
                cpu.gated_mlps(x_part, [(count, *expert)], out_part)


def by_torch(weights: Tensor, counts: list[int], x: Tensor, out: Tensor) -> None:
    inner = weights.size(2) // 3
    for layer in weights:
        split = zip(layer, x.bfloat16().split(counts), out.split(counts), strict=True)
        for expert, x_part, out_part in split:
            if len(x_part):
                gate, up = linear(x_part, expert[: 2 * inner]).chunk(2, dim=1)
                out_part.copy_(linear(silu(gate) * up, expert[2 * inner :].T))


def attention_table(threads: list[int]) -> Iterator[Row]:
    for num_threads in threads:
        use_threads(num_threads)
        for heads, kv_heads, dim, chunks, tokens, context in ATTENTIONS:
            width = -(-context // BLOCK_SIZE)
            table = torch.randperm(chunks * width).view(chunks, width).int()
            starts = (torch.arange(chunks + 1) * tokens).int()
            spans = cpu.Spans(starts, torch.full((chunks,), context - tokens, dtype=torch.int32), table)
            keys = torch.randn(chunks * width, kv_heads, dim, BLOCK_SIZE)
            values = torch.randn(chunks * width, kv_heads, BLOCK_SIZE, dim)
            q = torch.randn(chunks * tokens, heads * dim)
            q_torch = torch.randn(chunks, heads, tokens, dim)
            k_torch, v_torch = torch.randn(2, chunks, kv_heads, context, dim)
            ours_s, torch_s = best_times(
                partial(cpu.attention, q, spans, keys, values, heads, dim**-0.5, None),
                partial(
                    scaled_dot_product_attention,
                    q_torch,
                    k_torch,
                    v_torch,
                    is_causal=tokens > 1,
                    enable_gqa=True,
                ),
            )
            first = context - tokens + 1
            flop = 4 * chunks * heads * dim * (first + context) * tokens / 2
            cache_bytes = 2 * 4 * chunks * kv_heads * dim * context
            yield {
                "threads": num_threads,
                "heads": f"{heads}/{kv_heads}x{dim}",
                "chunks": chunks,
                "tokens": tokens,
                "context": context,
                "ours us": ours_s * 1e6,
                "torch us": torch_s * 1e6,
                "ours GB/s": cache_bytes / ours_s / 1e9,
                "torch GB/s": cache_bytes / torch_s / 1e9,
                "ours GFLOP/s": flop / ours_s / 1e9,
                "torch GFLOP/s": flop / torch_s / 1e9,
                "speedup": torch_s / ours_s,
            }


def rows_table(threads: list[int]) -> Iterator[Row]:
    """Count the batch sizes M at which the first or last M rows come out other than in the batch of 512."""

    def differing(multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> str:
        whole = multiply(x)
        bad = []
        for m in BATCHES:
            first, last = x[:m].contiguous(), x[-m:].contiguous()
            if not torch.equal(multiply(first), whole[:m]) or not torch.equal(multiply(last), whole[-m:]):
                bad.append(m)
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        return f"{len(bad)} of {len(BATCHES)}" + (f": {shown}" if bad else "")

    for n, k in SHAPES[:4]:
        for dtype in (torch.bfloat16, torch.float32):
            weight = torch.randn(n, k).to(dtype)
            packed, x = cpu.pack(weight), torch.randn(512, k)
            for num_threads in threads:
                use_threads(num_threads)
                yield {
                    "N": n,
                    "K": k,
                    "weights": str(dtype).removeprefix("torch."),
                    "threads": num_threads,
                    "M that differ, ours": differing(partial(cpu.linear, weight=packed), x),
                    "M that differ, torch": differing(partial(linear, weight=weight), x.to(dtype)),
                }


TABLES: dict[str, Callable[[list[int]], Iterator[Row]]] = {
    "linear": linear_table,
    "experts": experts_table,
    "attention": attention_table,
    "rows": rows_table,
}


def use_threads(num_threads: int, spin_us: int = SPIN_US) -> None:
    torch.set_num_threads(num_threads)
    cpu.set_threads(num_threads, spin_us)


def best_times(*calls: Callable[[], object], tries: int = 5, try_s: float = 0.03) -> list[float]:
    """Return the seconds of each call's best try; the calls take turns, so that both see the same machine."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(tries):
        for i, call in enumerate(calls):
            count, start, elapsed = 0, time.perf_counter(), 0.0
            while elapsed < try_s:
                call()
                count, elapsed = count + 1, time.perf_counter() - start
            best[i] = min(best[i], elapsed / count)
    return best


def print_table(name: str, rows: Iterator[Row]) -> list[Row]:
    done: list[Row] = []
    for row in rows:
        if not done:
            print(f"\n{name}\n| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        cells = (f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |", flush=True)
        done.append(row)
    return done


if __name__ == "__main__":
    main()
