"""What processes say about themselves, on its way to `tradewind status`. Sent through Ray, once a second."""

import os
from dataclasses import dataclass

from cluster.actors.node import node_address
from router.controller import Progress


@dataclass(frozen=True)
class Process:
    """Who and where."""

    kind: str  # Gateway, Engine, Shard, ExpertGroup, Router
    name: str
    pid: int
    node: str

    @classmethod
    def this(cls, kind: str, name: str) -> "Process":
        return cls(kind, name, os.getpid(), node_address())


@dataclass(frozen=True)
class EngineReport:
    """One engine's state."""

    process: Process
    epoch: int  # of the placement that it uses; 0: its experts are inside
    num_running: int
    num_waiting: int
    used_blocks: int
    total_blocks: int
    tokens_per_s: float  # generated, over the last seconds
    shards: tuple[Process, ...] = ()  # ranks 1 and up, if it has more ranks than its own
    copies_address: str | None = None  # where other engines may send copies of their KV blocks


@dataclass(frozen=True)
class GroupReport:
    """One expert group's state."""

    process: Process
    experts: dict[int, int]  # expert -> layers of it that are held here
    rows: dict[int, int]  # expert -> rows computed since the group started, over all layers
    num_links: int
    num_threads: int  # that it computes with


@dataclass(frozen=True)
class ModelReport:
    """One model, as its router sees it."""

    model: str
    epoch: int
    router: Process
    engines: tuple[EngineReport, ...] = ()
    groups: tuple[GroupReport, ...] = ()
    progress: Progress | None = None  # None: the experts are inside the engines
