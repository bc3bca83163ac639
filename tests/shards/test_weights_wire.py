"""Weights as frames, and back: bit for bit, or not at all."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from router.links.base import Dtype, Frame, Kind
from router.links.wire import MAX_FRAME_BYTES, decode_body, decode_header, encode
from shards import weights_wire
from shards.config import ModelConfig
from shards.expert_store import ExpertStore
from shards.kernels import shared_pages
from shards.kernels.cpu import pack
from shards.layers.mlp import GatedMlp
from shards.weights_wire import expert_of, fetch_frame, receive_mlp, weights_frames
from tests.shards.kernels.shared import needs_sharing

CONFIG = ModelConfig("MixtralForCausalLM", 97, 80, 2, 5, 1, 16, 1700, 128, 1e4, 1e-5, False)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small experts into several frames, and share small matrices, too."""
    monkeypatch.setattr(weights_wire, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(shared_pages, "MIN_BYTES", 0)


def expert(dtype: torch.dtype = torch.bfloat16, is_shared: bool = False) -> GatedMlp:
    """Return weights of several frames, whose last panel of `gate_up` and of `down` is not full."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    gate_up = torch.randn(2 * inner, hidden, generator=generator).to(dtype)
    down = torch.randn(hidden, inner, generator=generator).to(dtype)
    return GatedMlp(pack(gate_up, is_shared=is_shared), pack(down, is_shared=is_shared))


def travelled(frames: Iterator[Frame]) -> Iterator[Frame]:
    """Yield each frame as a link does: in one buffer, which the next one overwrites."""
    buffer = bytearray(MAX_FRAME_BYTES >> 8)
    for frame in frames:
        head, *body = encode(frame)
        whole = b"".join(body)
        buffer[:] = b"\xff" * len(buffer)
        buffer[: len(whole)] = whole
        yield decode_body(decode_header(head), memoryview(buffer))


def test_an_expert_is_asked_for_by_layer_and_number():
    frame = fetch_frame(5, 7, sequence=9)
    assert (frame.kind, frame.layer, frame.sequence, expert_of(frame)) == (Kind.FETCH, 5, 9, 7)


@pytest.mark.parametrize("meta", [b"", b"123", b"12345"])
def test_a_fetch_that_names_no_expert_is_refused(meta: bytes):
    with pytest.raises(ValueError, match=f"one int32, the expert, not {len(meta)} bytes"):
        expert_of(Frame(Kind.FETCH, 1, 0, meta))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_arrives_computes_bitwise_the_same(dtype: torch.dtype):
    mlp = expert(dtype)
    got = receive_mlp(travelled(weights_frames(mlp, 1, 2)), CONFIG)
    assert got.gate_up.dtype == got.down.dtype == dtype
    x_TD = torch.randn(7, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(got(x_TD), mlp(x_TD))


def test_frames_name_their_question_and_are_of_bounded_size():
    frames = list(weights_frames(expert(), layer=4, sequence=6))
    assert len(frames) > 2
    for frame in frames:
        assert (frame.kind, frame.layer, frame.sequence, frame.dtype) == (Kind.WEIGHTS, 4, 6, Dtype.UINT8)
        assert frame.rows.nbytes <= weights_wire.PIECE_BYTES


def test_a_panel_larger_than_a_piece_travels_alone(monkeypatch):
    monkeypatch.setattr(weights_wire, "PIECE_BYTES", 100)
    mlp = expert()
    frames = list(weights_frames(mlp, 0, 0))
    assert {frame.num_rows for frame in frames} == {1}
    assert torch.equal(receive_mlp(frames, CONFIG).down.data, mlp.down.data)


def test_rows_are_the_memory_of_the_weights():
    mlp = expert()
    first = next(weights_frames(mlp, 0, 0))
    mlp.gate_up.data.view(-1)[0] = 17
    assert torch.frombuffer(first.rows, dtype=torch.bfloat16)[0] == 17


@needs_sharing
def test_within_a_host_a_file_comes_for_each_matrix_and_nothing_is_copied():
    mlp = expert(is_shared=True)
    frames = list(weights_frames(mlp, 4, 6, with_files=True))
    assert [(frame.kind, frame.layer, frame.sequence) for frame in frames] == [(Kind.MEMORY, 4, 6)] * 2
    got = receive_mlp(frames, CONFIG)
    assert (got.gate_up.file, got.down.file) == (mlp.gate_up.file, mlp.down.file)
    mlp.down.data.view(-1)[0] = 17
    assert torch.equal(got.down.data, mlp.down.data)
    assert torch.equal(got.gate_up.data, mlp.gate_up.data)


@needs_sharing
def test_between_hosts_bytes_come_and_can_be_shared_where_they_arrive():
    mlp = expert(is_shared=True)
    got = receive_mlp(travelled(weights_frames(mlp, 0, 0)), CONFIG)
    assert torch.equal(got.down.data, mlp.down.data)
    assert got.gate_up.file
    assert got.gate_up.file is not mlp.gate_up.file


@needs_sharing
@pytest.mark.parametrize("config", [replace(CONFIG, hidden_size=96), replace(CONFIG, intermediate_size=1699)])
def test_a_file_of_other_shapes_is_refused(config: ModelConfig):
    with pytest.raises(ValueError, match=r"the weights are b'.*in_features.*, but should be .*in_features"):
        receive_mlp(weights_frames(expert(is_shared=True), 0, 0, with_files=True), config)


@needs_sharing
def test_a_file_in_the_middle_of_a_matrix_is_refused():
    frames = list(weights_frames(expert(is_shared=True), 0, 0))
    _, end = weights_frames(expert(is_shared=True), 0, 0, with_files=True)
    in_the_middle = replace(end, meta=frames[1].meta)
    with pytest.raises(ValueError, match="a file comes in the middle of gate_up"):
        receive_mlp([frames[0], in_the_middle], CONFIG)


def test_nothing_is_taken_behind_the_last_frame_of_an_expert():
    frames = list(weights_frames(expert(), 0, 0))
    left = iter([*frames, *frames])
    receive_mlp(left, CONFIG)
    assert len(list(left)) == len(frames)


def test_a_checkpoints_experts_fit_its_config(tiny_model):
    model = tiny_model("mixtral", torch.bfloat16)
    store = ExpertStore.load(model.checkpoint, model.config, [(1, 3)], lambda done, total: None)
    mlp = store.get(1, 3)
    assert torch.equal(receive_mlp(weights_frames(mlp, 1, 0), model.config).down.data, mlp.down.data)


@pytest.mark.parametrize("config", [replace(CONFIG, hidden_size=96), replace(CONFIG, intermediate_size=1699)])
def test_weights_of_other_shapes_are_refused(config: ModelConfig):
    with pytest.raises(ValueError, match=r"the weights are b'.*in_features.*, but should be .*in_features"):
        receive_mlp(weights_frames(expert(), 0, 0), config)


def test_weights_of_kernels_with_another_layout_are_refused(monkeypatch):
    frames = list(weights_frames(expert(), 0, 0))
    monkeypatch.setattr(weights_wire, "_layout", lambda: "of another release")
    with pytest.raises(ValueError, match=r"should be .*of another release"):
        receive_mlp(frames, CONFIG)


def first_again(frames: list[Frame]) -> list[Frame]:
    return [frames[0], *frames]


def without_second(frames: list[Frame]) -> list[Frame]:
    return [frames[0], *frames[2:]]


def of_two_dtypes(frames: list[Frame]) -> list[Frame]:
    return [frames[0], *list(weights_frames(expert(torch.float32), 0, 0))[1:]]


def of_floats(frames: list[Frame]) -> list[Frame]:
    return [replace(frames[0], dtype=Dtype.FLOAT32), *frames[1:]]


def without_rows(frames: list[Frame]) -> list[Frame]:
    return [Frame(Kind.WEIGHTS, meta=frames[0].meta, dtype=Dtype.UINT8), *frames]


def with_too_many_rows(frames: list[Frame]) -> list[Frame]:
    rows = memoryview(bytes(frames[0].rows) * 10)
    return [replace(frames[0], rows=rows, num_rows=10 * frames[0].num_rows), *frames[1:]]


def with_short_rows(frames: list[Frame]) -> list[Frame]:
    return [replace(frames[0], rows=frames[0].rows.cast("B")[: frames[0].num_rows]), *frames[1:]]


def with_endless_meta(frames: list[Frame]) -> list[Frame]:
    return [replace(frames[0], meta=b"[" * 10_000_000), *frames[1:]]


def cut_short(frames: list[Frame]) -> list[Frame]:
    return frames[:-1]


@pytest.mark.parametrize(
    "broken",
    [
        first_again,
        without_second,
        of_two_dtypes,
        of_floats,
        without_rows,
        with_too_many_rows,
        with_short_rows,
        with_endless_meta,
        cut_short,
    ],
)
def test_frames_that_do_not_make_up_an_expert_are_refused(broken):
    frames = list(weights_frames(expert(), 0, 0))
    with pytest.raises(ValueError, match=r"the weights are|lacks|rows must have|in the middle of"):
        receive_mlp(broken(frames), CONFIG)
