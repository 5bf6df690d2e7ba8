"""The report's table of GPUs, for real folders: what they weigh is what they read."""

from pathlib import Path

import pytest

from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.safetensors.artifact import Artifact, open_artifact
from moepress.models.families.family import Part
from moepress.models.forward.inventory import cache_bytes, weigh
from moepress.models.storage.checkpoint import Checkpoint
from moepress.stages.evaluation import Evaluation
from moepress.stages.places import Machine
from moepress.stages.subjects import subject_of
from moepress.stages.validate import validate_stage
from moepress.validation.report.markdown import markdown
from moepress.validation.report.schema import Report
from moepress.validation.speed.fits import fits_section, weights_of
from moepress.validation.speed.targets import Target, Verdict, load_targets

CARD = Target(
    id="tiny", name="Tiny", kind="gaming", memory_gib=9 / 1024, bandwidth_gb_per_second=10, fp16_tflops=1, pcie=None
)


def test_parts_of_a_folder_cover_it(demo: Checkpoint, artifact: Path) -> None:
    assert weights_of(demo) == weigh(demo)
    packed = open_artifact(artifact)
    parts = weights_of(packed)
    assert sum(weight.bytes for weight in parts.values()) == packed.total_bytes
    assert {p: w.parameters for p, w in parts.items()} == {p: w.parameters for p, w in weigh(demo).items()}
    assert parts[Part.ROUTED].bytes < 0.35 * weigh(demo)[Part.ROUTED].bytes
    assert parts[Part.ATTENTION].bytes == weigh(demo)[Part.ATTENTION].bytes


def test_a_token_reads_top_k_of_the_experts_and_no_embeddings(demo: Checkpoint) -> None:
    found = fits_section([("demo", demo)], [CARD], 64)
    assert found is not None
    parts, shape, load = weigh(demo), demo.shape, found.loads[0].load
    rest = demo.total_bytes - parts[Part.ROUTED].bytes - parts[Part.EMBEDDINGS].bytes
    assert load.decode_bytes == rest + parts[Part.ROUTED].bytes * shape.top_k // shape.experts
    assert load.prefill_bytes == demo.total_bytes - parts[Part.EMBEDDINGS].bytes
    assert found.loads[0].cache_bytes == cache_bytes(demo.config, 64)


def test_the_pressed_model_fits_where_the_original_does_not(demo: Checkpoint, artifact: Path, onnx: OnnxFolder) -> None:
    packed: Artifact = open_artifact(artifact)
    found = fits_section([("before", demo), ("after", packed), ("onnx", onnx)], [CARD, *load_targets()], 64)
    assert found is not None
    assert [load.subject for load in found.loads] == ["before", "after"]
    before, after = (row for row in found.rows if row.target == "tiny")
    assert (before.verdict, before.pp512, before.tg128) == (Verdict.NO, None, None)
    assert (after.verdict, after.lacking_bytes) == (Verdict.FITS, 0)
    assert after.needed_bytes == packed.total_bytes + cache_bytes(demo.config, 64)
    assert after.tg128 is not None
    assert after.tg128.kind == "projected"
    assert len(found.rows) == 2 * len(found.table)
    assert fits_section([("onnx", onnx)], [CARD]) is None


def test_validate_s_report_has_the_table(demo: Checkpoint, artifact: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[[target]]\nid = "mine"\nname = "My | GPU"\nkind = "gaming"\nmemory_gib = 0.005\n'
        "bandwidth_gb_per_second = 10\nfp16_tflops = 1\n"
    )
    subjects = [subject_of("before", demo), subject_of("after", open_artifact(artifact))]
    evaluation = Evaluation(window=32, max_windows=1, throughput=False, targets_file=own, context=64, target="My GPU")
    report = validate_stage(subjects, demo.folder, evaluation, Machine(device="cpu"), tmp_path)
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert report.targets is not None
    assert report.targets.context == 64
    assert report.targets.table[-1].id == report.targets.chosen == "mine"
    text = markdown(report)
    assert "## Which GPU holds it (projected)" in text
    (row,) = (line for line in text.splitlines() if line.startswith(r"| **My \| GPU (your target)** |"))
    assert row.count("no, ") == (report.targets.rows[-1].verdict is Verdict.NO) + 1
    (row,) = (line for line in text.splitlines() if line.startswith("| RTX 4090 |"))
    assert row.count("fits; tg ") == 2
    assert "tg128 (tg) and pp512 (pp) are projected" in text


def test_a_context_must_be_the_shortest_of_the_models_where_none_is_named(demo: Checkpoint) -> None:
    found = fits_section([("demo", demo)], [CARD])
    assert found is not None
    assert found.context == min(8192, demo.shape.context)
    assert found.projection.keys() == {"pp512", "tg128"}


@pytest.mark.parametrize("name", ["pp512", "tg128"])
def test_formulas_say_their_bounds(demo: Checkpoint, name: str) -> None:
    found = fits_section([("demo", demo)], [CARD])
    assert found is not None
    assert "low: " in found.projection[name]
    assert "t = 150 us" in found.projection[name]
