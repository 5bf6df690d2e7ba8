"""Spoiled files beside the weights: tokenizers, settings of generation, cards, ONNX folders."""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from mutations import spoiled_bytes
from onnx_runs import to_onnx
from spoiling import Spoiler, checked, outcome, spoil_json
from stage_runs import G32, add_tokenizer, keep_of, quantized_folder
from tiny_models import windows

from moepress.converters.onnx.folder import open_onnx
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.tokenizer import read_tokenizer
from moepress.validation.quality.decoding import stop_tokens
from moepress.validation.report.model_card import plain_card

CARD = "---\nlicense: mit\nbase_model: a/b\ntags: [x, y]\nmodel-index: [{name: x}]\n---\n# Model\n"


def spoil_bytes(name: str) -> Spoiler:
    def spoil(folder: Path, draw: random.Random) -> None:
        (folder / name).write_bytes(spoiled_bytes((folder / name).read_bytes(), draw))

    return spoil


def opened(folder: Path) -> None:
    found = open_onnx(folder)
    assert found.context >= 0
    assert found.vocabulary >= 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("beside")
    model = place / "model"
    shutil.copytree(tiny_model("qwen2_moe"), model)
    add_tokenizer(model)
    (model / "README.md").write_text(CARD)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": true}')
    text = windows(open_checkpoint(model).shape.vocabulary, count=2, length=16)
    quantized_folder(model, text, place / "codes", keep=keep_of(open_checkpoint(model), 8), scheme=G32)
    return {"model": model, "onnx": to_onnx(place / "codes", place / "onnx")}


def card(folder: Path) -> None:
    plain_card(folder, folder)


KINDS: dict[str, tuple[str, Spoiler, Callable[[Path], object], float]] = {
    "tokenizer.json": ("model", spoil_json("tokenizer.json"), read_tokenizer, 0.1),
    "tokenizer_config.json": ("model", spoil_json("tokenizer_config.json"), read_tokenizer, 0.1),
    "generation_config.json": (
        "model",
        spoil_json("generation_config.json"),
        lambda folder: stop_tokens(folder, None),
        0.1,
    ),
    "card": ("model", spoil_bytes("README.md"), card, 0.1),
    "card's config": ("model", spoil_json("config.json"), card, 0.1),
    "ONNX config": ("onnx", spoil_json("config.json"), opened, 0.1),
    "ONNX config checked": ("onnx", spoil_json("config.json"), checked, 0.1),
    "ONNX summary": ("onnx", spoil_json("moepress.json"), opened, 0.1),
    "ONNX generation": ("onnx", spoil_json("genai_config.json"), opened, 0.1),
    "ONNX generation checked": ("onnx", spoil_json("genai_config.json"), checked, 0.1),
    "graph": ("onnx", spoil_bytes("model.onnx"), opened, 0.1),
    "graph checked": ("onnx", spoil_bytes("model.onnx"), checked, 0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_files_beside_the_weights_end_with_a_sentence(
    whole: dict[str, Path], tmp_path: Path, kind: str, fuzz: tuple[int, int]
) -> None:
    inputs, seed = fuzz
    what, spoil, work, share = KINDS[kind]
    for number in range(max(4, round(inputs * share / 4))):
        draw = random.Random(f"{seed}-{kind}-{number}")
        folder = tmp_path / "spoiled"
        shutil.copytree(whole[what], folder)
        try:
            spoil(folder, draw)
            outcome(partial(work, folder))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind}, input {number}: {error!r}") from error
        finally:
            shutil.rmtree(folder)
        assert list(tmp_path.iterdir()) == []
