"""A chat in the terminal, streamed."""

import json
from collections.abc import Iterator
from contextlib import suppress

import httpx
from rich.console import Console

from cluster.terminal.errors import answered, sentence

with suppress(ImportError):  # not on every system
    import readline  # noqa: F401  # gives input() line editing and history

# A first token may wait for others' prompts, or for an engine that starts.
TIMEOUT = httpx.Timeout(5.0, read=300.0)


class Chat:
    """One conversation with one model."""

    def __init__(
        self,
        url: str,
        model: str | None,
        system: str | None,
        temperature: float,
        api_key: str | None,
        console: Console,
    ) -> None:
        """Raises httpx.HTTPError if nobody answers at `url`, ValueError for a model that is not served."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else None
        self._client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)
        served = [entry["id"] for entry in self._client.get("/v1/models").raise_for_status().json()["data"]]
        if model is not None and model not in served:
            raise ValueError(f"model {model!r} is not served at {url}; choose one of {', '.join(served)}")
        self._model = model or served[0]
        self._temperature = temperature
        self._console = console
        self._messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Read lines and answer them until the end of input."""
        self._console.print(f"[dim]{self._model}; Ctrl-C stops an answer, Ctrl-D leaves[/]")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line:
                self._ask(line)

    def _ask(self, question: str) -> None:
        asked = [*self._messages, {"role": "user", "content": question}]
        answer = ""
        try:
            for piece in self._stream(asked):
                answer += piece
                self._console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            self._console.print("[dim] (stopped)[/]", end="")
        except httpx.HTTPError as error:
            if answer:
                self._console.print()
            self._console.print(sentence(error), style="red", markup=False)
            return
        self._console.print()
        self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """Yield the answer's text as it comes; leaving early closes the connection, and so the request.

        Raises httpx.HTTPError, also for an answer that is not whole.
        """
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": self._temperature,
            "stream": True,
        }
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise httpx.HTTPError(answered(response))
            is_whole = False
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                is_whole = is_whole or data == "[DONE]"
                if not line or is_whole:
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise httpx.HTTPError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
            if not is_whole:
                raise httpx.HTTPError("the answer broke off: its stream ended without [DONE]")
