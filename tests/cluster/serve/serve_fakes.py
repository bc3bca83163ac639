"""A model that is a script: byte-level tokens, and engines that do as they are told."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import tokenizers
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from cluster.engine.request import GenerationRequest, Logprob, TokenEvent
from cluster.serve.served_model import ServedModel
from cluster.text.huggingface import HuggingFaceTokenizer
from cluster.text.templates import ChatTemplate

TEMPLATE = (
    "{% for message in messages %}{% if message.content == 'refuse' %}{{ raise_exception('no such talk') }}"
    "{% endif %}<{{ message.role }}>{{ message.content }}{% endfor %}<answer>"
)
CONTEXT_LENGTH = 200


def byte_tokenizer() -> HuggingFaceTokenizer:
    """One token per byte, and `</s>`: characters of several bytes take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return HuggingFaceTokenizer(tokenizer)


TOKENIZER = byte_tokenizer()
(EOS,) = TOKENIZER.encode("</s>")


def tokens(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))


@dataclass
class ScriptedEngine:
    """Implements EngineClient: answers each prompt with `answer(prompt)`, then the end-of-text token.

    `failures` are used up one per submission: (n, error) raises after n more tokens.
    """

    answer: Callable[[str], str] = lambda prompt: "Hello, world"
    failures: list[tuple[int, Exception]] = field(default_factory=list)
    hang_after: int | None = None  # tokens; then nothing comes any more
    num_silent: int = 0  # submissions, the first ones, that nobody takes
    prompt_s: float = 0.0  # what it takes to read a prompt, behind the receipt
    num_cached: int = 0
    submissions: list[GenerationRequest] = field(default_factory=list)
    at_once: int = 0  # requests that are running
    most_at_once: int = 0
    hanging: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))  # released by each
    aborted: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))  # released by each

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.submissions.append(request)
        num_ok, error = self.failures.pop(0) if self.failures else (None, None)
        script = (*tokens(self.answer(TOKENIZER.decode(request.prompt))), EOS)
        ended = False
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0)  # let others begin
            if len(self.submissions) <= self.num_silent:
                await asyncio.Event().wait()
            yield TokenEvent(request.id, None)
            await asyncio.sleep(self.prompt_s)
            for position in range(len(request.emitted), request.max_tokens):
                if error and position - len(request.emitted) == num_ok:
                    ended = True
                    raise error
                if position == self.hang_after:
                    self.hanging.release()
                    await asyncio.Event().wait()
                event = self._event(request, script[position % len(script)], position)
                ended = event.finish_reason is not None
                yield event
                if ended:
                    return
        finally:
            self.at_once -= 1
            if not ended:
                self.aborted.release()

    def _event(self, request: GenerationRequest, token: int, position: int) -> TokenEvent:
        reason = "stop" if token in request.stop_token_ids else None
        if reason is None and position + 1 == request.max_tokens:
            reason = "length"
        num_logprobs = request.sampling.num_logprobs
        return TokenEvent(
            request.id,
            token,
            reason,
            logprob=None if num_logprobs is None else Logprob(token, -0.5),
            top_logprobs=tuple(Logprob((token + i) % 256, -0.5 - i) for i in range(num_logprobs or 0)),
            num_cached=self.num_cached if position == len(request.emitted) else 0,
        )


def served(engine: ScriptedEngine, name: str = "echo", template: str | None = TEMPLATE) -> ServedModel:
    return ServedModel(
        name=name,
        tokenizer=TOKENIZER,
        template=None if template is None else ChatTemplate(template, {"eos_token": "</s>"}),
        context_length=CONTEXT_LENGTH,
        stop_token_ids=frozenset({EOS}),
        created=1_700_000_000,
        engine=engine,
    )


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """Read one number; 0 for a series that nobody has touched."""
    return registry.get_sample_value(name, labels) or 0.0
