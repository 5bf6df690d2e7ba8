"""The model card: front matter that the hub's own library reads, and what stands below it."""

import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from moepress.converters.safetensors.scheme import Codes
from moepress.hub.snapshot import HubModel, origin_of
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.validation.quality.results import Quality
from moepress.validation.report.model_card import card_metadata, model_card
from moepress.validation.report.schema import Calibration, Pruning, Quantization, Report, SubjectInfo
from moepress.validation.speed.fits import fits_section
from moepress.validation.speed.targets import target_of


@pytest.fixture
def report(quality: Quality) -> Report:
    return Report(
        tool_version="0.1.0",
        created="2026-11-23T13:40:00+00:00",
        title="demo | x",
        subjects=(
            SubjectInfo(label="demo", folder="demo", stored_bytes=9_268_136, parameters=4_618_880),
            SubjectInfo(label="pruned", stored_bytes=3_100_000, parameters=3_045_760, onnx=False),
            SubjectInfo(label="copy", stored_bytes=1, parameters=1, onnx=True),
        ),
        quality=quality,
        pruning=Pruning(criterion="reap", kept=8, total=16),
        quantization=Quantization(scheme="4 bit g32, symmetric"),
        calibration=Calibration(sources=("a.txt",), embedded=False, tokens=4096, seed=3, digest="abcd"),
    )


def published(demo: Checkpoint, folder: Path, card: str | None) -> Checkpoint:
    """The demo in a folder of that name, with a card of its own."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(demo.folder / name, folder / name)
    if card is not None:
        (folder / "README.md").write_text(card)
    return open_checkpoint(folder)


def test_the_hub_s_library_reads_the_front_matter(demo: Checkpoint, report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "models--some-org--Big-MoE-1.5" / "snapshots" / "0123"
    text = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage:\n- de\ntags: [x]\n---\n# Big\n"
    card = ModelCard(model_card(report, published(demo, folder, text), "compressed-tensors"))
    data = card.data.to_dict()
    assert data["base_model"] == "some-org/Big-MoE-1.5"
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "own", "LICENSE")
    assert (data["language"], data["library_name"]) == (["de"], "transformers")
    assert data["tags"] == ["moepress", "moe", "compressed-tensors", "pruned"]
    assert "https://huggingface.co/some-org/Big-MoE-1.5" in card.text
    assert "carried over from its card" in card.text


def test_the_body_says_how_it_was_made_and_what_it_cost(demo: Checkpoint, report: Report) -> None:
    text = model_card(report, demo, "compressed-tensors")
    assert "# demo \\| x, pressed with moepress" in text
    assert "8 of 16 routed experts stay in each layer, chosen by `reap`" in text
    assert "4,096 tokens, seed 3, SHA-256 of the windows `abcd`" in text
    rows = [line for line in text.splitlines() if line.startswith(("| demo", "| pruned", "| copy"))]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| demo", "9.3 MB", "–"],
        ["| pruned, this folder", "3.1 MB", "−67 %"],
    ]
    assert f"{report.overall('pruned').perplexity.value:.2f} ±" in rows[1]
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "whose folder has no card that names it" in text
    assert report.created is not None
    assert report.created not in text
    assert text == model_card(report, demo, "compressed-tensors")


def test_a_runtime_that_reads_the_codes_wrong_is_not_proposed(demo: Checkpoint, report: Report) -> None:
    divided = model_card(report, demo, "compressed-tensors", codes=Codes.NVFP4)
    assert "from_pretrained" not in divided
    assert "vllm serve path/to/this/folder" in divided
    assert "without an error" in divided
    powers = model_card(report, demo, "compressed-tensors", codes=Codes.MXFP4)
    assert powers == model_card(report, demo, "compressed-tensors")


def test_each_export_has_a_row_of_its_own(demo: Checkpoint, report: Report) -> None:
    gptq = model_card(report, demo, "gptq", stored_bytes=3_300_000)
    assert "| pruned, this folder | 3.3 MB |" in gptq
    assert "its quality was measured there" in gptq
    measured = model_card(report, demo, "onnx")
    assert "| copy, this folder | " in measured
    assert "exported from" not in measured
    assert "| copy" not in gptq
    plain = report.model_copy(update={"subjects": report.subjects[:-1]})
    onnx = model_card(plain, demo, "onnx", stored_bytes=4_000_000)
    assert "| pruned, this folder | 4.0 MB |" in onnx
    assert "The quality was measured on the folder that this one was exported from." in onnx


def test_each_layout_says_how_it_is_loaded(demo: Checkpoint, report: Report) -> None:
    assert "GPTQModel.load" in model_card(report, demo, "gptq")
    assert "og.Model(" in model_card(report, demo, "onnx")
    mixed = model_card(report, demo, "compressed-tensors", mixed=True)
    assert "transformers loads such a folder wrong" in mixed
    assert "AutoModelForCausalLM" not in mixed
    bare = report.model_copy(update={"quantization": None, "pruning": None})
    assert "base_model_relation: finetune" in model_card(bare, demo, "compressed-tensors")


@pytest.mark.parametrize(
    "card",
    [
        "no front matter",
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: {a: b}\nlanguage: [1, 2]\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\nlicense: 2026-13-45\ndate: 2026-13-45\n---\n",
    ],
)
def test_somebody_s_broken_card_breaks_nothing(demo: Checkpoint, report: Report, tmp_path: Path, card: str) -> None:
    source = published(demo, tmp_path / "model", card)
    front = yaml.safe_load(model_card(report, source, "compressed-tensors").split("---")[1])
    assert "language" not in front
    assert isinstance(front.get("license", ""), str)


def test_a_licence_beside_the_model_is_named(demo: Checkpoint, report: Report, tmp_path: Path) -> None:
    source = published(demo, tmp_path / "model", None)
    (source.folder / "LICENSE.txt").write_text("MIT")
    assert "see `LICENSE.txt` beside this file" in model_card(report, source, "gptq")


def test_only_the_hub_s_cache_tells_a_model_s_name(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "models--a--b--c" / "snapshots" / "1") == HubModel("a/b--c", "1")
    assert origin_of(tmp_path / "models" / "a") is None
    assert card_metadata(tmp_path) == {}


def test_a_gguf_card_says_which_experts_lie_in_memory(demo: Checkpoint, report: Report) -> None:
    card = target_of("rtx-4090+ddr5-64")
    small = card.model_copy(update={"memory_gib": 0.009})  # not enough for the demo, which then lies in both
    found = fits_section([("copy", demo)], [small], 64, chosen=small.id)
    assert found is not None
    aimed = report.model_copy(update={"targets": found})
    text = model_card(aimed, demo, "gguf")
    row = next(row for row in found.rows if row.target == small.id)
    assert row.cpu_moe > 0
    assert f"-ngl 999 --n-cpu-moe {row.cpu_moe}" in text
    assert "projected" in text
    assert "--n-cpu-moe" not in model_card(aimed, demo, "onnx")
    assert "--n-cpu-moe" not in model_card(report, demo, "gguf")
