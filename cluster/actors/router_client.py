"""An engine's view of its router: the newest placement, and a place to report to."""

import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.exceptions import RayServeException

from cluster.actors.reports import EngineReport, ModelReport
from router.controller import Progress
from router.placement import Placement
from router.pushed_placements import PushedPlacements

logger = logging.getLogger(__name__)

ROUTER = "Router"  # its name as a deployment actor
POLL_TIMEOUT_S = 10.0  # of one long poll
REPORT_TIMEOUT_S = 2.0
RETRY_S = 0.2


class RouterClient:
    """Follows the router of this replica's deployment.

    The router may be killed and made again: every call looks its handle up anew, and `placements` go on
    being served from here meanwhile.
    """

    def __init__(self) -> None:
        self.placements = PushedPlacements()
        self._failure: str | None = None  # why there will never be a placement
        self._first = threading.Event()  # a placement has come, or a failure
        threading.Thread(target=self._follow, name="follow-router", daemon=True).start()

    def wait_first(self, timeout_s: float) -> None:
        """Wait until there is a placement. Raises ValueError with the reason if there will be none."""
        self._first.wait(timeout_s)
        if self.placements.current().epoch == 0:
            raise ValueError(self._failure or f"the expert groups were not there within {timeout_s:g} s")

    def report_every(
        self,
        period_s: float,
        make_report: Callable[[], tuple[EngineReport, NDArray[np.int64] | None]],
        follow_engines: Callable[[dict[str, str]], None],
    ) -> None:
        """Report to the router now and then, from a thread of its own.

        `follow_engines(addresses)` is told which other engines take copies, and where, by their names.
        """

        def run() -> None:
            while True:
                try:
                    answer = _router().report_engine.remote(*make_report())
                    if (others := ray.get(answer, timeout=REPORT_TIMEOUT_S)) is not None:
                        follow_engines(others)
                except Exception as error:  # a report that is not sent must not be the last
                    logger.debug("the router could not be told: %s", error)
                time.sleep(period_s)

        threading.Thread(target=run, name="report", daemon=True).start()

    async def model_report(self) -> ModelReport:
        """Ask the router for the state of all of the model's processes. Raises RayError."""
        report: ModelReport = await _router().report.remote()
        return report

    async def scale(self, num_groups: int) -> Progress:
        """Wish for another number of expert groups. Raises ValueError if they are too few, RayError."""
        return await _command("scale", num_groups)

    async def drain(self, group: str) -> Progress:
        """Replace a group by another. Raises ValueError if there is none of that name, RayError."""
        return await _command("drain", group)

    async def rebalance(self) -> Progress:
        """Plan anew what each group should hold. Raises RayError."""
        return await _command("rebalance")

    def _follow(self) -> None:
        while True:
            epoch = self.placements.current().epoch
            try:
                newer: Placement | None = ray.get(_router().placement_after.remote(epoch, POLL_TIMEOUT_S))
            except ValueError as error:
                self._failure = str(error).strip().splitlines()[-1]
                self._first.set()
                return
            except Exception as error:  # whatever it is, the next router's placement must reach us
                logger.warning("the router does not answer: %s", error)
                time.sleep(RETRY_S)
                continue
            if newer:
                self.placements.push(newer)
                self._first.set()


async def _command(name: str, *arguments: object) -> Progress:
    progress: Progress = await getattr(_router(), name).remote(*arguments)
    return progress


def _router() -> ActorHandle:
    """Return the router's handle. Raises RayServeException while there is none: Serve is making another."""
    try:
        return serve.get_deployment_actor(ROUTER)
    except ValueError as error:
        raise RayServeException(f"the router is being restarted: {error}") from error
