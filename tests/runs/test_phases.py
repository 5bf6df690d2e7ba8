"""Where a run's time went: exclusive time, layers, threads, and nothing at all where nobody records."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from moepress.runs import phases
from moepress.runs.phases import beside, in_layer, phase, recording

PAUSE_SECONDS = 0.05


def row(rows: list[dict[str, Any]], name: str, layer: int | None = None) -> dict[str, Any]:
    (found,) = (r for r in rows if r["phase"] == name and r["layer"] == layer)
    return found


def test_a_phase_does_not_count_the_phases_inside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]  # a clock that goes on only where the test says so
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with recording() as clock, phase("outer", flops=1, size=2):
        now[0] += 1
        for _ in range(2):
            with phase("inner", flops=10, size=20):
                now[0] += 8
                with phase("innermost"):
                    now[0] += 64
        now[0] += 2
    rows = clock.rows()
    assert [(r["phase"], r["seconds"]) for r in rows] == [("innermost", 128), ("inner", 16), ("outer", 3)]
    assert (row(rows, "outer")["flops"], row(rows, "outer")["bytes"]) == (1, 2)
    assert (row(rows, "inner")["flops"], row(rows, "inner")["bytes"]) == (20, 40)


def test_phases_belong_to_the_layer_around_them() -> None:
    with recording() as clock:
        with phase("read"):
            pass
        for layer in (1, 0, 1):
            with in_layer(layer), phase("read", size=1):
                pass
        with phase("write"):
            pass
    rows = clock.rows()
    assert [(r["layer"], r["phase"]) for r in rows] == [(None, "read"), (None, "write"), (0, "read"), (1, "read")]
    assert [r["bytes"] for r in rows] == [0, 0, 1, 2]


def test_a_thread_beside_takes_no_time_from_the_main_one() -> None:
    def work() -> None:
        with beside("read beside", size=7):
            time.sleep(PAUSE_SECONDS)

    with recording() as clock, in_layer(3), phase("outer"):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = clock.rows()
    behind, main = row(rows, "read beside", 3), row(rows, "outer", 3)
    assert (behind["background"], main["background"]) == (True, False)
    assert behind["bytes"] == 28
    assert behind["seconds"] >= 4 * PAUSE_SECONDS
    assert PAUSE_SECONDS <= main["seconds"] < behind["seconds"]


def test_an_error_inside_of_a_phase_is_counted_and_goes_on() -> None:
    with recording() as clock:
        with pytest.raises(ValueError, match="inside"), in_layer(2), phase("outer"), phase("inner"):
            raise ValueError("inside")
        with phase("after"):
            pass
    assert [(r["layer"], r["phase"]) for r in clock.rows()] == [(None, "after"), (2, "inner"), (2, "outer")]


def test_nothing_is_kept_where_nobody_records() -> None:
    with in_layer(0), phase("before"), beside("before"):
        pass
    with recording() as clock:
        pass
    with in_layer(0), phase("after"), beside("after"):
        pass
    assert clock.rows() == []


def test_a_thread_that_is_waited_for_adds_its_flops_and_not_its_seconds() -> None:
    def work(_: int) -> None:
        with phase("inner", flops=5.0, size=3):
            time.sleep(PAUSE_SECONDS)

    with recording() as clock, in_layer(1), phase("outer"), ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    inner, outer = row(clock.rows(), "inner", 1), row(clock.rows(), "outer", 1)
    assert (inner["seconds"], inner["flops"], inner["bytes"]) == (0.0, 10.0, 6)
    assert outer["seconds"] >= PAUSE_SECONDS
