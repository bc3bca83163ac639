"""Which placements engines still send rows by."""

from dataclasses import dataclass

ENGINE_TTL_S = 5.0  # an engine that has said nothing for this long uses no placement any more


@dataclass(frozen=True)
class _Engine:
    epoch: int
    seen_at: float


class EngineEpochs:
    """What each engine said last. Times are in seconds, of any clock that never goes back."""

    def __init__(self, now_s: float) -> None:
        self._began_at = now_s
        self._engines: dict[str, _Engine] = {}

    def saw(self, name: str, epoch: int, now_s: float) -> None:
        """Take an engine's word that it sends rows by this epoch, and by no older one any more."""
        self._engines[name] = _Engine(epoch, now_s)

    def all_use(self, epoch: int, now_s: float) -> bool:
        """Say whether no engine can use another placement than this one.

        One that was published by an earlier router has a higher epoch than the first of this one, 0.
        """
        if now_s - self._began_at < ENGINE_TTL_S:  # engines that we know nothing of yet may use anything
            return False
        for name in [n for n, engine in self._engines.items() if now_s - engine.seen_at > ENGINE_TTL_S]:
            del self._engines[name]
        return all(engine.epoch == epoch for engine in self._engines.values())
