"""An expert group as a Ray actor: slots of expert weights behind links, and a lease on life."""

import logging
import os
import threading
import time
from pathlib import Path

from cluster.actors.reports import GroupReport, Process
from cluster.metrics import ExpertMetrics
from router.placement import Group

logger = logging.getLogger(__name__)

METRICS_PERIOD_S = 1.0
# Nobody's child: a router may die and find its groups again. One that nobody has asked for in this long,
# and that no engine is linked to, ends itself.
LEASE_S = 30.0


class ExpertGroup:
    """Reads its experts from the checkpoint, then serves rows until its lease runs out."""

    def __init__(
        self,
        model: str,
        name: str,
        checkpoint: str,
        slots: tuple[tuple[int, int], ...],
        num_threads: int,
        secret: bytes,
    ) -> None:
        # Not above: a router names this class, and needs no torch.
        from cluster.actors.expert_process import start_service

        self._model = model
        self._name = name
        self._slots = slots
        self._service, self._group = start_service(name, Path(checkpoint), slots, num_threads, secret)
        self._renewed_at = time.monotonic()
        threading.Thread(target=self._tick, name="lease", daemon=True).start()

    def renew_lease(self) -> Group:
        """Live on, and say what is held here and where links may connect."""
        self._renewed_at = time.monotonic()
        return self._group

    def report(self) -> GroupReport:
        """Return what this group holds and has done."""
        experts: dict[int, int] = {}
        for _, expert in self._slots:
            experts[expert] = experts.get(expert, 0) + 1
        return GroupReport(
            Process.this("ExpertGroup", self._name), experts, self._rows_by_expert(), self._service.num_links
        )

    def _rows_by_expert(self) -> dict[int, int]:
        rows: dict[int, int] = {}
        for (_, expert), num_rows in zip(self._slots, self._service.rows_per_slot, strict=True):
            rows[expert] = rows.get(expert, 0) + num_rows
        return rows

    def _tick(self) -> None:
        metrics = ExpertMetrics()
        counted: dict[int, int] = {}
        while self._service.is_serving:
            if time.monotonic() - self._renewed_at > LEASE_S and not self._service.num_links:
                logger.warning("%s: no router and no engine for %s s; this group ends", self._name, LEASE_S)
                os._exit(0)
            time.sleep(METRICS_PERIOD_S)
            for expert, num_rows in self._rows_by_expert().items():
                rows = metrics.rows.labels(self._model, self._name, str(expert))
                rows.inc(num_rows - counted.get(expert, 0))
                counted[expert] = num_rows
        logger.error("%s: its service has ended, and so does this group", self._name)
        os._exit(1)
