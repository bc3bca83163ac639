"""The bodies of OpenAI's two completion endpoints: what they may hold, and what is wrong with them.

A field is one of four things: supported (a field of the classes below), accepted without effect because it
cannot change the answer, refused because ignoring it would change what the answer means, or unknown, and so
refused. Types are strict: "0.5" is no number. null means that the field is not there, as in OpenAI's clients.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from cluster.serve.errors import invalid

MAX_CHOICES = 1024  # of one HTTP request: prompts x n

_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
# Refused, unless the value is the one that changes nothing.
_REFUSED: dict[str, Any] = {
    "audio": None,
    "best_of": 1,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "moderation": None,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "verbosity": None,
    "web_search_options": None,
}
# What an assistant's message has when a client sends back the one that it received.
_REFUSED_IN_MESSAGE: dict[str, Any] = {
    "annotations": [],
    "audio": None,
    "function_call": None,
    "refusal": None,
    "tool_call_id": None,
    "tool_calls": [],
}


def _only_known(
    fields: Mapping[str, Any], known: Mapping[str, Any], refused: Mapping[str, Any], without_effect: set[str]
) -> dict[str, Any]:
    """Return the fields to validate; raise ValueError with (message, name) for the first that may not be."""
    for name, value in fields.items():
        if name in known or name in without_effect or value is None:
            continue
        if name not in refused:
            raise ValueError(f"unknown field {name!r}", name)
        if value != refused[name]:
            raise ValueError(f"{name} is not supported by this server; leave it out", name)
    return {name: value for name, value in fields.items() if name in known and value is not None}


def _text(content: Any) -> Any:
    """Join a message's text parts, one to a line."""
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {index} must be of type 'text' and have a text; its type is {kind!r}")
    return "\n".join(part["text"] for part in content)


def _stop_strings(stop: Any) -> Any:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > 4:
        raise ValueError("must be a string or a list of up to 4 strings")
    return stops


def _prompts(prompt: Any) -> Any:
    """Make every form of `prompt` a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    prompts = [prompt] if type(prompt[0]) is int else prompt
    for item in prompts:
        tokens = isinstance(item, list) and item and all(type(token) is int for token in item)
        if not (tokens or isinstance(item, str)):
            raise ValueError("must hold strings, token ids, or lists of token ids that are not empty")
    return prompts


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return _only_known(fields, cls.model_fields, _REFUSED_IN_MESSAGE, {"name"})


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, without effect


class CompletionFields(_Fields):
    """What both endpoints take."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stop_strings)] = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=128)] = []
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0


class ChatCompletionRequest(CompletionFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(CompletionFields):
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False


RequestT = TypeVar("RequestT", bound=CompletionFields)


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """Read one of the requests above, or raise ApiError naming the first field that is wrong."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object")
    try:
        request = kind.model_validate(_only_known(fields, kind.model_fields, _REFUSED, _WITHOUT_EFFECT))
    except ValidationError as error:
        raise _explain(error) from None
    except ValueError as error:
        raise invalid(*error.args) from None
    _check_together(request)
    return request


def _check_together(request: CompletionFields) -> None:
    """Raise ApiError for fields that are right alone and wrong together."""
    if "stream_options" in request.model_fields_set and not request.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    if isinstance(request, ChatCompletionRequest):
        limits = {request.max_tokens, request.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    if isinstance(request, CompletionRequest):
        if len(request.prompt) * request.n > MAX_CHOICES:
            asked = f"{len(request.prompt)} prompts x n {request.n}"
            raise invalid(f"{asked} is more than the {MAX_CHOICES} answers that one request may ask for", "n")
        if request.echo and request.logprobs is not None:
            raise invalid("echo with logprobs is not supported: prompts are not scored", "echo")


def _explain(error: ValidationError) -> Exception:
    """Say in one sentence what the first wrong field is, has, and should be."""
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if part not in ("str", "list[int]")]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "missing":
        return invalid(f"{param} is required", param)
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field {param!r}", param)
    cause = first.get("ctx", {}).get("error")
    reason = str(cause.args[0]) if isinstance(cause, ValueError) else first["msg"].replace("Input", "it", 1)
    reason = reason.replace(" after validation", "")
    value = json.dumps(first["input"], ensure_ascii=False, default=repr)
    shown = value if len(value) <= 100 else value[:100] + "..."
    return invalid(f"{param} is {shown}, but {reason[0].lower()}{reason[1:]}", param)
