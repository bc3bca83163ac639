"""An expert group as a Ray actor: slots of expert weights behind links."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from cluster.actors.process_log import log_to_stderr
from cluster.actors.reports import GroupReport, Process
from cluster.metrics import ExpertMetrics
from router.group_state import GroupState, Slot, Wish
from router.moves import StageOrder

logger = logging.getLogger(__name__)

METRICS_PERIOD_S = 1.0
# Nobody's child: a router may die and find its groups again. One that neither a router nor an engine has been
# linked to for this long ends itself.
LEASE_S = 30.0


class ExpertGroup:
    """Holds what the router tells it to hold, and serves rows until nobody is linked to it any more."""

    def __init__(
        self, model: str, name: str, checkpoint: str, num_slots: int, num_threads: int, secret: bytes
    ) -> None:
        log_to_stderr()
        self._model = model
        self._name = name
        # Not above: a router names this class, and needs no torch.
        from cluster.actors.expert_process import ExpertProcess

        self._process = ExpertProcess.start(name, Path(checkpoint), num_slots, num_threads, secret)
        self._wish = Wish(0, 0)
        self._is_leaving = False
        self._num_answers = 0
        self._answering = threading.Lock()
        self._leave_on_sigterm()
        threading.Thread(target=self._tick, name="lease", daemon=True).start()

    def state(self, wish: Wish, is_draining: bool) -> GroupState:
        """Return what is held and done here; remember how many groups there should be, whether to leave."""
        self._wish = max(self._wish, wish, key=lambda each: each.number)
        self._is_leaving |= is_draining
        return self._state()

    def stage(self, orders: tuple[StageOrder, ...]) -> GroupState:
        """Start to fill slots; return the new state at once."""
        self._process.stager.stage((order.layer, order.expert, order.peer) for order in orders)
        return self._state()

    def free(self, slots: Iterable[Slot]) -> GroupState:
        """Free slots, also those that are only being filled; return the new state."""
        self._process.stager.free(slots)
        return self._state()

    def share(self, num_groups: int) -> GroupState:
        """Use the cores that each of `num_groups` groups on this host has; return the new state."""
        self._process.share_cores(num_groups)
        return self._state()

    def report(self) -> GroupReport:
        """Return what this group holds and has done, for people."""
        layers: dict[int, int] = {}
        for _, expert in self._process.store.held:
            layers[expert] = layers.get(expert, 0) + 1
        return GroupReport(
            Process.this("ExpertGroup", self._name),
            dict(sorted(layers.items())),
            self._rows_by_expert(),
            self._process.service.num_links,
            self._process.num_threads,
        )

    def _state(self) -> GroupState:
        stager, service = self._process.stager, self._process.service
        with self._answering:  # calls run side by side, and a higher number says what is newer
            self._num_answers += 1
            # Before `held`: what moves from here to there meanwhile must be in one of them.
            staging = stager.pending
            held = frozenset(self._process.store.held)
            return GroupState(
                name=self._name,
                address=self._process.address,
                num_slots=self._process.store.num_slots,
                held=held,
                staging=staging - held,
                staged_bytes=stager.staged_bytes,
                busy_s=service.busy_s,
                abreast=self._process.abreast,
                num_sharing=self._process.num_sharing,
                wish=self._wish,
                is_leaving=self._is_leaving,
                failure=stager.last_failure,
                number=self._num_answers,
            )

    def _rows_by_expert(self) -> dict[int, int]:
        rows: dict[int, int] = {}
        for (_, expert), num_rows in self._process.service.rows_per_expert.items():
            rows[expert] = rows.get(expert, 0) + num_rows
        return dict(sorted(rows.items()))

    def _leave_on_sigterm(self) -> None:
        """Ask to be drained when the system wants this process to end; it has some time to do so."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "_is_leaving", True))

    def _tick(self) -> None:
        metrics = ExpertMetrics()
        counted: dict[int, int] = {}
        linked_at = time.monotonic()
        while self._process.service.is_serving:
            if self._process.service.num_links:
                linked_at = time.monotonic()
            if time.monotonic() - linked_at > LEASE_S:
                logger.warning("%s: no router and no engine for %s s; this group ends", self._name, LEASE_S)
                os._exit(0)
            time.sleep(METRICS_PERIOD_S)
            for expert, num_rows in self._rows_by_expert().items():
                rows = metrics.rows.labels(self._model, self._name, str(expert))
                rows.inc(num_rows - counted.get(expert, 0))
                counted[expert] = num_rows
        logger.error("%s: its service has ended, and so does this group", self._name)
        os._exit(1)
