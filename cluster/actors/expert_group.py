"""An expert group as a Ray actor: slots of expert weights behind links, and a lease on life."""

import logging
import os
import threading
import time
from pathlib import Path

from cluster.actors.node import listen
from cluster.actors.reports import GroupReport, Process
from cluster.metrics import ExpertMetrics
from router.placement import Group
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.kernels.cpu import set_threads

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
        self._model = model
        self._name = name
        # It shares the node's cores with engines that wait for it: it must not spin while it waits for them.
        set_threads(num_threads, spin_us=0)
        directory = Path(checkpoint)
        config = ModelConfig.from_checkpoint(directory)
        store = ExpertStore.load(Checkpoint(directory), config, slots, lambda done, total: None)
        self._slots = slots
        listener = listen(secret, name)
        self._group = Group(name, str(listener.address), self._slots)
        self._service = ExpertService(store, listener, self._slots, config.hidden_size)
        self._service.start()
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
        while time.monotonic() - self._renewed_at < LEASE_S or self._service.num_links:
            time.sleep(METRICS_PERIOD_S)
            for expert, num_rows in self._rows_by_expert().items():
                metrics.rows.labels(self._model, self._name, str(expert)).inc(
                    num_rows - counted.get(expert, 0)
                )
                counted[expert] = num_rows
        logger.warning("%s: no router and no engine for %s s; this group ends", self._name, LEASE_S)
        os._exit(0)
