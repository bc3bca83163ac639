"""Which engine a request goes to, as far as engines and gateways must agree on it."""

from collections.abc import Collection
from hashlib import blake2b


def choose_standby(answer: str, engines: Collection[str]) -> str | None:
    """Choose the engine that goes on with an answer when its own is lost; None if there are no `engines`.

    `engines` are all but the answer's own, in any order. An engine calls this to decide where copies of the
    answer's keys and values go, and a gateway to find them: nobody has to say or remember where they are.
    Rendezvous hashing (Thaler and Ravishankar, 1998): a lost engine's answers spread evenly over the others,
    and an engine that comes or goes changes the choice only for the answers that were, or will be, its own.
    """
    return max(engines, key=lambda engine: blake2b(f"{answer} {engine}".encode()).digest(), default=None)
