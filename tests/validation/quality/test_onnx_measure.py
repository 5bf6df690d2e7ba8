"""ONNX folders as subjects: on either side, against the artifact that they were made of."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from stage_runs import command

from moepress.calibration.corpus import EvaluationCorpus
from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.safetensors.artifact import open_artifact
from moepress.errors import InvalidInputError
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint
from moepress.stages.subjects import elsewhere_subject, open_subject, subject_of, tokenizer_folder
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.onnx_session import Decoding, open_session, read_logits
from moepress.validation.quality.results import Quality
from moepress.validation.quality.scores import score_tokens


def run(subjects: Sequence[Subject], corpus: EvaluationCorpus, folder: Path) -> Quality:
    return measure(
        subjects,
        corpus,
        device=torch.device("cpu"),
        dtype=torch.float32,
        limits=Limits(memory_bytes=1 << 30, batch_windows=8),
        scratch_folder=folder,
    )


@pytest.fixture(scope="module")
def both(artifact: Path, onnx: OnnxFolder) -> dict[str, Subject]:
    """The artifact, read as ONNX Runtime reads it, and its export."""
    exact = dataclasses.replace(open_artifact(artifact), exact=True)
    return {"artifact": subject_of("artifact", exact), "onnx": elsewhere_subject("onnx", onnx)}


@pytest.mark.parametrize("order", [("artifact", "onnx"), ("onnx", "artifact")])
def test_an_export_has_the_quality_of_its_artifact(
    both: dict[str, Subject], corpus: EvaluationCorpus, tmp_path: Path, order: tuple[str, str]
) -> None:
    found = run([both[name] for name in order], corpus, tmp_path)
    for domain in (*corpus.domains, "all windows"):
        first, second = (found.row(name, domain) for name in order)
        assert second.paired is not None
        assert abs(second.paired.kl.value) < 1e-6
        assert second.paired.same_top1.value == 1
        assert second.perplexity.value == pytest.approx(first.perplexity.value, rel=1e-4)
    assert found.runtimes["onnx"].startswith("ONNX Runtime 1.")
    assert found.runtimes["onnx"].endswith("float32 activations, provider CPU")
    assert found.runtimes["artifact"].endswith("float32 on cpu, codes multiplied out in float32")
    assert found.routing == (), "a graph shows no routers"


def test_onnx_on_both_sides_shows_what_int8_activations_cost(
    both: dict[str, Subject], rough_onnx: OnnxFolder, corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    copy = dataclasses.replace(both["onnx"], label="copy")
    found = run([both["onnx"], copy, elsewhere_subject("rough", rough_onnx)], corpus, tmp_path)
    same, rough = found.row("copy").paired, found.row("rough").paired
    assert same is not None
    assert rough is not None
    assert (same.kl.value, same.same_top1.value) == (0, 1)
    assert 1e-5 < rough.kl.value < 0.05
    assert "int8 activations" in found.runtimes["rough"]
    assert [note for note in found.notes if "int8" in note] == [
        "rough: measured with int8 activations, as it was exported (accuracy level 4)."
    ]


def test_logits_are_read_in_any_portions(onnx: OnnxFolder, corpus: EvaluationCorpus) -> None:
    model = open_session(onnx, "cpu")
    whole = torch.cat([Decoding(model).step(window[None, :-1])[0] for window in corpus.windows])
    read = read_logits(model, corpus.windows)
    portions = [1, 29, 2, 100, 31, 5]  # within a window, over its end, over several
    parts = [read(count) for count in (*portions, len(whole) - sum(portions))]
    assert [len(part) for part in parts[:-1]] == portions
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_few_logits_at_a_time_give_the_same_scores(
    both: dict[str, Subject], onnx: OnnxFolder, corpus: EvaluationCorpus
) -> None:
    from moepress.validation.quality.measure import _onnx_pass

    passed = _onnx_pass(onnx, corpus.windows, "cpu")
    whole = score_tokens(passed, passed, corpus.windows)
    part = score_tokens(passed, passed, corpus.windows, logits_bytes=7 * 2048 * 32)
    torch.testing.assert_close(part.nll, whole.nll, rtol=1e-4, atol=1e-4)
    assert part.against is not None
    assert float(part.against.kl.abs().max()) == 0


def test_another_vocabulary_is_refused(
    demo: Checkpoint, onnx: OnnxFolder, corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    other = elsewhere_subject("other", dataclasses.replace(onnx, vocabulary=4096))
    with pytest.raises(InvalidInputError, match="demo has a vocabulary of 2048 and other one of 4096"):
        run([subject_of("demo", demo), other], corpus, tmp_path)
    with pytest.raises(InvalidInputError, match=r"gives 2048 logits and its config\.json has a vocab_size of 4096"):
        run([other], corpus, tmp_path)


def test_sizes_come_from_the_folder(artifact: Path, onnx: OnnxFolder) -> None:
    subject, source = open_subject("a", onnx.folder), open_subject("b", artifact)
    assert isinstance(subject.source, OnnxFolder)
    assert subject.parameters == source.parameters
    files = [f for f in onnx.folder.iterdir() if f.suffix == ".data" or f.name == "model.onnx"]
    assert subject.stored_bytes == sum(f.stat().st_size for f in files)


def test_the_tokenizer_is_that_of_the_first_folder_with_one(demo_folder: Path, onnx: OnnxFolder) -> None:
    assert tokenizer_folder([demo_folder, onnx.folder]) == demo_folder
    assert tokenizer_folder([onnx.folder, demo_folder]) == demo_folder
    with pytest.raises(InvalidInputError, match=f"{onnx.folder} has no tokenizer"):
        tokenizer_folder([onnx.folder, onnx.folder])


def test_validate_takes_onnx_as_before_with_the_tokenizer_of_after(onnx: OnnxFolder, tmp_path: Path) -> None:
    options = ["--max-windows", "1", "--no-throughput", "--json", "-o", tmp_path / "report"]
    code, printed, errors = command("validate", onnx.folder, "demo", *options)
    assert code == 0, errors
    report = json.loads(printed)
    before, after = report["subjects"]
    assert (before["onnx"], after["onnx"]) == (True, False)
    assert (before["experts_per_layer"], before["stored_bytes"]) == (16, onnx.total_bytes)
    assert "onnxruntime" in report["environment"]["versions"]
    (row,) = (r for r in report["quality"]["rows"] if r["subject"] == "after" and r["scope"] == "all")
    assert 0 < row["paired"]["kl"]["value"] < 0.1
    assert "ONNX Runtime" in (tmp_path / "report" / "report.md").read_text()


def test_cuda_that_no_session_gets_is_refused_before_any_work(
    onnx: OnnxFolder, demo_folder: Path, tmp_path: Path
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("sessions may get CUDA here")
    folder = tmp_path / "onnx"
    shutil.copytree(onnx.folder, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder / name, folder)
    code, printed, errors = command("validate", folder, folder, "--device", "cuda")
    assert (code, printed) == (2, "")
    assert "session gets CPUExecutionProvider instead of CUDA" in errors


@pytest.mark.parametrize(
    ("bits", "kernel", "text"),
    [
        (8, "qmoe", "quality is measured with fp32 activations"),
        (2, "qmoe", "rounds the activations of 2-bit experts to int8"),
        (8, "loop", None),
    ],
)
def test_a_kernel_that_rounds_by_itself_is_in_the_notes(
    onnx: OnnxFolder, corpus: EvaluationCorpus, tmp_path: Path, bits: int, kernel: str, text: str | None
) -> None:
    one = dataclasses.replace(onnx, summary=onnx.summary | {"bits": bits, "kernel": kernel})
    notes = [note for note in run([elsewhere_subject("one", one)], corpus, tmp_path).notes if note.startswith("one: ")]
    assert [text in note for note in notes if text] == [True] * (text is not None)
    assert len(notes) == (text is not None)
