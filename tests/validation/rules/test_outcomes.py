"""What a report says of each runtime."""

from pathlib import Path

import pytest

from moepress.stages.shown import checks_section
from moepress.validation.rules.check import Checked, check_folder
from moepress.validation.rules.facts import Kind
from moepress.validation.rules.findings import Effect, Finding, Runtime
from moepress.validation.rules.outcomes import outcomes


def finding(effect: Effect, what: str, runtime: Runtime = Runtime.VLLM) -> Finding:
    return Finding(rule="r", runtime=runtime, effect=effect, what=what, happens="it stops", mend="m", source="s")


def checked(*findings: Finding) -> Checked:
    return Checked(
        folder="f", kind=Kind.PLAIN, runtimes=(Runtime.VLLM, Runtime.SGLANG), rules=1, findings=tuple(findings)
    )


@pytest.mark.parametrize(
    ("effects", "worst"),
    [
        ((), "loads"),
        ((Effect.SLOWER,), "slower"),
        ((Effect.SLOWER, Effect.WRONG), "silently wrong"),
        ((Effect.WRONG, Effect.REFUSES, Effect.SLOWER), "refuses"),
    ],
)
def test_the_worst_finding_is_the_outcome_and_its_sentence_is_said(effects: tuple[Effect, ...], worst: str) -> None:
    vllm, sglang = outcomes(checked(*(finding(effect, effect.value) for effect in effects)))
    assert (vllm.runtime, vllm.outcome, vllm.findings) == ("vllm", worst, len(effects))
    assert vllm.first == (f"{worst}: it stops." if effects else None)
    assert (sglang.outcome, sglang.findings, sglang.first) == ("loads", 0, None)


def test_a_real_folder_has_a_row_for_each_runtime_that_it_is_made_for(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rows, notes = checks_section([("4 bit", artifact), ("nothing", tmp_path / "empty")])
    found = check_folder(artifact)
    assert [row.runtime for row in rows] == [runtime.value for runtime in found.runtimes]
    assert sum(row.findings for row in rows) == len(found.findings)
    assert {row.subject for row in rows} == {"4 bit"}
    (note,) = notes
    assert note.startswith("nothing was not held against the rules of the runtimes: ")
