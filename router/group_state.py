"""What an expert group says of itself, several times a second."""

from dataclasses import dataclass

Slot = tuple[int, int]  # what a slot holds: (layer, expert)


@dataclass(frozen=True)
class Wish:
    """How many expert groups there should be; of two wishes, the one with the higher number counts.

    Groups repeat the last one that they heard, so that it outlives the router.
    """

    number: int
    num_groups: int


@dataclass(frozen=True)
class StagedBytes:
    """Bytes of weights that a group has got into its slots since it started, by where they came from."""

    peer: int = 0  # copied from another group
    checkpoint: int = 0
    shared: int = 0  # not copied: they lie in memory that is another group's, too


@dataclass(frozen=True)
class GroupState:
    """One group's answer to a router's heartbeat."""

    name: str
    address: str  # str(Address) of its listener
    num_slots: int
    held: frozenset[Slot]  # ready to be run
    staging: frozenset[Slot]  # asked for, and not there yet
    busy_s: float  # spent computing since it started
    wish: Wish
    staged_bytes: StagedBytes = StagedBytes()
    is_leaving: bool = False  # its system (SIGTERM) or a router wants it to end; it serves until it is let go
    failure: str | None = None  # why something that it was told to stage is not there
    number: int = 0  # counts its answers: of two, the one with the higher number was given later
    abreast: int | None = None  # groups like it that its host's cores can run at once; None: any number
    num_sharing: int = 1  # groups that its host's cores are for, itself included, as it was told last
