"""What a deployment should look like: one YAML file, read into frozen dataclasses; every check is here."""

import difflib
import os
from dataclasses import dataclass, field, fields, replace
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

    def api_keys(self) -> frozenset[str]:
        """Read the accepted keys from the environment; none: everyone may ask.

        Raises ValueError if `api_keys_env` names a variable that holds none.
        """
        if self.api_keys_env is None:
            return frozenset()
        named = os.environ.get(self.api_keys_env, "").split(",")
        keys = frozenset(key.strip() for key in named if key.strip())
        if not keys:
            raise ValueError(
                f"http.api_keys_env names {self.api_keys_env}, which is not set; "
                "it must hold the accepted keys, separated by commas"
            )
        return keys

    @property
    def url(self) -> str:
        """Where a client on this machine finds the endpoint, whichever addresses it listens on."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True)
class ModelSettings:
    """One model: its checkpoint, its processes, its limits."""

    __pydantic_config__ = _STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # what requests call it
    checkpoint: str  # a folder, or the name of a model under $TRADEWIND_HOME/models
    engines: Count = 1
    expert_groups: Annotated[int, Field(ge=0)] = 0  # 0: experts live in the engine
    engine_threads: Annotated[int, Field(ge=0)] = 0  # 0: as many as the node has cores
    expert_threads: Count = 1
    max_running: Count = 64  # requests that share a step
    max_waiting: Annotated[int, Field(ge=0)] = 256  # requests beyond those; one more gets HTTP 429
    max_step_tokens: Count = 512  # tokens that share a step; a longer prompt is read in several
    context_length: Count | None = None  # null: what the checkpoint says
    kv_cache_tokens: Count | None = None  # null: as many as fit in kv_cache_fraction of the free memory
    kv_cache_fraction: Annotated[float, Field(gt=0, le=0.95)] = 0.3
    prefix_caching: bool = True
    expert_deadline_s: Annotated[float, Field(gt=0)] = 30.0  # wait this long for a lost expert to come back

    @property
    def engine_cpus(self) -> int:
        """The logical CPUs that one engine asks Ray for."""
        return self.engine_threads or 1


@dataclass(frozen=True)
class Settings:
    """A whole deployment."""

    __pydantic_config__ = _STRICT

    models: Annotated[tuple[ModelSettings, ...], Field(min_length=1)]
    http: HttpSettings = field(default_factory=HttpSettings)

    @property
    def num_cpus(self) -> int:
        """The logical CPUs that all processes ask Ray for; on a laptop that may be more than it has cores."""
        models = sum(m.engines * m.engine_cpus + m.expert_groups * m.expert_threads for m in self.models)
        return self.http.gateways + models

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
    names = [model.name for model in settings.models]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two models are called {name!r}; each needs a name of its own")
    return settings


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
