"""Every way in which a checkpoint can be broken has a sentence of its own."""

import json

import pytest
import torch
from safetensors.torch import save_file

from shards.checkpoint import BrokenCheckpoint, Checkpoint, Part


def test_each_tensor_is_read_as_it_was_saved(tmp_path):
    saved = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2, 2).half(),
        "empty": torch.empty(0, 4),
    }
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_fingerprint_tells_weights_apart_but_not_where_they_lie(tmp_path):
    def fingerprint(folder, **tensors):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        return Checkpoint(tmp_path / folder).fingerprint()

    one = {"a": torch.ones(30, 5), "b": torch.ones(7), "empty": torch.empty(0, 4)}
    other = {"a": one["a"] + 2**-20, "b": one["a"], "c": one["b"]}
    assert fingerprint("here", **one) == fingerprint("there", **one)
    changed = [one | {"a": other["a"]}, one | {"b": other["a"]}, {"a": one["a"], "c": one["b"]}]
    prints = {fingerprint(f"changed {number}", **each) for number, each in enumerate([one, *changed])}
    assert len(prints) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_of_a_matrix_is_what_a_slice_of_it_is(tmp_path, dtype):
    whole = torch.randn(7, 5).to(dtype)
    save_file({"before": torch.ones(3), "a": whole}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("a", Part(0, 2, 6)), whole[2:6])
    assert torch.equal(checkpoint.tensor("a", Part(1, 1, 4)), whole[:, 1:4])
    assert checkpoint.tensor("a", Part(0, 3, 3)).shape == (0, 5)


@pytest.mark.parametrize("part", [Part(0, 2, 8), Part(1, 3, 2), Part(2, 0, 1), Part(1, -1, 2)])
def test_a_part_that_a_matrix_has_not_is_refused(tmp_path, part):
    save_file({"a": torch.randn(7, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a tensor of shape \(7, 5\) has no part"):
        Checkpoint(tmp_path).tensor("a", part)


def test_tensors_are_found_in_all_files_of_an_index(sharded):
    checkpoint = Checkpoint(sharded)
    checkpoint.verify({"a": (3, 5), "b": (4,)})
    assert torch.equal(checkpoint.tensor("b"), torch.ones(4))


def test_tensors_that_nobody_expects_do_no_harm(sharded):
    Checkpoint(sharded).verify({"a": (3, 5)})


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(BrokenCheckpoint, match=r"holds neither model\.safetensors nor model\.safetensors\."):
        Checkpoint(tmp_path)


def test_a_missing_tensor_is_named_with_its_file_and_shape(sharded):
    with pytest.raises(BrokenCheckpoint, match=r"index\.json has no tensor 'c', .* of shape \(2, 3\)"):
        Checkpoint(sharded).verify({"a": (3, 5), "c": (2, 3)})


def test_a_tensor_missing_from_the_file_that_should_have_it_is_named_with_that_file(sharded):
    save_file({"other": torch.ones(1)}, sharded / "two.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"two\.safetensors has no tensor 'b'"):
        Checkpoint(sharded).verify({"b": (4,)})


def test_a_wrong_shape_is_named_beside_the_right_one(sharded):
    with pytest.raises(
        BrokenCheckpoint,
        match=r"one\.safetensors: tensor 'a' is of shape \(3, 5\), but .* should be of shape \(5, 3\)",
    ):
        Checkpoint(sharded).verify({"a": (5, 3)})


def test_a_dtype_that_we_cannot_compute_with_is_named(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"'a' is of dtype I8.*must be one of BF16, F16, F32"):
        Checkpoint(tmp_path).verify({"a": (3,)})


def test_a_file_that_only_the_index_knows_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"two\.safetensors does not exist, but .*json names it"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BrokenCheckpoint, match=r"index\.json must hold a JSON object whose 'weight_map'"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 7, 8, 50, -1])
def test_a_file_cut_short_says_so(tmp_path, kept_bytes):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is cut short: it should have at least"):
        Checkpoint(tmp_path)


def test_a_file_cut_short_after_it_was_opened_says_so(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    checkpoint = Checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BrokenCheckpoint, match="was cut short while 'a' was read"):
        checkpoint.tensor("a")


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"\xff\xff",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a":' * 100_000,
    ],
    ids=lambda header: header[:60].decode(errors="replace"),
)
def test_a_senseless_header_says_that_this_is_no_safetensors_file(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is not a safetensors file"):
        Checkpoint(tmp_path)


def test_a_git_lfs_pointer_is_not_a_safetensors_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(BrokenCheckpoint, match="a small text file is a Git LFS pointer"):
        Checkpoint(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.zeros(3, 5), "more": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(4)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "more": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path
