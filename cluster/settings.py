"""What a deployment should look like: one YAML file, read into frozen dataclasses; every check is here."""

import difflib
import os
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

# Strict: a port of "8000" or a `true` where a number belongs is a mistake, and so is a key nobody reads.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class HttpSettings:
    """Where clients connect."""

    __pydantic_config__ = _STRICT

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    gateways: Count = 1  # replicas of the Gateway
    # Environment variable with the accepted API keys, separated by commas; null: everyone may ask.
    api_keys_env: str | None = None
    # The same for operators; null: everyone is one if only this machine can connect, and otherwise nobody.
    admin_keys_env: str | None = None
    drain_s: Annotated[float, Field(ge=0)] = 30.0  # at the end, for answers that run; then they are cut

    def api_keys(self) -> frozenset[str]:
        """Read the accepted keys from the environment; none: everyone may ask.

        Raises ValueError if `api_keys_env` names a variable that holds none.
        """
        return _keys("api_keys_env", self.api_keys_env)

    def admin_keys(self) -> frozenset[str]:
        """Read the operators' keys from the environment.

        Raises ValueError if `admin_keys_env` names a variable that holds none.
        """
        return _keys("admin_keys_env", self.admin_keys_env)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """Where a client on this machine finds the endpoint, whichever addresses it listens on."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Say whether a name or an address means the machine that it is used on."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, and only one of them is this machine everywhere
        return host == "localhost"


def _keys(setting: str, variable: str | None) -> frozenset[str]:
    if variable is None:
        return frozenset()
    named = os.environ.get(variable, "").split(",")
    keys = frozenset(key.strip() for key in named if key.strip())
    if not keys:
        raise ValueError(
            f"http.{setting} names {variable}, which is not set; "
            "it must hold the accepted keys, separated by commas"
        )
    return keys


@dataclass(frozen=True)
class ModelSettings:
    """One model: its checkpoint, its processes, its limits."""

    __pydantic_config__ = _STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # what requests call it
    checkpoint: str  # a folder, or the name of a model under $TRADEWIND_HOME/models
    engines: Count = 1
    tensor_parallel: Count = 1  # processes of one engine, each with a share of every layer
    expert_groups: Annotated[int, Field(ge=0)] = 0  # 0: experts live in the engine
    expert_replicas: Count = 1  # how many groups should hold each expert
    min_expert_groups: Count | None = (
        None  # the router keeps the number of groups between these two, by load;
    )
    max_expert_groups: Count | None = None  # null: the number stays as it is, or as it is commanded
    expert_busy: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of time that a group should compute, then
    expert_slots: Count | None = None  # experts of a layer that a group may hold; null: what it takes + 1
    engine_threads: Annotated[int, Field(ge=0)] = 0  # of each such process; 0: they share the node's cores
    expert_threads: Annotated[int, Field(ge=0)] = 0  # of each group; 0: groups share the node's cores
    max_running: Count = 64  # requests that share a step
    max_waiting: Annotated[int, Field(ge=0)] = 256  # requests beyond those; one more gets HTTP 429
    max_step_tokens: Count = 512  # tokens that share a step; a longer prompt is read in several
    context_length: Count | None = None  # null: what the checkpoint says
    kv_cache_tokens: Count | None = None  # null: as many as fit in kv_cache_fraction of the free memory
    kv_cache_fraction: Annotated[float, Field(gt=0, le=0.95)] = 0.3
    prefix_caching: bool = True
    kv_copies: bool = True  # of running answers, on another engine; with several, and prefix_caching
    expert_deadline_s: Annotated[float, Field(gt=0)] = 30.0  # wait this long for a lost expert to come back

    def served_context(self, longest: int) -> int:
        """How many tokens prompt and answer may have, together, where the checkpoint allows `longest`."""
        return self.context_length or longest

    def slots_per_layer(self, num_experts: int) -> int:
        """How many of a layer's experts one group may hold."""
        fewest = min(self.expert_groups, self.min_expert_groups or self.expert_groups)
        needed = -(-num_experts * self.expert_replicas // max(fewest, 1))
        return min(self.expert_slots or needed + 1, num_experts)

    @property
    def most_expert_groups(self) -> int:
        """How many groups a cluster that is started for this model alone should have room for."""
        return (self.max_expert_groups or 2 * self.expert_groups) + (self.expert_groups > 0)

    @property
    def copies_blocks(self) -> bool:
        """Whether engines send each other copies of their KV blocks."""
        return self.kv_copies and self.prefix_caching and self.engines > 1

    @property
    def most_open(self) -> int:
        """How many requests all engines together hold, running and waiting."""
        return self.engines * (self.max_running + self.max_waiting)

    @property
    def engine_cpus(self) -> int:
        """The logical CPUs that one process of an engine asks Ray for."""
        return self.engine_threads or 1

    @property
    def expert_cpus(self) -> int:
        """The logical CPUs that an expert group asks Ray for."""
        return self.expert_threads or 1


@dataclass(frozen=True)
class Settings:
    """A whole deployment."""

    __pydantic_config__ = _STRICT

    models: Annotated[tuple[ModelSettings, ...], Field(min_length=1)]
    http: HttpSettings = field(default_factory=HttpSettings)

    @property
    def num_cpus(self) -> int:
        """The logical CPUs that all processes may ask Ray for; a laptop need not have as many cores.

        There is room for twice the expert groups, so that they can be scaled, and one be drained when it is
        replaced.
        """
        engines = sum(m.engines * m.tensor_parallel * m.engine_cpus for m in self.models)
        groups = sum(m.most_expert_groups * m.expert_cpus for m in self.models)
        return self.http.gateways + engines + groups

    def on(self, host: str | None, port: int | None) -> "Settings":
        """Return the same deployment behind another host or port; None keeps what the file says.

        Raises ValueError for a port that there is not.
        """
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(f"--port is {port}; it must be from 1 to 65535")
        return replace(
            self, http=replace(self.http, host=host or self.http.host, port=port or self.http.port)
        )


def load_settings(path: Path) -> Settings:
    """Read a YAML file. Raises ValueError with one sentence per mistake, naming file, key and value."""
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; the configurations that come along are in configs/"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a mapping with a key 'models', not {document!r}")
    try:
        # From JSON's types: YAML has lists where the dataclasses have tuples.
        settings = TypeAdapter(Settings).validate_json(to_json(document, inf_nan_mode="constants"))
    except PydanticSerializationError as error:  # YAML knows bytes, and lists that hold themselves
        raise ValueError(f"{path} holds more than plain values: {error}") from None
    except ValidationError as error:
        mistakes = [
            dict(mistake)
            for mistake in error.errors()
            if mistake["type"] != "too_short" or not mistake["input"]
        ]
        raise ValueError("\n".join(f"{path}: {_explain(mistake)}" for mistake in mistakes)) from None
    for model in settings.models:
        if contradiction := _contradiction(model):
            raise ValueError(f"{path}: model {model.name!r} has {contradiction}")
    names = [model.name for model in settings.models]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two models are called {name!r}; each needs a name of its own")
    return settings


def _contradiction(model: ModelSettings) -> str | None:
    """Return what two settings of a model say against each other."""
    groups, least, most = model.expert_groups, model.min_expert_groups, model.max_expert_groups
    if model.expert_replicas > max(groups, 1):
        return f"expert_replicas {model.expert_replicas}, but only {groups} expert_groups to hold them"
    if least is not None and most is None:
        return (
            f"min_expert_groups {least}, but no max_expert_groups; the number follows the load only with both"
        )
    if most is not None and not (least or 1) <= groups <= most:
        return (
            f"expert_groups {groups}, which must lie between min_expert_groups {least or 1} and "
            f"max_expert_groups {most}"
        )
    if least is not None and least < model.expert_replicas:
        return (
            f"min_expert_groups {least}, but expert_replicas {model.expert_replicas}, each of which needs a "
            "group of its own"
        )
    return None


def _explain(mistake: dict[str, Any]) -> str:
    """Turn one of pydantic's mistakes into a sentence."""
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "missing":
        return f"key {where!r} is missing"
    if mistake["type"] != "unexpected_keyword_argument":
        return f"{where} is {mistake['input']!r}: {mistake['msg']}"
    kinds: dict[str, type[ModelSettings | HttpSettings]] = {"models": ModelSettings, "http": HttpSettings}
    known = [key.name for key in fields(kinds.get(str(mistake["loc"][0]), Settings))]
    close = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"
