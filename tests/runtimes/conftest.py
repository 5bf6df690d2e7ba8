"""`--record FILE`: what the runtimes answered, as JSON for the table of docs/runtimes.md."""

import datetime as dt
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_runs import RUNTIMES


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write it."""
    parser.addoption("--record", type=Path, default=None, help="a file for what was measured, as JSON")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Keep a case's figures; rows of runtimes that were not run now stay as the file has them."""
    file: Path | None = request.config.getoption("--record", default=None)
    made: list[dict[str, Any]] = []

    def keep(case: Any, version: str, **found: Any) -> None:
        made.append(
            {
                "runtime": RUNTIMES[case.runtime].name,
                "version": version,
                "date": dt.date.today().isoformat(),
                "model": case.model,
                "layout": case.layout,
                **found,
            }
        )

    yield keep
    if file is not None and made:
        before = json.loads(file.read_text()) if file.is_file() else []
        again = {row["runtime"] for row in made}
        rows = [row for row in before if row["runtime"] not in again] + made
        file.write_text(json.dumps(rows, indent=1) + "\n")
