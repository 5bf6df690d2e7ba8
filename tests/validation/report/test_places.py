"""A report that is shown to others tells nothing of the machine's folders."""

import json
import shutil
from pathlib import Path

import pytest
from stage_runs import command

from moepress.validation.quality.results import Continuation, Quality, Sample, Samples
from moepress.validation.report.files import write_report
from moepress.validation.report.places import without_places
from moepress.validation.report.schema import Calibration, Report, RuntimeCheck, SubjectInfo

SECRET = "/home/anna/my models"


@pytest.fixture
def report(quality: Quality) -> Report:
    row = Sample(
        domain="german",
        prompt="see /usr/share/dict/words",
        continuations=(Continuation(subject="demo", text=" and /etc/passwd/x", tokens=3, same_tokens=3),),
    )
    return Report(
        title="demo",
        subjects=tuple(SubjectInfo(label=n, stored_bytes=2, parameters=1) for n in ("demo", "copy", "pruned")),
        quality=quality,
        samples=Samples(prompt_tokens=4, tokens=8, rows=(row,)),
        checks=(
            RuntimeCheck(
                subject="demo",
                layout="plain",
                runtime="vllm",
                outcome="refuses",
                findings=1,
                first="/data/x/model.safetensors lacks a tensor: it stops.",
            ),
        ),
        calibration=Calibration(sources=(f"{SECRET}/text.txt", "wiki=/srv/text/a.txt"), embedded=False, tokens=1),
        notes=(
            f"Cannot read {SECRET}/text.txt; mend it.",
            'The folder "/mnt/disk/model" was not read, nor was (~/models/other).',
            "See https://example.org/a/b, tokens/s and pp/tg of 1/2.",
            "From /root/.cache/huggingface/hub/models--org--Big/snapshots/0123abc: read.",
        ),
        commands=(f"moepress validate '{SECRET}/one' /srv/two --data=wiki=/srv/text/a.txt -o out",),
        recipe=f"model: {SECRET}/one\ndata:\n- wiki=/srv/text/a.txt\ntargets_file: null\n",
    )


def test_paths_are_cut_to_names_in_every_field(report: Report) -> None:
    cut = without_places(report)
    assert cut.notes == (
        "Cannot read text.txt; mend it.",
        'The folder "model" was not read, nor was (other).',
        "See https://example.org/a/b, tokens/s and pp/tg of 1/2.",
        "From org/Big@0123abc: read.",
    )
    assert cut.commands == ("moepress validate 'one' two --data=wiki=a.txt -o out",)
    assert cut.recipe == "model: one\ndata:\n- wiki=a.txt\ntargets_file: null\n"
    assert cut.calibration is not None
    assert cut.calibration.sources == ("text.txt", "wiki=a.txt")
    assert cut.checks[0].first == "model.safetensors lacks a tensor: it stops."


def test_what_models_wrote_and_measured_stays_as_it_is(report: Report) -> None:
    cut = without_places(report)
    assert (cut.samples, cut.quality, cut.subjects) == (report.samples, report.quality, report.subjects)
    assert without_places(cut) == cut


def test_no_file_of_the_report_has_a_place_of_this_machine(report: Report, tmp_path: Path) -> None:
    for file in write_report(without_places(report), tmp_path):
        text = file.read_text(encoding="utf-8")
        assert not any(part in text for part in ("anna", "my models", "/srv", "/data/x", "/mnt", "/root")), file


def test_validate_with_absolute_paths_writes_none_of_them(demo_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "a secret place"
    shutil.copytree(demo_folder, place / "model", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    (place / "words.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    out = place / "report"
    arguments = ("--data", place / "words.txt", "--max-windows", "1", "--no-throughput")
    code, _, errors = command("validate", place / "model", place / "model", *arguments, "-o", out)
    assert code == 0, errors
    for file in sorted(out.iterdir()):
        text = file.read_text(encoding="utf-8")
        assert "secret" not in text, file
        assert str(tmp_path) not in text, file
    made = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert made["commands"][0].count("model") >= 2
    assert made["checks"]
