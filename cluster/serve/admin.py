"""What an operator may change while the deployment serves: the expert groups of a model."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from cluster.serve.access import check_key
from cluster.serve.connection import read_json
from cluster.serve.errors import ApiError, invalid
from cluster.settings import is_loopback
from router.controller import Progress


class ExpertCommands(Protocol):
    """Changes the expert groups of a model.

    Each command returns as soon as the model's router has taken it, and the change goes on behind it. Raises
    ValueError for an operator's mistake, ApiError if nobody can be asked now.
    """

    async def scale(self, model: str, num_groups: int) -> Progress:
        """Wish for another number of groups."""

    async def rebalance(self, model: str) -> Progress:
        """Plan anew what each group should hold."""

    async def drain(self, model: str, group: str) -> Progress:
        """Replace a group by another."""


@dataclass(frozen=True)
class AdminAccess:
    """Who may change the deployment: who has one of `keys`; where there are none, everyone or nobody."""

    keys: frozenset[str] = frozenset()
    is_open: bool = False  # to all on this machine, if there are no keys

    def check(self, request: Request) -> None:
        """Raise ApiError for who may not."""
        if self.keys:
            check_key(request, self.keys, "admin key")
        elif not self.is_open:
            raise ApiError(
                403,
                "to change a server that other machines can reach takes an admin key, and this one has none; "
                "set http.admin_keys_env in its configuration",
                code="admin_keys_not_set",
            )
        # A web page whose own name was made to mean this machine may send anything, but not another Host.
        elif not is_loopback(host := _host(request)):
            raise ApiError(
                403,
                f"without admin keys, only who calls this server localhost or 127.0.0.1, not {host!r}, may "
                "change it; do so, or set http.admin_keys_env in its configuration",
                code="admin_keys_not_set",
            )


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    example: ClassVar[str]


class Scale(_Body):
    example = '{"groups": 4}'
    groups: Annotated[int, Field(ge=1)]


class Rebalance(_Body):
    example = "{}"


class Drain(_Body):
    example = '{"group": "0"}'
    group: Annotated[str, Field(min_length=1)]  # its name, or the number behind the name's last slash


BodyT = TypeVar("BodyT", bound=_Body)


def admin_router(find: Callable[[str], object], commands: ExpertCommands, access: AdminAccess) -> APIRouter:
    """Build the routes under /admin; `find` raises ApiError for a model that is not served."""

    async def authorize(request: Request) -> None:
        access.check(request)

    def choose(request: Request, model: str) -> None:
        find(model)
        request.state.exchange.model = model

    router = APIRouter(
        prefix="/admin/models/{model}/experts", dependencies=[Depends(authorize), Depends(choose)]
    )

    @router.post("/scale")
    async def scale(request: Request, model: str) -> Response:
        body = await _read(request, Scale)
        return await _accept(commands.scale(model, body.groups), "groups")

    @router.post("/rebalance")
    async def rebalance(request: Request, model: str) -> Response:
        await _read(request, Rebalance)
        return await _accept(commands.rebalance(model))

    @router.post("/drain")
    async def drain(request: Request, model: str) -> Response:
        body = await _read(request, Drain)
        group = body.group if "/" in body.group else f"{model}/{body.group}"
        return await _accept(commands.drain(model, group), "group")

    return router


def progress_fields(progress: Progress) -> dict[str, Any]:
    """Return what a client reads of a progress."""
    return {**asdict(progress), "is_settled": progress.is_settled}


def _host(request: Request) -> str:
    """Return the name by which the client calls this server, without the port."""
    name, colon, port = request.headers.get("host", "").rpartition(":")
    return (name if colon and port.isdecimal() else f"{name}{colon}{port}").strip("[]")


async def _accept(command: Awaitable[Progress], param: str | None = None) -> Response:
    try:
        progress = await command
    except ValueError as error:
        raise invalid(str(error), param) from error
    return Response(json.dumps(progress_fields(progress)), 202, media_type="application/json")


async def _read(request: Request, kind: type[BodyT]) -> BodyT:
    """Read a body; an empty one says as much as {}. Raises ApiError that shows what it should look like."""
    try:
        return kind.model_validate_json(await read_json(request) or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"])) or None  # None: the body is no JSON object
        has_value = param and first["type"] != "missing"
        where = (
            f"{param} is {json.dumps(first['input'])[:100]}: " if has_value else f"{param}: " if param else ""
        )
        wrong = where + first["msg"]
        raise invalid(f"{wrong}; the body should be like {kind.example}", param) from None
