"""What tests all over the tree share: the demo models, built once per machine, and tiny random ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.demo import DENSE, SPARSE
from cluster.demo.build import build
from shards.home import default_home
from tests.shards.tiny_models import TinyModel, save_random_model


@pytest.fixture(scope="session")
def dense_checkpoint() -> Path:
    return build(DENSE, default_home(), lambda what, done, total: None)


@pytest.fixture(scope="session")
def sparse_checkpoint() -> Path:
    return build(SPARSE, default_home(), lambda what, done, total: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """Return a maker of the models in MODELS, by name and dtype; each is made once."""
    made: dict[tuple[str, torch.dtype], TinyModel] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
        if (name, dtype) not in made:
            directory = tmp_path_factory.mktemp(name)
            save_random_model(name, dtype, directory)
            made[name, dtype] = TinyModel(directory)
        return made[name, dtype]

    return make
