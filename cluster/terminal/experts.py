"""Commands that change a model's expert groups, watched until the change is done."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from cluster.terminal.errors import answered, is_passing, sentence
from cluster.terminal.progress import counted, in_words

PERIOD_S = 0.5  # between two looks at /status
REQUEST_TIMEOUT_S = 15.0  # longer than a gateway waits for a router

Model = Mapping[str, Any]  # what /status says about one
Tell = Callable[[str], None]


class Experts:
    """The expert groups of one model."""

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key: str | None,
        timeout_s: float,
        console: Console,
        period_s: float = PERIOD_S,
    ) -> None:
        """Find the model; None takes the first that has expert groups.

        Raises httpx.HTTPError if nobody answers at `url`, ValueError if there is no such model.
        """
        headers = {"authorization": f"Bearer {api_key}"} if api_key else None
        self._client = httpx.Client(base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S)
        self._timeout_s = timeout_s
        self._period_s = period_s
        self._console = console
        models = self._models()
        if model is not None and model not in models:
            raise ValueError(f"model {model!r} is not served at {url}; choose one of {', '.join(models)}")
        names = [model] if model else [name for name, its in models.items() if its["progress"]]
        if not names:
            raise ValueError(f"no model at {url} has expert groups (expert_groups in its configuration)")
        self._model = names[0]
        self._first_look = models[self._model]

    def scale(self, num_groups: int) -> None:
        """Have another number of groups."""
        self._carry_out(
            "scale",
            {"groups": num_groups},
            lambda model: bool(model["progress"]["wished_groups"] == num_groups),
        )

    def rebalance(self) -> None:
        """Have it planned anew what each group holds."""
        self._carry_out("rebalance", {}, lambda model: True)

    def drain(self, group: str) -> None:
        """Have a group replaced; `group` is its name, or the number at its end."""
        name = group if "/" in group else f"{self._model}/{group}"
        # By process: as soon as the name is free, another group may get it. One that is silent is not listed.
        processes = [its for its in _processes(self._first_look) if its["name"] == name]
        self._carry_out(
            "drain", {"group": name}, lambda model: not any(its in _processes(model) for its in processes)
        )

    def _carry_out(self, command: str, body: Mapping[str, Any], is_done: Callable[[Model], bool]) -> None:
        """Give the command and watch until everything is in its place; Ctrl-C only ends the watching.

        Raises ValueError if the command is wrong, or was overtaken, TimeoutError if it takes too long, and
        httpx.HTTPError.
        """
        began_at = time.monotonic()
        taken = False
        try:
            with _line(self._console) as tell:
                self._give(command, body, began_at, tell)
                taken = True
                model = self._watch(is_done, began_at, tell)
        except KeyboardInterrupt:
            if taken:
                self._console.print("The cluster goes on with it; `tradewind status` shows how far it is.")
            sys.exit(130)
        groups = counted(model["progress"]["wished_groups"], "group")
        took_s = time.monotonic() - began_at
        self._console.print(
            f"{groups} live, every expert in its place (epoch {model['epoch']}, {took_s:.1f} s)"
        )

    def _give(self, command: str, body: Mapping[str, Any], began_at: float, tell: Tell) -> None:
        """Give the command to whoever answers first. All of them may be given twice."""
        while True:
            try:
                response = self._client.post(f"/admin/models/{self._model}/experts/{command}", json=body)
                if response.status_code == httpx.codes.UNAUTHORIZED:
                    raise ValueError(f"{answered(response)}: --api-key, or TRADEWIND_ADMIN_KEY")
                response.raise_for_status()
                return
            except httpx.HTTPError as error:
                self._bear(error, tell)
            self._pause(began_at, "nobody took the command")

    def _watch(self, is_done: Callable[[Model], bool], began_at: float, tell: Tell) -> Model:
        """Tell how far it is until it is done; return the model as it is then."""
        where, settled_otherwise = "nothing is known of it", 0
        while True:
            self._pause(began_at, f"the cluster goes on with it: {where}")
            try:
                model = self._models()[self._model]
            except httpx.HTTPError as error:
                self._bear(error, tell)
                continue
            where = in_words(model["progress"])
            tell(where)
            is_settled = model["progress"]["is_settled"]
            if is_settled and is_done(model):
                return model
            # Once may be chance: the parts of one /status are of slightly different moments.
            settled_otherwise = settled_otherwise + 1 if is_settled else 0
            if settled_otherwise > 1:
                raise ValueError(
                    f"everything is in its place, but not as asked ({where}): another command came between, "
                    "or the router died before anybody else had heard of this one; run it again"
                )

    def _bear(self, error: httpx.HTTPError, tell: Tell) -> None:
        """Tell of an error that may pass; raise any other."""
        if not is_passing(error):
            raise error
        tell(f"{sentence(error)} (still trying)")

    def _pause(self, began_at: float, where: str) -> None:
        """Wait for the next look. Raises TimeoutError if there should be none."""
        if time.monotonic() - began_at > self._timeout_s:
            raise TimeoutError(f"not done after {self._timeout_s:g} s; {where}")
        time.sleep(self._period_s)

    def _models(self) -> dict[str, Model]:
        response = self._client.get("/status").raise_for_status()
        return {model["model"]: model for model in response.json()["models"]}


def _processes(model: Model) -> list[Mapping[str, Any]]:
    return [group["process"] for group in model["groups"]]


@contextmanager
def _line(console: Console) -> Iterator[Tell]:
    """Yield a function that shows a line in place of the last one, or, in a file, a line that is new."""
    if console.is_terminal:
        with console.status("") as status:
            yield lambda text: status.update(escape(text))
        return
    shown = ""

    def tell(text: str) -> None:
        nonlocal shown
        if text != shown:
            console.print(text, soft_wrap=True, markup=False)
        shown = text

    yield tell
