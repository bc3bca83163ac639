"""The demo models as Hugging Face checkpoints, built on this machine."""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from cluster.demo import DEMO_MODELS, DENSE, SPARSE
from cluster.demo.download import download
from cluster.demo.gguf_checkpoint import GgufCheckpoint
from cluster.demo.upcycle import sparse_config, sparse_layer
from shards.cores import usable_cores

LAYERS_PER_SHARD = {DENSE: 30, SPARSE: 5}  # files of 270 and about 230 MB: what is in memory at a time

Progress = Callable[[str, int, int], None]  # (what, done, of how many)
Weights = dict[str, NDArray[np.float32]]


def build(name: str, home: Path, progress: Progress) -> Path:
    """Return the checkpoint folder of demo model `name`, building it in `home`/models if it is not there.

    Blocks for the download of 93 MB (once per `home`), for 2 to 60 seconds of building, and while another
    process builds in the same `home`. A folder of that name is always whole: it is renamed into place.
    Raises ValueError for an unknown name, DownloadError without network.
    """
    if name not in DEMO_MODELS:
        raise ValueError(f"there is no demo model {name!r}; choose one of {', '.join(DEMO_MODELS)}")
    checkpoint = home / "models" / name
    if checkpoint.exists():
        return checkpoint
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    progress("waiting for another build", 0, 1)
    with _only_builder(home):
        if checkpoint.exists():  # built while we waited
            return checkpoint
        partial = checkpoint.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed
        partial.mkdir()
        progress("downloading", 0, 1)
        source = GgufCheckpoint(download(home))
        _write_checkpoint(name, source, partial, progress)
        partial.rename(checkpoint)
    return checkpoint


@contextmanager
def _only_builder(home: Path) -> Iterator[None]:
    """Hold the lock of `home`; the kernel lets go of it when the process ends, however it ends."""
    with (home / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_checkpoint(name: str, source: GgufCheckpoint, directory: Path, progress: Progress) -> None:
    with ThreadPoolExecutor(usable_cores()) as pool:

        def layer_tensors(layer: int) -> Weights:
            dense = source.layer_tensors(layer)
            return sparse_layer(layer, dense, pool.map) if name == SPARSE else dense

        _write_weights(
            directory,
            source.outer_tensors(),
            layer_tensors,
            source.num_layers,
            LAYERS_PER_SHARD[name],
            lambda done: progress(f"building {name}", done, source.num_layers),
        )
    config = source.config()
    source.write_json_files(directory, sparse_config(config) if name == SPARSE else config)


def _write_weights(
    directory: Path,
    outer: Weights,
    layer_tensors: Callable[[int], Weights],
    num_layers: int,
    layers_per_shard: int,
    progress: Callable[[int], None],
) -> None:
    """Write bfloat16 safetensors, a file per `layers_per_shard` layers, and an index if there are several."""
    starts = range(0, num_layers, layers_per_shard)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, start in enumerate(starts, 1):
        # What belongs to no layer goes into the first file.
        shard = {name: _bfloat16(weight) for name, weight in outer.items()} if start == 0 else {}
        for layer in range(start, min(start + layers_per_shard, num_layers)):
            progress(layer)
            for name, weight in layer_tensors(layer).items():
                shard[f"model.layers.{layer}.{name}"] = _bfloat16(weight)
        file = (
            f"model-{number:05d}-of-{len(starts):05d}.safetensors" if len(starts) > 1 else "model.safetensors"
        )
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if len(starts) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    progress(num_layers)


def _bfloat16(weight: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.require(weight, requirements=["C", "W"])).to(torch.bfloat16)
