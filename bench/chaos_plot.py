"""Tokens per second over time, one panel per fault."""

from collections.abc import Sequence
from pathlib import Path

from chaos_report import BIN_S, Run


def plot(path: Path, runs: Sequence[Run]) -> None:
    """Draw each run that a fault disturbed, from its first blow on; the undisturbed rate is a grey line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot without matplotlib: pip install -e '.[bench]'")
        return
    calm_tokens_per_s = {  # the last one counts
        run.shape: run.tokens_per_s(run.steady) for run in runs if not run.blows
    }
    disturbed = [run for run in runs if run.blows]
    if not disturbed:
        print("no plot: there was no fault")
        return
    figure = Figure(figsize=(10, 1.6 * len(disturbed) + 0.6), layout="constrained")
    panels = figure.subplots(len(disturbed), squeeze=False)[:, 0]
    for panel, run in zip(panels, disturbed, strict=True):
        first = run.blows[0].at
        rates = [tokens / BIN_S for tokens in run.tokens_per_bin()]
        times = [run.began_at - first + BIN_S * number for number in range(len(rates))]
        panel.axhline(calm_tokens_per_s[run.shape], color="0.7", linewidth=0.8)
        panel.step(times, rates, where="post", color="tab:blue", linewidth=1)
        for blow in run.blows:
            panel.axvline(blow.at - first, color="tab:red", linewidth=1)
            if blow.whole_at:
                panel.axvline(blow.whole_at - first, color="tab:green", linewidth=1, linestyle=":")
        panel.set_ylim(bottom=0)
        panel.set_title(run.name, loc="left", fontsize="small")
    panels[-1].set_xlabel("s from the first blow (red: a blow; green: whole again; grey: undisturbed)")
    figure.supylabel("tokens/s")
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")
