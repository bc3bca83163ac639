"""An engine that adopts another's copies, without a link between them."""

from collections.abc import Iterable

from cluster.engine.copies import BlockRun, Sent
from cluster.engine.engine import Engine


class AdoptingEngine:
    """Implements `Standby`: adopts at once what is sent, and answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.has_room = True
        self.runs: list[BlockRun] = []
        self._answers: list[tuple[Sent, int]] = []

    def send(self, run: BlockRun, note: Sent) -> None:
        assert run.rows_BN is None or self.has_room
        self.runs.append(run)
        self._answers.append((note, self.engine.adopt(run)))
        self.engine.blocks.check()

    def heard(self) -> list[tuple[Sent, int]]:
        heard, self._answers = self._answers, []
        return heard

    @property
    def num_adopted(self) -> int:
        return self.engine.stats().num_adopted_blocks

    @property
    def num_received(self) -> int:
        return sum(len(run.rows_BN) for run in self.runs if run.rows_BN is not None)


class AdoptingEngines:
    """Implements `Standbys`: one of them, or none, goes on with every answer."""

    def __init__(self, *engines: AdoptingEngine) -> None:
        self.engines = engines
        self.chosen: AdoptingEngine | None = engines[0]

    def all(self) -> Iterable[AdoptingEngine]:
        return self.engines

    def standby(self, answer_id: str) -> AdoptingEngine | None:
        return self.chosen
