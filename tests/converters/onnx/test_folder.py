"""An ONNX folder: what lies in it, and what is refused when one is opened."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_runs
import pytest
import tiny_models
from onnx_runs import G16, Models, coded_folder, graph_of
from stage_runs import add_tokenizer, content

from moepress.converters.onnx.export import OnnxRequest
from moepress.converters.onnx.folder import genai_config, is_onnx, open_onnx
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, MoepressError
from moepress.models.families.family import Part
from moepress.stages.export import onnx_stage
from moepress.stages.places import Output
from moepress.validation.rules.onnx_facts import read_graph

LAYER = "model.layer-001.data"


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return onnx_runs.models_of(tiny_model, tmp_path_factory)


@pytest.fixture
def spoiled(models: Models, tmp_path: Path) -> Path:
    """An export in a folder of the test's own."""
    return Path(shutil.copytree(models.onnx(models.quantized("mixtral")), tmp_path / "spoiled"))


def edit_graph(folder: Path, change: Callable[[Any], object]) -> None:
    model = graph_of(folder)
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def places_of(graph: Any, file: str = LAYER) -> list[Any]:
    """The places of all weights in that file, by their rows of key and value."""
    places = [{row.key: row for row in tensor.external_data} for tensor in graph.initializer if tensor.external_data]
    return [place for place in places if place["location"].value == file]


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        open_onnx(folder)


def test_an_export_is_opened_with_what_a_session_needs(models: Models) -> None:
    folder = models.onnx(models.quantized("deepseek_v3"))
    opened = open_onnx(folder)
    assert is_onnx(folder)
    assert not is_onnx(models.quantized("deepseek_v3"))
    assert opened.caches == ((1, 48),) * 3  # the latent and the rotated key, once for all heads
    assert opened.inputs >= {"input_ids", "attention_mask", "past_key_values.2.value"}
    assert (opened.dtype, opened.vocabulary, opened.context) == ("float32", 256, 256)
    assert opened.total_bytes == sum(f.stat().st_size for f in folder.glob("model.*"))
    assert opened.parameters == sum(
        t.numel()
        for t in tiny_models.load_tensors(
            onnx_runs.dequantized(models.quantized("deepseek_v3"), folder.parent / "dense")
        ).values()
    )
    assert not opened.int8_activations
    assert open_onnx(models.onnx(models.quantized("mixtral"), accuracy_level=4)).int8_activations
    assert open_onnx(models.onnx(models.quantized("mixtral"), preset="cuda")).dtype == "float16"


def test_grouped_queries_have_a_cache_of_key_heads(models: Models) -> None:
    assert open_onnx(models.onnx(models.quantized("qwen3_moe"))).caches == ((2, 32),) * 3


def test_companions_go_along_without_traces_of_the_layout(models: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.quantized("mixtral"), tmp_path / "quantized"))
    add_tokenizer(folder)
    (folder / "LICENSE").write_bytes(b"licence\xff")
    out = onnx_runs.to_onnx(folder, tmp_path / "onnx")
    found, before = content(out), content(folder)
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert found[name] == before[name]
    assert json.loads(found["config.json"]) == {
        k: v for k, v in json.loads(before["config.json"]).items() if k != "quantization_config"
    }
    summary = json.loads(found["moepress.json"])
    wanted = {"stage": "export", "target": "onnx", "for": "cpu", "dtype": "float32", "kernel": "qmoe", "bits": 4}
    assert {key: summary[key] for key in wanted} == wanted
    assert summary["experts"] == {"0": 4, "1": 4, "2": 4}
    assert not [name for name in found if name.endswith((".safetensors", ".index.json", ".tmp"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx", "quantized"]


def test_the_genai_config_describes_the_graph(models: Models) -> None:
    folder = models.onnx(models.quantized("deepseek_v2"))
    found = json.loads((folder / "genai_config.json").read_text())
    model, decoder = found["model"], found["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("decoder", 256, 256)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (0, 1, 1)
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (48, 1, 3)
    assert decoder["filename"] == "model.onnx"
    graph = graph_of(folder).graph
    names = {value.name for value in [*graph.input, *graph.output]}
    for value in [*decoder["inputs"].values(), *decoder["outputs"].values()]:
        assert {value.replace("%d", str(layer)) for layer in range(3)} <= names
    assert decoder["session_options"]["provider_options"] == []
    assert found["search"]["max_length"] == 256


CONFIG = {"vocab_size": 90, "hidden_size": 4, "eos_token_id": 1, "bos_token_id": 0}


def genai_of(generation: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, Any]:
    given = CONFIG | (config or {})
    return genai_config(given, generation, [(2, 8)], context=100_000, heads=2, cuda=True, folder=Path("/from"))


def test_what_generation_config_states_wins_in_the_genai_config() -> None:
    found = genai_of({"eos_token_id": [5, 6], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9})
    model, search = found["model"], found["search"]
    assert (model["eos_token_id"], model["pad_token_id"], model["bos_token_id"]) == ([5, 6], 5, 0)
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.6, 20, 0.9)
    assert (model["context_length"], search["max_length"]) == (100_000, 4096)  # genai allocates all of it at once
    assert model["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ({}, {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}),
        ({"top_k": None, "top_p": None, "temperature": None, "do_sample": None}, {"top_k": 50, "top_p": 1.0}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.0}, {"do_sample": True, "top_k": 0, "top_p": 0.0}),
        ({"do_sample": True, "temperature": 0.0}, {"do_sample": False, "temperature": 1.0}),  # greedy
        ({"do_sample": True, "temperature": 2, "top_k": 1000}, {"do_sample": True, "temperature": 2.0, "top_k": 90}),
    ],
)
def test_sampling_is_what_was_stated_zero_included(stated: dict[str, Any], wanted: dict[str, Any]) -> None:
    search = genai_of(stated)["search"]
    assert {key: search[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("temperature", value) for value in ("hot", -1, True, [1], float("nan"), float("inf"), 10**400)],
        *[("top_p", value) for value in (1.5, "all")],
        *[("top_k", value) for value in (-1, 2.5, "many", True, 1 << 31)],
        *[("repetition_penalty", value) for value in (0, "none")],
        *[("do_sample", value) for value in (1, "yes")],
        *[("eos_token_id", value) for value in ("</s>", 90, [1, "x"], [1, 90], -2, 1.0, True, {})],
        *[("bos_token_id", value) for value in ("<s>", [0], 1 << 31)],
        ("pad_token_id", "<pad>"),
    ],
)
def test_values_that_genai_cannot_take_are_refused_by_file_and_key(key: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=f"^/from/generation_config.json: {key} is "):
        genai_of({key: value})
    if key.endswith("_id"):
        with pytest.raises(InvalidInputError, match=f"^/from/config.json: {key} is "):
            genai_of({}, {key: value})


def test_tokens_that_are_none_are_left_out() -> None:
    model = genai_of({"pad_token_id": -1, "eos_token_id": []}, {"bos_token_id": None})["model"]
    assert not {"pad_token_id", "eos_token_id", "bos_token_id"} & model.keys()


def test_a_context_that_only_the_config_class_knows_is_the_same_everywhere(
    tiny_copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_copy("olmoe")
    tiny_models.edit_config(folder, max_position_embeddings=...)
    out = onnx_runs.to_onnx(folder, tmp_path / "onnx")
    (rows,) = {t.dims[0] for t in graph_of(out).graph.initializer if "rotary_emb" in t.name}
    assert rows == 4096  # OlmoeConfig's
    stated = {name: json.loads((out / name).read_text()) for name in ("config.json", "genai_config.json")}
    assert stated["config.json"]["max_position_embeddings"] == rows
    assert stated["genai_config.json"]["model"]["context_length"] == rows
    opened = open_onnx(out)
    assert (opened.context, opened.summary["context"]) == (rows, rows)
    tiny_models.edit_config(out, max_position_embeddings=9000)
    assert open_onnx(out).context == rows


@pytest.mark.parametrize(
    "location",
    [
        "weights/model.data",
        "../spoiled/" + LAYER,
        "..",
        ".",
        "",
        "/etc/hostname",
        "./" + LAYER,
        "C:\\model.data",
        "..\\model.data",
        "\\\\host\\share",
        "a/../" + LAYER,
    ],
)
def test_weights_in_other_places_than_the_folder_are_refused(spoiled: Path, location: str) -> None:
    (spoiled / "weights").mkdir()
    shutil.copy(spoiled / LAYER, spoiled / "weights" / "model.data")

    def move(graph: Any) -> None:
        for place in places_of(graph):
            place["location"].value = location

    edit_graph(spoiled, move)
    refused(spoiled, "which leads out of the folder; refused")


def test_an_absolute_path_into_the_folder_is_refused_too(spoiled: Path) -> None:
    edit_graph(spoiled, lambda graph: setattr(places_of(graph)[0]["location"], "value", str(spoiled / LAYER)))
    refused(spoiled, "leads out of the folder")


def test_links_are_refused(spoiled: Path, tmp_path: Path) -> None:
    shutil.move(spoiled / LAYER, tmp_path / "elsewhere")
    (spoiled / LAYER).symlink_to(tmp_path / "elsewhere")
    refused(spoiled, f"{LAYER} is a link")
    (spoiled / LAYER).unlink()
    os.link(tmp_path / "elsewhere", spoiled / LAYER)
    refused(spoiled, f"{LAYER} is a link")
    (tmp_path / "elsewhere").unlink()
    open_onnx(spoiled)


def test_missing_and_short_files_are_refused(spoiled: Path) -> None:
    file = spoiled / LAYER
    size = file.stat().st_size
    os.truncate(file, size - 1)
    refused(spoiled, f"{LAYER} has {size - 1} bytes and model.onnx wants {size}; copy or export it again")
    file.unlink()
    refused(spoiled, f"names {LAYER}, which is missing")
    file.mkdir()
    refused(spoiled, f"names {LAYER}, which is missing")


@pytest.mark.parametrize("value", ["many", "-4096", "1.5", "1" * 5000])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_places_that_are_no_numbers_are_refused(spoiled: Path, key: str, value: str) -> None:
    edit_graph(spoiled, lambda graph: setattr(places_of(graph)[-1][key], "value", value))
    refused(spoiled, "has no sound place")


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x08", b"not a model at all", b"\x00" * 4096])
def test_files_that_are_no_graph_are_refused(spoiled: Path, data: bytes) -> None:
    (spoiled / "model.onnx").write_bytes(data)
    refused(spoiled, r"is not a readable ONNX model|is not a decoder with a KV cache")


def test_a_graph_cut_short_is_refused(spoiled: Path) -> None:
    file = spoiled / "model.onnx"
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MoepressError):
            open_onnx(spoiled)


@pytest.mark.parametrize("name", [b"input_ids", b"logits", b"location", b"past_key_values", b"com.microsoft"])
def test_a_name_in_a_graph_that_is_no_text_is_refused(spoiled: Path, name: bytes) -> None:
    file = spoiled / "model.onnx"
    assert name in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(name, b"\xff" + name[1:]))
    refused(spoiled, "is not a readable ONNX model")
    with pytest.raises(InvalidInputError, match="is not a readable ONNX model"):
        read_graph(spoiled)


def test_a_graph_that_is_no_decoder_is_refused(spoiled: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    ends = [info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "neg", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph), spoiled / "model.onnx")
    refused(spoiled, "is not a decoder with a KV cache .* `moepress export --to onnx`")


def test_a_cache_without_a_shape_or_of_another_dtype_is_refused(spoiled: Path) -> None:
    def value_of(graph: Any) -> Any:
        return next(value for value in graph.input if value.name == "past_key_values.1.key").type.tensor_type

    edit_graph(spoiled, lambda graph: value_of(graph).shape.dim[1].Clear())
    refused(spoiled, "does not state the shape of layer 1's cache")
    edit_graph(spoiled, lambda graph: value_of(graph).ClearField("shape"))
    refused(spoiled, "does not state the shape of layer 1's cache")

    def double(graph: Any) -> None:
        for value in graph.input:
            if value.name.startswith("past"):
                value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE

    edit_graph(spoiled, double)
    refused(spoiled, "does not state|neither float32 nor float16")


@pytest.mark.parametrize("value", [-4, (1 << 20) + 1, (1 << 63) - 1])
@pytest.mark.parametrize("axis", [1, 3])
def test_a_cache_of_an_absurd_size_is_refused(spoiled: Path, axis: int, value: int) -> None:
    def change(graph: Any) -> None:
        cache = next(value for value in graph.input if value.name == "past_key_values.1.key")
        cache.type.tensor_type.shape.dim[axis].dim_value = value

    edit_graph(spoiled, change)
    refused(spoiled, f"layer 1's cache has .*{value}.* which is no size")


def test_a_folder_without_a_sound_config_is_refused(spoiled: Path) -> None:
    (spoiled / "moepress.json").write_text("[]")
    refused(spoiled, "moepress.json does not hold a JSON object")
    (spoiled / "moepress.json").unlink()
    assert open_onnx(spoiled).summary == {}
    before = (spoiled / "config.json").read_text()
    for key in ("vocab_size", "max_position_embeddings"):
        for value in ("many", -1, [256]):
            tiny_models.edit_config(spoiled, **{key: value})
            refused(spoiled, f"config.json: {key} is .* which is no size")
            (spoiled / "config.json").write_text(before)
    (spoiled / "config.json").unlink()
    refused(spoiled, "has no config.json")


def test_an_export_knows_its_scheme(models: Models) -> None:
    assert open_onnx(models.onnx(models.quantized("olmoe"))).summary["group_size"] == 16
    assert open_onnx(models.onnx(models.tiny("olmoe"))).summary["bits"] is None
    assert open_artifact(models.quantized("olmoe")).scheme.group_size == 16


def test_int8_activations_are_not_claimed_of_a_graph_without_codes(models: Models, tmp_path: Path) -> None:
    plain = onnx_stage(
        str(models.tiny("olmoe")), Output(folder=tmp_path / "plain"), OnnxRequest(accuracy_level=4), check=False
    )
    assert "--accuracy-level 4 had no effect: the graph has no codes." in plain.notes
    opened = open_onnx(tmp_path / "plain")
    assert (opened.summary["accuracy_level"], opened.summary["experts_bits"]) == (0, {})
    assert opened.summary["notes"] == list(plain.notes)
    assert not opened.int8_activations


@pytest.mark.parametrize(
    ("experts", "attention", "kernel", "bits", "layers", "noted"),
    [
        (G16, Scheme(bits=8, group_size=32), "qmoe", 4, {"0": 4, "1": 4, "2": 4}, None),
        (Scheme(bits=8, group_size=32), G16, "qmoe", None, {"0": 8, "1": 8, "2": 8}, "8-bit"),
        (Scheme(bits=8, group_size=32), G16, "loop", None, {"0": 8, "1": 8, "2": 8}, None),
        (Scheme(bits=2, group_size=32), None, "qmoe", 2, {"0": 2, "1": 2, "2": 2}, "2-bit"),
        (Scheme(bits=2, group_size=16), None, "qmoe", 2, {"0": 2, "1": 2, "2": 2}, None),  # that kernel is exact
        (None, Scheme(bits=4, group_size=32), "qmoe", 4, {}, None),
    ],
)
def test_the_summary_says_which_widths_the_graph_has(
    models: Models,
    tmp_path: Path,
    experts: Scheme | None,
    attention: Scheme | None,
    kernel: Any,
    bits: int | None,
    layers: dict[str, int],
    noted: str | None,
) -> None:
    folder = coded_folder(
        models.tiny("olmoe"),
        tmp_path / "coded",
        lambda name: experts if ".experts." in name else attention,
        [Part.ROUTED, Part.ATTENTION],
    )
    made = onnx_stage(str(folder), Output(folder=tmp_path / "onnx"), OnnxRequest(kernel=kernel), check=False)
    summary = open_onnx(tmp_path / "onnx").summary
    assert (summary["bits"], summary["experts_bits"], summary["accuracy_level"]) == (bits, layers, 0)
    assert [note.partition(" experts")[0].split()[-1] for note in made.notes if "bit experts" in note] == (
        [noted] if noted else []
    )


def test_layers_of_several_widths_are_listed(models: Models, tmp_path: Path) -> None:
    def scheme(module: str) -> Scheme | None:
        if ".layers.0." in module:
            return None
        return Scheme(bits=8, group_size=16) if ".layers.1." in module and "down_proj" in module else G16

    folder = coded_folder(models.tiny("olmoe"), tmp_path / "coded", scheme, [Part.ROUTED])
    summary = open_onnx(onnx_runs.to_onnx(folder, tmp_path / "onnx", kernel="loop")).summary
    assert (summary["bits"], summary["group_size"], summary["experts_bits"]) == (None, 16, {"1": [4, 8], "2": 4})
