"""Folders of published models' headers: what they hold is what is published, and the data is holes."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from r1_models import make_r1
from safetensors import safe_open

FOLDER = Path(make_r1.__file__).parent
# Some of their tensors, written down by hand.
KNOWN = {
    "openai/gpt-oss-20b": {
        "model.embed_tokens.weight": ("BF16", [201088, 2880]),
        "model.layers.0.self_attn.sinks": ("BF16", [64]),
        "model.layers.0.mlp.router.weight": ("BF16", [32, 2880]),
        "model.layers.0.mlp.experts.gate_up_proj_bias": ("BF16", [32, 5760]),
        "model.layers.23.mlp.experts.gate_up_proj_blocks": ("U8", [32, 5760, 90, 16]),
        "model.layers.23.mlp.experts.gate_up_proj_scales": ("U8", [32, 5760, 90]),
        "model.layers.23.mlp.experts.down_proj_blocks": ("U8", [32, 2880, 90, 16]),
    },
    "zai-org/GLM-4.7-Flash": {
        "model.layers.0.mlp.gate_proj.weight": ("BF16", [10240, 2048]),
        "model.layers.46.mlp.experts.63.down_proj.weight": ("BF16", [2048, 1536]),
        "model.layers.46.mlp.gate.e_score_correction_bias": ("F32", [64]),
        "model.layers.47.mlp.experts.63.gate_proj.weight": ("BF16", [1536, 2048]),
        "model.layers.47.eh_proj.weight": ("BF16", [2048, 4096]),
        "model.layers.47.shared_head.head.weight": ("BF16", [154880, 2048]),
    },
}
STATED_SIZES = {"openai/gpt-oss-20b": 13_761_264_768, "zai-org/GLM-4.7-Flash": 2 * 31_221_488_576 + 2 * 47 * 64}


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("real_headers")


def opened(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Every tensor's dtype and shape, as safetensors reads them; each is where the index says."""
    found, index = {}, json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 -- it is no mapping
                part = shard.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
                assert index["weight_map"][name] == file.name
    assert found.keys() == index["weight_map"].keys()
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_a_folder_has_the_published_tensors_and_takes_no_room(real: ModuleType, tmp_path: Path, name: str) -> None:
    model, folder = real.model_of(name), tmp_path / "model"
    rows = real.make(name, folder)
    found = opened(folder)
    assert found == {tensor: (dtype, list(shape)) for tensor, dtype, shape in rows}
    assert len(found) == len(rows)
    assert KNOWN[name].items() <= found.items()
    assert json.loads((folder / "config.json").read_text()) == model.config
    assert real.parameters_of(rows) == pytest.approx(model.parameters, rel=0.01)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(real.size_of, rows)) == STATED_SIZES[name]
    assert real.on_disk(folder) < 10e6 < sum(file.stat().st_size for file in folder.iterdir())


def test_packed_formats_have_the_shapes_of_their_values(real: ModuleType) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    blocks = list(real.fp8([(name, "BF16", (300, 256)), ("lm_head.weight", "BF16", (9, 9))], (128, 128), "lm_head"))
    assert blocks[1:] == [(f"{name}_scale_inv", "F32", (3, 2)), ("lm_head.weight", "BF16", (9, 9))]
    groups = list(real.int4(blocks, 32))
    assert [(row[1], row[2]) for row in groups] == [
        ("I32", (300, 32)),
        ("BF16", (300, 8)),
        ("I64", (2,)),
        ("BF16", (9, 9)),
    ]
    fused = [("model.layers.0.mlp.experts.gate_up_proj", "BF16", (4, 128, 64))]
    packed, single = list(real.mxfp4(fused)), list(real.unfused(fused))
    assert packed[0][2] == (4, 64, 4, 16)
    assert len(single) == 8
    assert {row[2] for row in single} == {(64, 64)}
    for rows, weights in ((blocks, 300 * 256 + 81), (groups, 300 * 256 + 81), (packed, 4 * 128 * 64)):
        assert real.parameters_of(rows) == weights


def test_every_model_says_where_its_facts_are_from(real: ModuleType) -> None:
    assert len({model.folder for model in real.MODELS}) == len(real.MODELS) == 15
    for model in real.MODELS:
        assert model.config_from
        assert model.parameters_from
        assert bool(model.size_from) == (model.size_bytes is not None)
