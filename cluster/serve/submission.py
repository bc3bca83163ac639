"""From a request of the API to the requests that engines get. All checks that need a model are here."""

import secrets
from collections.abc import Sequence

from cluster.engine.request import GenerationRequest
from cluster.serve.errors import invalid
from cluster.serve.openai_requests import ChatCompletionRequest, CompletionFields, CompletionRequest, Message
from cluster.serve.served_model import ServedModel
from shards.sampling_params import SamplingParams

_DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI has it


def chat_prompt(model: ServedModel, messages: Sequence[Message]) -> list[int]:
    """Render a conversation with the model's template and tokenize it. CPU-bound; runs in any thread."""
    if model.template is None:
        raise invalid(f"model {model.name!r} has no chat template; use /v1/completions", "model")
    # `developer` is OpenAI's newer name for `system`, and no template knows it.
    turns = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    ]
    try:
        return model.tokenizer.encode(model.template.render(turns))
    except ValueError as error:
        raise invalid(str(error), "messages") from error


def completion_prompts(model: ServedModel, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Tokenize each prompt that is text, and check each that is tokens. CPU-bound; runs in any thread."""
    vocab_size = model.tokenizer.vocab_size
    for prompt in prompts:
        unknown = (
            [] if isinstance(prompt, str) else [token for token in prompt if not 0 <= token < vocab_size]
        )
        if unknown:
            raise invalid(
                f"prompt has token {unknown[0]}, but the ids go from 0 to {vocab_size - 1}", "prompt"
            )
    return [
        model.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def submissions(
    model: ServedModel, body: CompletionFields, prompts: Sequence[Sequence[int]], id: str
) -> list[GenerationRequest]:
    """Return one request per choice: `n` for the first prompt, then `n` for the next.

    Choice j of a prompt gets the user's seed + j, whatever prompts come with it. Raises ApiError for what
    does not fit the model.
    """
    seed = secrets.randbits(63) if body.seed is None else body.seed
    stop = frozenset(body.stop_token_ids)
    return [
        GenerationRequest(
            id=f"{id}-{index * body.n + choice}",
            prompt=tuple(prompt),
            max_tokens=_max_tokens(model, body, len(prompt)),
            sampling=_sampling(body, (seed + choice) % 2**63),
            stop_token_ids=stop if body.ignore_eos else stop | model.stop_token_ids,
            cache_salt=body.cache_salt or "",
        )
        for index, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]


def _max_tokens(model: ServedModel, body: CompletionFields, num_prompt: int) -> int:
    param = "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
    context = f"{model.name}'s context is {model.context_length} tokens, prompt and answer together"
    left = model.context_length - num_prompt
    if num_prompt == 0:
        raise invalid("the prompt has no tokens, but an answer needs at least one to follow", param)
    if left < 1:
        raise invalid(f"the prompt has {num_prompt} tokens, but {context}", param, "context_length_exceeded")
    name, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    if asked is None:
        return min(left, _DEFAULT_COMPLETION_TOKENS) if isinstance(body, CompletionRequest) else left
    if asked > left:
        raise invalid(
            f"{name} is {asked}, but the prompt has {num_prompt} tokens and {context}, so {left} are left",
            name,
            "context_length_exceeded",
        )
    return asked


def _sampling(body: CompletionFields, seed: int) -> SamplingParams:
    num_logprobs = None
    if isinstance(body, ChatCompletionRequest) and body.logprobs:
        num_logprobs = body.top_logprobs or 0
    elif isinstance(body, CompletionRequest):
        num_logprobs = body.logprobs
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        seed=seed,
        num_logprobs=num_logprobs,
    )
