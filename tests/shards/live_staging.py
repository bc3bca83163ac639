"""A real stager, a checkpoint read as far as it is told, and peers to fetch from; and their fixtures."""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from router.links.address import Address
from router.links.base import Frame, Link, LinkLost
from router.links.listener import Listener
from router.links.stream import StreamLink, connect
from shards.checkpoint import Checkpoint, Part
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.staging import Stager
from shards.weights_wire import weights_frames
from tests.shards.tiny_models import TinyModel

SECRET = b"one cluster's secret"
ALL = tuple(product(range(3), range(4)))  # of the tiny mixtral


class GatedCheckpoint(Checkpoint):
    """Lets tensors be read only as far as it is told; counts those that were asked for, by name."""

    def __init__(self, directory: Path, permits: int = 1_000_000) -> None:
        super().__init__(directory)
        self._changed = threading.Condition()
        self._permits = permits
        self.asked: list[str] = []

    def tensor(self, name: str, part: Part | None = None) -> Tensor:
        with self._changed:
            self.asked.append(name)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._permits > 0, 20)
            self._permits -= 1
        return super().tensor(name, part)

    def permit(self, num_tensors: int = 1_000_000) -> None:
        with self._changed:
            self._permits += num_tensors
            self._changed.notify_all()

    def wait_asked(self, num_tensors: int) -> None:
        """Wait until so many tensors have been asked for; the last of them may still be held up."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= num_tensors, 20)


class Connector:
    """Opens links, and remembers them."""

    def __init__(self) -> None:
        self.links: list[StreamLink] = []
        self.asked: list[str] = []

    def __call__(self, address: str) -> Link:
        self.asked.append(address)
        self.links.append(connect(Address.parse(address), SECRET, "stager"))
        return self.links[-1]


class Staging:
    """A store, its stager, and what they work with."""

    def __init__(self, model: TinyModel, num_slots: int = len(ALL), *, permits: int = 1_000_000) -> None:
        self.model = model
        self.store = ExpertStore(num_slots)
        self.checkpoint = GatedCheckpoint(model.directory, permits)
        self.connect = Connector()
        self.stager = Stager(self.store, self.checkpoint, model.config, self.connect, peer_timeout_s=2)

    def stage(self, *experts: tuple[int, int], address: str | None = None) -> None:
        self.stager.stage((layer, expert, address) for layer, expert in experts)

    def stage_all(self, *experts: tuple[int, int], address: str | None = None) -> None:
        self.stage(*experts, address=address)
        self.settle()

    def settle(self) -> None:
        eventually(lambda: not self.stager.pending)

    def close(self) -> None:
        self.checkpoint.permit()
        self.stager.close()


class Peer:
    """A group that serves some experts: those of a store, or loaded ones, which nobody can map."""

    def __init__(self, model: TinyModel, store: ExpertStore, directory: Path) -> None:
        self.store = store
        self._listener = Listener(SECRET, "peer", directory, "127.0.0.1")
        self.service = ExpertService(self.store, self._listener, model.config.hidden_size)
        self.service.start()
        self.address = str(self._listener.address)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


def loaded(model: TinyModel, experts) -> ExpertStore:
    return ExpertStore.load(model.checkpoint, model.config, experts, lambda done, total: None)


def run(store: ExpertStore, layer: int, expert: int, x_ND: Tensor) -> Tensor:
    out_ND = torch.empty_like(x_ND)
    store.run(layer, [(expert, len(x_ND))], x_ND, out_ND)
    return out_ND


def assert_bitwise(store: ExpertStore, model: TinyModel, experts=ALL) -> None:
    reference = loaded(model, experts)
    assert set(store.held) == set(experts)
    x_ND = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer, expert in experts:
        assert torch.equal(run(store, layer, expert, x_ND), run(reference, layer, expert, x_ND))


def frames_for(model: TinyModel, fetch: Frame) -> Iterator[Frame]:
    return weights_frames(loaded(model, [(1, 1)]).get(1, 1), fetch.layer, fetch.sequence)


@pytest.fixture
def bf16_model(tiny_model) -> TinyModel:
    return tiny_model("mixtral", torch.bfloat16)


@pytest.fixture
def make(bf16_model: TinyModel) -> Iterator[Callable[..., Staging]]:
    made: list[Staging] = []

    def staging(model: TinyModel = bf16_model, num_slots: int = len(ALL), **knobs) -> Staging:
        made.append(Staging(model, num_slots, **knobs))
        return made[-1]

    yield staging
    for each in made:
        each.close()


@pytest.fixture
def peer_of(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def peer(model: TinyModel, experts=ALL, store: ExpertStore | None = None) -> Peer:
        made.append(Peer(model, store or loaded(model, experts), tmp_path))
        return made[-1]

    yield peer
    for each in made:
        each.service.stop()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a starter of peers that answer each FETCH by a script; it returns their address."""
    listeners: list[Listener] = []

    def start(answer: Callable[[StreamLink, Frame], None]) -> str:
        listeners.append(listener := Listener(SECRET, "scripted", tmp_path, "127.0.0.1"))

        def serve() -> None:
            while True:
                try:
                    link = listener.accept()
                except LinkLost:
                    return
                try:
                    while True:
                        answer(link, link.receive(20))
                except LinkLost:
                    link.close()

        threading.Thread(target=serve, daemon=True).start()
        return str(listener.address)

    yield start
    for listener in listeners:
        listener.close()
