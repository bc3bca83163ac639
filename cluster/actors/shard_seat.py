"""What a shard is told when it is made."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardSeat:
    """Which rank a shard is, and where the others are."""

    name: str
    rank: int
    num_blocks: int
    meeting_point: tuple[str, int]  # of the tensor group: host and port
    engine_address: str  # str(Address) of the engine's listener
