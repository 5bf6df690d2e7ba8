"""Rules about what config.json and file names state: each is broken in a real folder and found with its effect."""

import shutil

import pytest
import tiny_models
import torch
from check_folders import Copies, edit_json, found
from safetensors.torch import save_file

from moepress.models.storage.folder import SINGLE
from moepress.validation.rules.check import check_folder
from moepress.validation.rules.facts import Kind
from moepress.validation.rules.findings import Effect, Runtime

REFUSES, WRONG = Effect.REFUSES, Effect.WRONG
SERVERS, BY_MODULE = (Runtime.VLLM, Runtime.SGLANG), (Runtime.TRANSFORMERS, Runtime.GPTQMODEL)
RULES = ("one-set-of-weights", "tensor-names", "quantization-stated", "architectures", "tied-head")


@pytest.mark.parametrize("layout", ["original", "pruned", "compressed", "gptq"])
def test_sound_outputs_break_none_of_these_rules(copy: Copies, layout: str) -> None:
    folder = copy(layout)
    assert [found(folder, rule) for rule in RULES] == [{}] * len(RULES)


def test_a_single_file_beside_an_index_is_loaded_in_place_of_it(copy: Copies) -> None:
    folder = copy("original")
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / SINGLE)
    assert found(folder, "one-set-of-weights") == dict.fromkeys(BY_MODULE, WRONG)


def test_weights_in_mistrals_own_format_beside_the_model_break_no_rule(copy: Copies) -> None:
    folder = copy("original", "mixtral")
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, folder / "consolidated.safetensors")
    assert not check_folder(folder).failing


def test_names_without_their_prefix_are_one_finding(copy: Copies) -> None:
    folder = copy("original")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    tiny_models.rewrite(folder, rename)
    expected = dict.fromkeys((*SERVERS, Runtime.LLAMA_CPP), REFUSES) | dict.fromkeys(BY_MODULE, WRONG)
    assert found(folder, "tensor-names") == expected
    assert found(folder, "tensors-complete") == {}


def test_a_quantization_that_no_tensor_has(copy: Copies) -> None:
    folder = copy("original")
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=stated))
    expected = dict.fromkeys((*SERVERS, Runtime.GPTQMODEL), WRONG) | {Runtime.LLAMA_CPP: REFUSES}
    assert found(folder, "quantization-stated") == expected


def test_a_config_without_architectures(copy: Copies) -> None:
    folder = copy("compressed")
    edit_json(folder / "config.json", lambda config: config.pop("architectures"))
    assert found(folder, "architectures") == dict.fromkeys((*SERVERS, Runtime.LLAMA_CPP), REFUSES)


def test_a_head_of_its_own_under_a_config_that_ties_it(copy: Copies) -> None:
    folder = copy("original")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    assert found(folder, "tied-head") == dict.fromkeys((*SERVERS, Runtime.LLAMA_CPP), WRONG)
    tiny_models.rewrite(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    assert found(folder, "tied-head") == {}


def test_scales_of_a_kv_cache_are_no_surplus(copy: Copies) -> None:
    folder = copy("original")
    scale = "model.layers.0.self_attn.k_scale"
    tiny_models.rewrite(folder, lambda tensors: tensors.update({scale: torch.ones(())}))
    assert found(folder, "tensors-complete") == {}


def test_weights_in_a_foreign_form_are_named_for_every_runtime(copy: Copies) -> None:
    folder, name = copy("original"), "model.layers.0.self_attn.q_proj"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight"] = torch.zeros(128, 16, dtype=torch.uint32)
        tensors[f"{name}.scales"] = torch.ones(128, 4)

    tiny_models.rewrite(folder, quantize)
    checked = check_folder(folder)
    assert checked.kind is Kind.OTHER
    assert any("stored as MLX" in finding.what for finding in checked.failing)
