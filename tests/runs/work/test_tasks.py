"""Tasks as JSON: what is read back is what was written, and what is broken is refused in a sentence."""

import json
from typing import Any

import pytest
from small_runs import diamond

from moepress.errors import InvalidInputError
from moepress.runs.work.tasks import (
    Done,
    Made,
    Task,
    consumers,
    done_text,
    parse_done,
    parse_tasks,
    require_order,
    small_object,
    tasks_text,
)

DONE = Done(
    task="a",
    attempt=2,
    worker="w",
    seconds=1.5,
    peak_bytes=7,
    files={"x": Made(object="out/a/2-id/x", bytes=3, sha256="00")},
    note={"n": [1]},
)


def test_tasks_and_markers_are_read_back() -> None:
    assert parse_tasks(tasks_text(diamond())) == diamond()
    assert parse_done(done_text(DONE), "a") == DONE


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([Task(id="a", kind="k"), Task(id="a", kind="k")], "a comes twice"),
        ([Task(id="a", kind="k", needs=("b",)), Task(id="b", kind="k")], "a needs b, which does not come before it"),
        ([Task(id="a", kind="k", needs=("a",))], "a needs a"),
    ],
    ids=["twice", "circle", "itself"],
)
def test_an_order_that_cannot_be_worked_off_is_refused(tasks: list[Task], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        require_order(tasks)
    with pytest.raises(InvalidInputError, match="plan the work anew"):
        parse_tasks(tasks_text(tasks))


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'[{"id": "a"}]', b"\xff", b"[" * 200, b'[{"id": 1, "at": 3}]'])
def test_broken_tasks_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidInputError, match="plan the work anew"):
        parse_tasks(raw)


def changed(**values: Any) -> bytes:
    return json.dumps(json.loads(done_text(DONE)) | values).encode()


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"{", b"[]", b"3", b"\xff", b"[" * 200, b'{"task": "a"}'),
        changed(task="b"),
        changed(seconds="long"),
        changed(files=[]),
        changed(files={"x": {}}),
        changed(files={"x": {"object": "out/a/../../../etc/passwd", "bytes": 3, "sha256": "00"}}),
        changed(files={"x": {"object": "out/b/2-id/x", "bytes": 3, "sha256": "00"}}),
        changed(files={"x": {"object": "out/a/x", "bytes": "3", "sha256": "00"}}),
        changed(files={"x": {"object": "out/a/x", "bytes": 3, "sha256": 0}}),
        changed(note=[]),
        changed(more=1),
    ],
)
def test_broken_markers_are_refused_by_name(raw: bytes) -> None:
    with pytest.raises(InvalidInputError, match=r"done/a\.json .* is broken"):
        parse_done(raw, "a")


def test_who_needs_whom() -> None:
    found = consumers(diamond(1, 2))
    assert found == {
        "begin-0": ["wide-0-0", "wide-0-1", "end-0"],
        "wide-0-0": ["end-0"],
        "wide-0-1": ["end-0"],
        "end-0": [],
    }


@pytest.mark.parametrize("raw", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 500, b"null"])
def test_what_only_tells_is_nothing_where_it_is_broken(raw: bytes | None) -> None:
    assert small_object(raw) == {}
