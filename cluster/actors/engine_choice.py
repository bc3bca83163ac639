"""Which engine gets a request: Serve's power of two choices, but not an engine that seems to be lost."""

import random
from collections.abc import Collection

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class EngineChoice(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Serve's request router for the handles of engines; runs in the gateways.

    Of the two engines that it chooses, Serve takes the one with fewer requests. A stopped engine has fewest:
    those that were lost with it no longer count. So whoever calls names the engines to avoid.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return two engines at most; avoided ones only if there is no other."""
        avoided: Collection[str] = ()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
            avoided = pending_request.kwargs.get("avoided", ())
        tags = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[tags[tag] for tag in two_of(tags, avoided)]]


def engine_name(model: str, replica_tag: str) -> str:
    """Return the name by which gateways, groups and people know an engine."""
    return f"{model}/{replica_tag}"


def two_of(tags: Collection[str], avoided: Collection[str]) -> list[str]:
    """Draw two of the replica tags at most: of engines not in `avoided`, unless there are no others."""
    lost = {name.rpartition("/")[2] for name in avoided}
    kept = [tag for tag in tags if tag not in lost] or list(tags)
    return random.sample(kept, min(2, len(kept)))
