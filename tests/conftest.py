"""What tests all over the tree share: the demo models, built once per machine."""

from pathlib import Path

import pytest

from cluster.home import default_home


@pytest.fixture(scope="session")
def dense_checkpoint() -> Path:
    from cluster.demo.build import DENSE, build  # here, because it imports torch

    return build(DENSE, default_home(), lambda what, done, total: None)


@pytest.fixture(scope="session")
def sparse_checkpoint() -> Path:
    from cluster.demo.build import SPARSE, build

    return build(SPARSE, default_home(), lambda what, done, total: None)
