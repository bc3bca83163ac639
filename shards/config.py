"""What a checkpoint says about its model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder, under one name each whatever the checkpoint calls them."""

    architecture: str  # one of ARCHITECTURES
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int  # tokens, prompt and answer together
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    sliding_window: int | None = None  # a token sees itself and the `sliding_window - 1` before it
    num_experts: int = 0  # 0: a dense model
    experts_per_token: int = 0
    eos_token_ids: tuple[int, ...] = ()

    @property
    def is_sparse(self) -> bool:
        return self.num_experts > 0

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "ModelConfig":
        """Read `config.json` (and `generation_config.json` for stop tokens, if it is there).

        Raises ValueError, naming the file and the field, for what is missing or not supported.
        """
        config_path = directory / "config.json"
        fields = _read_json(config_path)
        return cls._from_fields(fields, config_path, _eos_token_ids(directory, fields))

    @classmethod
    def _from_fields(
        cls, fields: dict[str, Any], path: Path, eos_token_ids: tuple[int, ...]
    ) -> "ModelConfig":
        def need(name: str, kind: type[int] | type[float]) -> Any:
            value = fields.get(name)
            if kind is float and isinstance(value, int):
                value = float(value)
            if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"{path}: {name!r} must be a positive {kind.__name__}, but it is {value!r}")
            return value

        def optional(name: str) -> int | None:
            return None if fields.get(name) is None else int(need(name, int))

        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"{path}: {message}")

        def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
            if value not in allowed:
                raise ValueError(f"{path}: {name} {value!r} is not supported; it must be one of {allowed}")
            return str(value)

        architectures = fields.get("architectures") or [None]
        architecture = one_of("architectures[0]", architectures[0], ARCHITECTURES)
        one_of("hidden_act", fields.get("hidden_act"), ("silu",))
        # transformers 5 nests the RoPE numbers under rope_parameters; transformers 4 wrote rope_theta and
        # rope_scaling at the top.
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        one_of("rope type", rope.get("rope_type", rope.get("type", "default")), ("default",))
        for bias in ("attention_bias", "mlp_bias"):
            check(not fields.get(bias), f"{bias} is not supported; it must be false")
        num_heads, hidden_size = need("num_attention_heads", int), need("hidden_size", int)
        num_kv_heads = optional("num_key_value_heads") or num_heads
        check(
            num_heads % num_kv_heads == 0,
            f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}",
        )
        head_dim = optional("head_dim") or hidden_size // num_heads
        check(head_dim % 16 == 0 and head_dim > 0, f"head_dim {head_dim} must be a multiple of 16")
        sparse = architecture == "MixtralForCausalLM"
        # A field that a file leaves out has the value that transformers gives it.
        default_theta = 1_000_000.0 if sparse else 10_000.0
        if architecture == "MistralForCausalLM":
            fields = {"sliding_window": 4096, **fields}
        num_experts = need("num_local_experts", int) if sparse else 0
        experts_per_token = need("num_experts_per_tok", int) if sparse else 0
        check(
            experts_per_token <= num_experts,
            f"num_experts_per_tok {experts_per_token} must not exceed num_local_experts {num_experts}",
        )
        return cls(
            architecture=architecture,
            vocab_size=need("vocab_size", int),
            hidden_size=hidden_size,
            num_layers=need("num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=need("intermediate_size", int),
            context_length=need("max_position_embeddings", int),
            rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", default_theta))),
            rms_norm_eps=need("rms_norm_eps", float),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            sliding_window=optional("sliding_window"),
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            eos_token_ids=eos_token_ids,
        )


def _eos_token_ids(directory: Path, fields: dict[str, Any]) -> tuple[int, ...]:
    """Collect the stop tokens of both files: instruct checkpoints often add some in the second."""
    found: list[int] = []
    generation_path = directory / "generation_config.json"
    sources = [fields] + ([_read_json(generation_path)] if generation_path.exists() else [])
    for source in sources:
        value = source.get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a checkpoint is a folder with one in it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return fields
