"""What a shard is told when it is made."""

from dataclasses import dataclass

MEET_TIMEOUT_S = 120.0  # until all ranks' processes run: Ray may have to find or start a node first


@dataclass(frozen=True)
class ShardSeat:
    """Which rank a shard is, and where the others are."""

    name: str
    rank: int
    size: int
    num_blocks: int
    meeting_point: tuple[str, int]  # of the tensor group: host and port
    engine_address: str  # str(Address) of the engine's listener
