"""`export --to gptq --names transformers`: the same codes under the names that GPTQModel looks for."""

from pathlib import Path

import pytest
import tiny_models
from check_folders import Outputs, found
from stage_runs import command, content

from moepress.converters.safetensors.names import in_transformers
from moepress.models.families.table import FAMILIES
from moepress.validation.rules.findings import Effect, Runtime

LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture(scope="module")
def outputs(tiny_model: object, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return Outputs(folder=tmp_path_factory.mktemp("outputs"), tiny=tiny_model)  # type: ignore[arg-type]


def named(outputs: Outputs, key: str, out: Path) -> str:
    code, _, said = command("export", outputs.compressed(key), "--to", "gptq", "--names", "transformers", "-o", out)
    assert code == 0, said
    return said


def test_mixtrals_experts_get_the_names_of_the_modules_and_nothing_else_changes(
    outputs: Outputs, tmp_path: Path
) -> None:
    named(outputs, "mixtral", tmp_path / "out")
    hub, own = tiny_models.load_tensors(outputs.gptq("mixtral")), tiny_models.load_tensors(tmp_path / "out")
    assert len(hub) == len(own)
    for name, tensor in hub.items():
        other = name.replace(".block_sparse_moe.", ".mlp.")
        for letter, leaf in LEAVES.items():
            other = other.replace(f".{letter}.", f".{leaf}.")
        assert own[other].equal(tensor), name
    assert "block_sparse_moe" not in "".join(own)
    written = (tmp_path / "out" / "quantize_config.json").read_text()
    assert "block_sparse_moe" not in written
    assert r"mlp\\.gate$" in written


def test_where_names_are_the_same_a_note_says_so(outputs: Outputs, tmp_path: Path) -> None:
    said = named(outputs, "qwen3_moe", tmp_path / "out")
    assert "The names of qwen3_moe are the same on the hub and in transformers" in said
    hub, own = content(outputs.gptq("qwen3_moe")), content(tmp_path / "out")
    assert {n: b for n, b in hub.items() if n != "moepress.json"} == {
        n: b for n, b in own.items() if n != "moepress.json"
    }


def test_names_are_for_gptq_alone(outputs: Outputs, tmp_path: Path) -> None:
    words = ("export", outputs.gptq("mixtral"), "--to", "compressed-tensors", "-o", tmp_path / "out")
    code, _, said = command(*words, "--names", "transformers")
    assert (code, said) == (2, "Error: --names goes with --to gptq only.\n")


def test_check_knows_which_runtime_wants_which_names(outputs: Outputs, tmp_path: Path) -> None:
    named(outputs, "mixtral", tmp_path / "out")
    hub = outputs.gptq("mixtral")
    assert found(hub, "gptqmodel-names") == {Runtime.GPTQMODEL: Effect.REFUSES}
    assert found(hub, "expert-names") == {}
    assert found(tmp_path / "out", "gptqmodel-names") == {}
    expected = {Runtime.VLLM: Effect.REFUSES, Runtime.TRANSFORMERS: Effect.WRONG}
    assert found(tmp_path / "out", "expert-names") == expected
    code, printed, _ = command("check", tmp_path / "out", "--runtime", "gptqmodel")
    assert code == 0, printed
    code, printed, _ = command("check", hub, "--runtime", "gptqmodel")
    assert code == 4
    assert "--names transformers" in printed


def test_a_folder_with_such_names_is_refused_as_a_source_in_one_sentence(outputs: Outputs, tmp_path: Path) -> None:
    named(outputs, "mixtral", tmp_path / "out")
    code, _, said = command("inspect", tmp_path / "out")
    assert (code, said.count("\n")) == (4, 1)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_expert_names_of_the_rows_become_those_of_the_modules(family: object) -> None:
    names = [in_transformers(family, name) for name in family.expert_names(2, 7)]  # type: ignore[attr-defined, arg-type]
    assert names == [f"model.layers.2.mlp.experts.7.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")]
