"""Every command of the README and of the documents in docs/ is really run; those of the guides in the test beside.

Two tests, for each runs in a process of its own where tests run in parallel.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, blocks, name_of
from reader import NOT_RUN, Reader, lines_of, reader

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
READ = [ROOT / "README.md", *(document for document in DOCUMENTS if document.parent == ROOT / "docs")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with reader(tmp_path_factory.mktemp("reader")) as found:
        yield found


@pytest.mark.parametrize("document", READ, ids=name_of)
def test_every_command_of_a_document_runs(document: Path, workplace: Reader) -> None:
    workplace.read(document)


@pytest.mark.usefixtures("workplace")
def test_the_python_of_the_documents_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime_genai")
    programs = [(d, block) for d in READ for block in blocks(d.read_text(encoding="utf-8"), "python")]
    assert programs
    for document, program in programs:
        exec(compile(program.replace("max_length=256", "max_length=24"), name_of(document), "exec"), {})
        assert capsys.readouterr().out.startswith("The first experts")


def test_every_reason_not_to_run_a_line_is_needed() -> None:
    lines = [line for document in [*READ, *GUIDES] for line in lines_of(document)]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in lines)] == []
