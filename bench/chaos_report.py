"""What a run showed: one row of numbers, the bars that it holds or breaks, and a table for people."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from chaos_load import Stream
from chaos_target import Blow

LEAD_S = 8.0  # of load before a fault: by then all streams have read their first prompts
BIN_S = 0.25

Answers = Mapping[int, tuple[tuple[str, float], ...]]  # index of the request -> tokens with logprobs


@dataclass(frozen=True)
class Window:
    """A time whose gaps and tokens are looked at."""

    begin: float
    end: float
    ends_in_harm: bool = False  # then a gap that lasts beyond the end belongs to what follows

    @property
    def length_s(self) -> float:
        return self.end - self.begin

    def has(self, begin: float, end: float) -> bool:
        """Say whether a gap belongs to it: one of which some part is in it."""
        return self.begin <= end and (end < self.end if self.ends_in_harm else begin < self.end)


@dataclass(frozen=True)
class Run:
    """One load on one deployment, and what was done to it meanwhile."""

    name: str
    shape: str
    began_at: float
    streams: Sequence[Stream]
    blows: Sequence[Blow] = ()
    struck: Sequence[Window] = ()  # of each time that the fault was done: to when all was whole again
    before_s: float = 0.0  # for so long before each of these, all was undisturbed
    shortest_s: float = 0.0  # so much from each blow on is looked at, also if all was whole sooner
    moved_bytes: int = 0
    trouble: str | None = None  # why it did not go as planned

    @property
    def steady(self) -> Window:
        """From when all streams have read their first prompts until the last stream begins."""
        return Window(self.began_at + LEAD_S, max(stream.began_at for stream in self.streams))

    @property
    def windows(self) -> list[Window]:
        """Each time that the fault was done; of an undisturbed run, all of it."""
        struck = [Window(each.begin, max(each.end, each.begin + self.shortest_s)) for each in self.struck]
        return struck or [self.steady]

    @property
    def calm_windows(self) -> list[Window]:
        """What was right before each of `windows`: as long, but at most `before_s`. Undisturbed: all of it.

        Not a run of its own: processors of one machine differ by a quarter from one minute to the next.
        """
        if not self.struck:
            return self.windows
        return [
            Window(each.begin - min(each.length_s, self.before_s), each.begin, ends_in_harm=True)
            for each in self.windows
        ]

    def tokens_per_s(self, window: Window) -> float:
        times = (at for stream in self.streams for at in stream.token_times)
        return sum(window.begin <= at < window.end for at in times) / window.length_s

    def longest_gap_s(self, window: Window) -> float:
        """Between two tokens of one stream, of the gaps that belong to the window."""
        return max(self._gaps(window), default=math.inf)

    def p99_gap_s(self, windows: Sequence[Window]) -> float:
        """Of all gaps that belong to any of the windows: one alone may have a few hundred."""
        gaps = sorted(gap for window in windows for gap in self._gaps(window))
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

    def _gaps(self, window: Window) -> list[float]:
        gaps = (each for stream in self.streams for each in stream.gaps())
        return [gap for at, gap in gaps if window.has(at - gap, at)]


@dataclass(frozen=True)
class Row:
    """The numbers of one run: medians over the times that the fault was done, but for p99, which is of all.

    What is called calm was right before it, and growth and loss are medians of the differences.
    """

    name: str
    shape: str
    requests: int
    failed: int
    num_503: int
    differing: int
    times: int
    calm_gap_s: float  # the longest
    gap_s: float
    gap_growth_s: float
    worst_gap_s: float  # of all times
    calm_p99_s: float
    p99_s: float
    p99_growth: float  # 0.1: by 10 %
    first_token_s: float  # the longest that a stream waited for its first token
    calm_tokens_per_s: float
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


def make_row(run: Run, answers: Answers) -> Row:
    """Compare a run with what was before each fault, and with what was answered first of all."""
    waits = [stream.token_times[0] - stream.began_at for stream in run.streams if stream.token_times]

    def both(measure: Callable[[Window], float]) -> tuple[list[float], list[float]]:
        return [*map(measure, run.calm_windows)], [*map(measure, run.windows)]

    calm_gaps_s, gaps_s = both(run.longest_gap_s)
    calm_p99_s, p99_s = run.p99_gap_s(run.calm_windows), run.p99_gap_s(run.windows)
    calm_rates, rates = both(run.tokens_per_s)
    return Row(
        name=run.name,
        shape=run.shape,
        requests=len(run.streams),
        failed=sum(stream.error is not None for stream in run.streams),
        num_503=sum(stream.status == 503 for stream in run.streams),
        differing=sum(difference(stream, answers) is not None for stream in run.streams),
        times=len(run.struck),
        calm_gap_s=median(calm_gaps_s),
        gap_s=median(gaps_s),
        gap_growth_s=median(gap - calm for gap, calm in zip(gaps_s, calm_gaps_s, strict=True)),
        worst_gap_s=max(gaps_s),
        calm_p99_s=calm_p99_s,
        p99_s=p99_s,
        p99_growth=p99_s / calm_p99_s - 1,
        first_token_s=max(waits, default=math.inf),
        calm_tokens_per_s=median(calm_rates),
        tokens_per_s=median(rates),
        throughput_lost=median(1 - rate / calm for rate, calm in zip(rates, calm_rates, strict=True)),
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
    ("times", lambda row: str(row.times)),
    (" longest gap, s", lambda row: f"{row.calm_gap_s:.2f} -> {row.gap_s:.2f}"),
    ("growth, ms", lambda row: f"{1e3 * row.gap_growth_s:+.0f}"),
    ("worst, s", lambda row: f"{row.worst_gap_s:.2f}"),
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
