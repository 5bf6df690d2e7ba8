"""`run --scheme` and `plan --scheme`: 4-bit floats on the way of one command, held against the stages by hand."""

import json
from pathlib import Path
from typing import Any

import every_family
import gguf
import pytest
import tiny_storages
import torch
from byte_tokenizer import byte_tokenizer
from stage_runs import command, content

from moepress.compress.gptq.include import Include
from moepress.compress.pruning.plan import load_plan
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.runs.files import sha256_of
from moepress.stages.run.recipe import make_recipe, settled
from moepress.stages.run.recipe_file import load_recipe
from moepress.validation.report.schema import Report

TEXT = ("--tokens", "1024", "--window", "64")
MACHINE = ("--max-memory", "1GiB")
RUN = ("run", "demo", "--scheme", "mxfp4", *TEXT, *MACHINE, "--max-windows", "1", "--no-throughput", "--to", "gguf")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended; not to be changed."""
    out = tmp_path_factory.mktemp("run") / "out"
    code, _, said = command(*RUN, "-o", out)
    assert code == 0, said
    return out


def test_a_run_makes_what_the_stages_make_by_hand(finished: Path, tmp_path: Path) -> None:
    by_hand: list[tuple[Any, ...]] = [
        ("profile", "demo", *TEXT, *MACHINE, "--no-bit-losses", "-o", tmp_path / "profile"),
        ("plan", tmp_path / "profile", "--keep", "0.75", "--scheme", "mxfp4", "-o", tmp_path / "plan.json"),
        ("quantize", "demo", "--plan", tmp_path / "plan.json", *TEXT, *MACHINE, "-o", tmp_path / "model"),
        ("export", tmp_path / "model", "--to", "gguf", "-o", tmp_path / "demo.gguf"),
    ]
    for words in by_hand:
        code, _, said = command(*words)
        assert code == 0, said
    assert (tmp_path / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    made, ours = content(finished / "model"), content(tmp_path / "model")
    assert made.keys() - ours.keys() == {"README.md"}
    assert {name: made[name] for name in ours} == ours
    (file,) = (finished / "exports" / "gguf").glob("*.gguf")
    assert file.stat().st_size == pytest.approx((tmp_path / "demo.gguf").stat().st_size, rel=1e-3)  # their names differ


def test_a_plan_says_what_codes_are_and_how_large_they_will_be(finished: Path) -> None:
    written = json.loads((finished / "plan.json").read_text())
    assert written["quantization"] == {"bits": 4, "group_size": 32, "codes": "mxfp4"}
    assert (written["include"], written["part_bits"]) == (["attention", "dense", "shared"], {})
    plan, artifact = load_plan(finished / "plan.json"), open_artifact(finished / "model")
    assert plan.quantization is not None
    assert plan.quantization.scheme() == artifact.scheme == Scheme.of_floats(Codes.MXFP4)
    assert plan.sizes.after_bytes == artifact.total_bytes
    code, shown, _ = command("plan", finished / "profile", "--keep", "0.75", "--scheme", "nvfp4")
    assert (code, ", NVFP4)" in shown) == (0, True)


def test_report_and_card_name_the_format(finished: Path) -> None:
    report = Report.model_validate_json((finished / "report.json").read_text())
    labels = [subject.label for subject in report.subjects]
    assert labels[:3] == ["original", "pruned", "pruned + MXFP4"]
    assert not [label for label in labels if "bit" in label]
    assert report.quantization is not None
    assert report.quantization.scheme == "MXFP4, 4-bit floats in groups of 32"
    for name in ("model", "exports/gguf"):
        assert (
            "quantized with GPTQ: MXFP4, 4-bit floats in groups of 32." in (finished / name / "README.md").read_text()
        )


def test_the_recipe_left_behind_asks_for_the_same(finished: Path, tmp_path: Path) -> None:
    written = load_recipe(finished / "recipe.yaml")
    assert [written[name] for name in ("scheme", "bits", "group_size", "part_bits")] == ["mxfp4", None, None, {}]
    out = tmp_path / "out"
    code, shown, said = command("run", "--recipe", finished / "recipe.yaml", "-o", out, "--dry-run", "--json")
    assert code == 0, said
    found = json.loads(shown)
    machine = ("device", "dtype", "max_memory")
    assert {k: v for k, v in found["recipe"].items() if k not in machine} == {
        k: v for k, v in written.items() if k not in machine
    }


def test_a_dry_run_knows_the_sizes(finished: Path, tmp_path: Path) -> None:
    code, shown, said = command(*RUN, "-o", tmp_path / "out", "--dry-run", "--json")
    assert code == 0, said
    found, artifact = json.loads(shown), open_artifact(finished / "model")
    assert (found["scheme"], found["bits"], found["group_size"]) == ("mxfp4", 4, 32)
    assert found["sizes"]["after_bytes"] == artifact.total_bytes
    assert found["quantize"]["output_bytes"] == pytest.approx(artifact.total_bytes, rel=0.002)
    assert found["quantize"]["seconds"] > 0
    (file,) = (finished / "exports" / "gguf").glob("*.gguf")
    tensors = file.stat().st_size - gguf.GGUFReader(file).data_offset  # before them is the tokenizer
    assert found["export-gguf"]["output_bytes"] == pytest.approx(tensors, rel=0.01)
    assert not (tmp_path / "out").exists()


def test_a_resume_with_another_format_is_refused_in_one_sentence(finished: Path) -> None:
    before = sha256_of(finished / "model" / "config.json")
    code, _, said = command(*RUN, "--scheme", "nvfp4", "--to", "", "-o", finished, "--resume")
    assert (code, "--scheme was mxfp4, now nvfp4. " in said) == (2, True)
    assert "--bits" not in said.splitlines()[-1]
    assert sha256_of(finished / "model" / "config.json") == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--bits", "4"), 2, "--bits and --group-size do not go with --scheme"),
        (("--bits", "attention=8"), 2, "--bits and --group-size do not go with --scheme"),
        (("--group-size", "16"), 2, "--bits and --group-size do not go with --scheme"),
        (("--grid", "q4_0"), 2, "--grid does not go with --scheme"),
        (("--positive-scales",), 2, "always positive"),
        (("--asymmetric",), 2, "no zero points"),
        (("--budget", "5MiB"), 2, "--budget, --target and --mixed-bits choose bits"),
        (("--budget", "5MiB", "--to", "gguf"), 2, "--budget, --target and --mixed-bits choose bits"),
        (("--target", "rtx-3090"), 2, "--budget, --target and --mixed-bits choose bits"),
        (("--mixed-bits",), 2, "--budget, --target and --mixed-bits choose bits"),
        (("--to", "gptq"), 5, "nvfp4 floats, which --to gptq does not take"),
        (("--to", "onnx"), 5, "nvfp4 floats, which --to onnx does not take"),
        (("--to", "gguf"), 5, "nvfp4 floats, which --to gguf does not take"),
        (("--scheme", "mxfp4", "--to", "gguf,gptq"), 5, "mxfp4 floats, which --to gptq does not take"),
    ],
)
def test_a_run_refuses_what_makes_no_sense_together(
    options: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    found = command("run", "demo", "--scheme", "nvfp4", *TEXT, *options, "-o", tmp_path / "out")
    assert (found[0], message in found[2], found[2].count("\n")) == (code, True, 1), found[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "8"), "--bits and --group-size do not go with --scheme"),
        (("--bits", "attention=8"), "--bits and --group-size do not go with --scheme"),
        (("--group-size", "32"), "--bits and --group-size do not go with --scheme"),
        (("--budget", "5MiB"), "--budget, --target and --mixed-bits choose bits"),
        (("--target", "rtx-3090"), "--budget, --target and --mixed-bits choose bits"),
        (("--to", "gguf"), "--to gguf chooses types of GGUF"),
        (("--no-quantization",), "--no-quantization does not go with --scheme"),
    ],
)
def test_a_plan_refuses_what_makes_no_sense_together(
    options: tuple[str, ...], message: str, finished: Path, tmp_path: Path
) -> None:
    words = (
        "plan",
        finished / "profile",
        "--keep",
        "0.75",
        "--scheme",
        "mxfp4",
        *options,
        "-o",
        tmp_path / "plan.json",
    )
    code, _, said = command(*words)
    assert (code, message in said, said.count("\n")) == (2, True, 1), said
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "4"), "--bits and --group-size do not go with this plan's mxfp4"),
        (("--group-size", "64"), "--bits and --group-size do not go with this plan's mxfp4"),
        (("--grid", "q4_0"), "--grid does not go with this plan's mxfp4"),
        (("--positive-scales",), "always positive"),
        (("--asymmetric",), "no zero points"),
    ],
)
def test_a_plan_of_floats_is_not_made_one_of_integers(
    options: tuple[str, ...], message: str, finished: Path, tmp_path: Path
) -> None:
    words = ("quantize", "demo", "--plan", finished / "plan.json", *TEXT, *options, "-o", tmp_path / "out")
    code, _, said = command(*words)
    assert (code, message in said, said.count("\n")) == (2, True, 1), said


def test_another_format_than_the_plan_s_is_taken_and_said(finished: Path, tmp_path: Path) -> None:
    words = ("quantize", "demo", "--plan", finished / "plan.json", *TEXT, "-o", tmp_path / "out", "--dry-run")
    note = "--scheme was given: the plan's bits are left aside."
    for name, told in (("nvfp4", True), ("mxfp4", False)):
        code, _, said = command(*words, "--scheme", name)
        assert (code, note in said) == (0, told), said


def test_a_model_that_has_four_bits_already_is_quantized_where_a_format_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    every_family.save(every_family.build("gpt_oss"), folder, dtype=torch.bfloat16)
    tiny_storages.to_mxfp4(folder)
    byte_tokenizer(folder)
    checkpoint, recipe = open_checkpoint(folder), {"model": str(folder), "keep": 0.5}
    assert settled(make_recipe(recipe), checkpoint).scheme is None
    known = settled(make_recipe(recipe | {"scheme": "mxfp4", "include": ["attention"]}), checkpoint)
    assert known.scheme == Scheme.of_floats(Codes.MXFP4)
    assert known.include == {Include.ATTENTION: None}
