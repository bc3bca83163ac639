"""How far a model's expert groups are, in words."""

from collections.abc import Mapping
from typing import Any


def in_words(progress: Mapping[str, Any]) -> str:
    """Word the `progress` of /status: "2 of 4 groups live, 1 starting, 118 copies to go"."""
    groups = progress["groups"]
    parts = [f"{groups.get('live', 0)} of {counted(progress['wished_groups'], 'group')} live"]
    parts += [f"{number} {standing}" for standing, number in groups.items() if number and standing != "live"]
    if missing := progress["missing_replicas"]:
        parts.append(f"{counted(missing, 'copy', 'copies')} to go")
    if lost := progress["lost_experts"]:  # a draining group may have them still
        parts.append(f"{counted(lost, 'expert')} in no live group")
    if failure := progress.get("failure"):
        parts.append(f"but {failure}")
    return ", ".join(parts)


def counted(number: int, one: str, more: str | None = None) -> str:
    """Write a number of things."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"
