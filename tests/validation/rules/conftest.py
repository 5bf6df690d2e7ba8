"""Outputs of our own, made once for the tests of a file, and copies of them to spoil."""

from collections.abc import Callable
from pathlib import Path

import pytest
from check_folders import Copies, Outputs


@pytest.fixture(scope="module")
def outputs(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Outputs of every layout, not to be changed."""
    return Outputs(folder=tmp_path_factory.mktemp("outputs"), tiny=tiny_model)


@pytest.fixture
def copy(outputs: Outputs, tmp_path: Path) -> Copies:
    """Copies of them in a folder of the test's own."""
    return Copies(outputs=outputs, folder=tmp_path)
