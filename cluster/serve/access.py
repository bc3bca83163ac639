"""Who may ask: requests bear keys."""

import hmac
from collections.abc import Set

from starlette.requests import Request

from cluster.serve.errors import ApiError


def check_key(request: Request, keys: Set[str], kind: str) -> None:
    """Raise ApiError unless the request bears one of `keys`; `kind` is what the client is told to have."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Every key is compared, each in constant time: the delay of the answer must tell nothing.
    known = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    if not (scheme.lower() == "bearer" and any(known)):
        raise ApiError(
            401,
            f"this server needs a valid {kind}, in the header 'Authorization: Bearer <key>'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
