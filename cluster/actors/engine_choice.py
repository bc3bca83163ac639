"""Which engine gets a request: the one with the fewest of this gateway's, but not one that seems lost.

What was lost with its engine goes to the one that may have copies of its keys and values.
"""

import random
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.engine.request import GenerationRequest
from router.requests import choose_standby


class EngineChoice(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Serve's request router for the handles of engines; runs in the gateways.

    Serve's own asks two engines how many requests they have, and goes without the answer of one that is slow:
    of one in a long step, say. A gateway knows what it has sent; if each spreads its own requests evenly, all
    are. A stopped engine has fewest, since those that were lost with it no longer count. So whoever calls
    names the engines to avoid.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin without requests; Serve calls this once."""
        self._num_open: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the engines in the order of choice; avoided ones if there are no others."""
        avoided: Collection[str] = ()
        request: object = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
            avoided = pending_request.kwargs.get("avoided", ())
            request = next(iter(pending_request.args), None)  # if the call is `Engine.generate`
        tags = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        num_open = {tag: self._num_open[replica.replica_id] for tag, replica in tags.items()}
        order = least_busy_first(num_open, avoided)
        if isinstance(request, GenerationRequest) and request.seeks_copies:
            standby = choose_standby(request.answer_id, order)
            order.sort(key=lambda tag: tag != standby)
        return [[tags[tag]] for tag in order]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a request that was sent to an engine."""
        super().on_send_request(replica_id)
        self._num_open[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count it no more, however it ended."""
        self._num_open[replica_id] -= 1
        if self._num_open[replica_id] <= 0:
            del self._num_open[replica_id]  # engines come and go


def engine_name(model: str, replica_tag: str) -> str:
    """Return the name by which gateways, groups and people know an engine."""
    return f"{model}/{replica_tag}"


def engine_tag(name: str) -> str:
    """Return the replica tag in an engine's name."""
    return name.rpartition("/")[2]


def least_busy_first(num_open: Mapping[str, int], avoided: Collection[str]) -> list[str]:
    """Return the replica tags, those with the fewest open requests first.

    Of engines not in `avoided`, unless there are no others; of equals, any.
    """
    lost = set(map(engine_tag, avoided))
    kept = [tag for tag in num_open if tag not in lost] or list(num_open)
    return sorted(random.sample(kept, len(kept)), key=lambda tag: num_open[tag])
