"""What a run showed: one row of numbers, the bars that it holds or breaks, and a table for people."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chaos_load import Stream
from chaos_target import Blow

LEAD_S = 5.0  # of load before a fault: by then all streams have read their first prompts
SHORTEST_WINDOW_S = 5.0  # behind a blow, for tokens per second
BIN_S = 0.25

Answers = Mapping[int, tuple[tuple[str, float], ...]]  # index of the request -> tokens with logprobs


@dataclass(frozen=True)
class Run:
    """One load on one deployment, and what was done to it meanwhile."""

    name: str
    shape: str
    began_at: float
    streams: Sequence[Stream]
    blows: Sequence[Blow] = ()
    moved_bytes: int = 0
    trouble: str | None = None  # why it did not go as planned

    @property
    def end(self) -> float:
        """When the first stream found no more to ask for: from then on, fewer streams go on."""
        return max(stream.began_at for stream in self.streams)

    @property
    def window(self) -> tuple[float, float]:
        """From the first blow until all was whole again; without a blow, from when it would have come."""
        if not self.blows:
            return self.began_at + LEAD_S, self.end
        begin = self.blows[0].at
        return begin, max(begin + SHORTEST_WINDOW_S, *(blow.whole_at or self.end for blow in self.blows))

    def tokens_per_s(self) -> float:
        begin, end = self.window
        return sum(begin <= at < end for s in self.streams for at in s.token_times) / (end - begin)

    def longest_gap_s(self) -> float:
        """Between two tokens of one stream; of gaps that ended within the window, or behind it."""
        return max((gap for at, gap in self._gaps() if at >= self.window[0]), default=math.inf)

    def p99_gap_s(self) -> float:
        """Of the gaps of which some part is in the window."""
        begin, end = self.window
        gaps = sorted(gap for at, gap in self._gaps() if begin <= at < end + gap)
        return gaps[int(0.99 * len(gaps))] if gaps else math.inf

    def whole_after_s(self) -> float | None:
        """The longest time from a blow until all was whole; None if it never was."""
        times = [blow.whole_at - blow.at for blow in self.blows if blow.whole_at]
        return max(times, default=0.0) if len(times) == len(self.blows) else None

    def tokens_per_bin(self) -> list[int]:
        """Return how many tokens came in each BIN_S from the beginning."""
        times = [at - self.began_at for stream in self.streams for at in stream.token_times]
        bins = [0] * (int(max(times, default=0.0) / BIN_S) + 1)
        for at in times:
            bins[int(at / BIN_S)] += 1
        return bins

    def _gaps(self) -> list[tuple[float, float]]:
        return [gap for stream in self.streams for gap in stream.gaps()]


@dataclass(frozen=True)
class Row:
    """The numbers of one run beside those of the undisturbed one, called calm."""

    name: str
    shape: str
    requests: int
    failed: int
    num_503: int
    differing: int
    calm_gap_s: float
    gap_s: float
    gap_growth_s: float
    calm_p99_s: float
    p99_s: float
    first_token_s: float  # the longest that a stream waited for its first token
    tokens_per_s: float
    throughput_lost: float  # share of the calm tokens per second
    whole_after_s: float | None
    moved_bytes: int
    trouble: str | None


@dataclass(frozen=True)
class Bar:
    """What a run must hold."""

    text: str
    holds: Callable[[Row], bool]


PROMISES = (
    Bar("0 failed", lambda row: row.failed == 0),
    Bar("0 differing", lambda row: row.differing == 0),
)
WHOLE = Bar("whole again by itself", lambda row: row.whole_after_s is not None and row.trouble is None)


def make_row(run: Run, calm: Run, answers: Answers) -> Row:
    """Compare a run with the calm one of the same deployment, and with what was answered first of all."""
    waits = [stream.token_times[0] - stream.began_at for stream in run.streams if stream.token_times]
    return Row(
        name=run.name,
        shape=run.shape,
        requests=len(run.streams),
        failed=sum(stream.error is not None for stream in run.streams),
        num_503=sum(stream.status == 503 for stream in run.streams),
        differing=sum(difference(stream, answers) is not None for stream in run.streams),
        calm_gap_s=calm.longest_gap_s(),
        gap_s=run.longest_gap_s(),
        gap_growth_s=run.longest_gap_s() - calm.longest_gap_s(),
        calm_p99_s=calm.p99_gap_s(),
        p99_s=run.p99_gap_s(),
        first_token_s=max(waits, default=math.inf),
        tokens_per_s=run.tokens_per_s(),
        throughput_lost=1 - run.tokens_per_s() / calm.tokens_per_s(),
        whole_after_s=run.whole_after_s(),
        moved_bytes=run.moved_bytes,
        trouble=run.trouble,
    )


def difference(stream: Stream, answers: Answers) -> str | None:
    """Say where a stream is not as in `answers`; one that failed is compared as far as it came."""
    expected = answers.get(stream.request.index, ())
    for position, (ours, theirs) in enumerate(zip(stream.tokens, expected, strict=False)):
        if ours != theirs:
            return f"token {position} is {ours}, not {theirs}"
    if len(stream.tokens) > len(expected):
        return f"{len(stream.tokens)} tokens came, not {len(expected)}"
    return None


def complaints(run: Run, answers: Answers) -> list[dict[str, Any]]:
    """Describe each stream that failed or differs, as far as it takes to see it again."""
    found = []
    for stream in run.streams:
        differs = difference(stream, answers)
        if stream.error or differs:
            request = stream.request
            found.append(
                {
                    "request": request.index,
                    "seed": request.seed,
                    "temperature": request.temperature,
                    "began_s": round(stream.began_at - run.began_at, 2),
                    "tokens": len(stream.tokens),
                    "error": stream.error,
                    "difference": differs,
                }
            )
    return found


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("requests", lambda row: str(row.requests)),
    ("failed", lambda row: str(row.failed)),
    ("503s", lambda row: str(row.num_503)),
    ("differing", lambda row: str(row.differing)),
    (" longest gap, s", lambda row: f"{row.calm_gap_s:.2f} -> {row.gap_s:.2f}"),
    ("growth, ms", lambda row: f"{1e3 * row.gap_growth_s:+.0f}"),
    ("     p99 gap, s", lambda row: f"{row.calm_p99_s:.2f} -> {row.p99_s:.2f}"),
    ("tokens/s", lambda row: f"{row.tokens_per_s:.0f}"),
    ("lost", lambda row: f"{row.throughput_lost:.0%}"),
    ("whole after, s", lambda row: "never" if row.whole_after_s is None else f"{row.whole_after_s:.1f}"),
    ("moved, MB", lambda row: f"{row.moved_bytes / 1e6:.0f}"),
)
HEADER = f"{'':22}" + "".join(f"  {name}" for name, _ in _COLUMNS)


def line(row: Row) -> str:
    """Word a row for the table."""
    return f"{row.name:22}" + "".join(f"  {cell(row):>{len(name)}}" for name, cell in _COLUMNS)
