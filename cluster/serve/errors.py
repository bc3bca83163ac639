"""What a client is told when something is wrong: always OpenAI's error body."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than 200. Whatever it says, the client may read.

    `param` names the field that is wrong, like `messages[0].role`; `code` is for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(json.dumps(self.body()), self.status, self.headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that its sender must change."""
    return ApiError(400, message, param, code)


def unavailable(message: str) -> ApiError:
    """Return the error for a request that may succeed unchanged, a little later."""
    return ApiError(503, message, code="service_unavailable", headers={"Retry-After": "1"})


def overloaded(message: str) -> ApiError:
    """Return the error for a request that must wait until others are done."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def internal(request_id: str) -> ApiError:
    """Return the error for a fault of ours: no details, but the id under which the log has them."""
    return ApiError(
        500, f"internal error; the server's log has the details under {request_id}", code="internal_error"
    )
