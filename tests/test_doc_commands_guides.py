"""Every command of the guides is really run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT, name_of
from reader import Reader, reader


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with reader(tmp_path_factory.mktemp("reader")) as found:
        yield found


@pytest.mark.parametrize("document", sorted((ROOT / "docs" / "guides").glob("*.md")), ids=name_of)
def test_every_command_of_a_guide_runs(document: Path, workplace: Reader) -> None:
    workplace.read(document)
