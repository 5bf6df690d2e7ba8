"""`moepress check` as a person meets it, our own outputs, and the notes of plan and run."""

import json
from pathlib import Path

import pytest
import tiny_models
from check_folders import CHANGES, Copies, Outputs
from stage_runs import command, corpus_of, keep_of, plan_of, profile_of

from moepress.calibration.profile import save_profile
from moepress.compress.pruning.plan import Quantization
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.validation.rules.check import MADE_FOR, RULES, check_folder, notes_before, planned_notes
from moepress.validation.rules.facts import Kind
from moepress.validation.rules.findings import Effect, Runtime
from moepress.validation.rules.gguf_files import FILE_RULES
from moepress.validation.rules.sources import summary

ROOT = Path(__file__).resolve().parents[3]
KINDS = {
    "original": Kind.PLAIN,
    "pruned": Kind.PLAIN,
    "compressed": Kind.COMPRESSED,
    "gptq": Kind.GPTQ,
    "onnx": Kind.ONNX,
}


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("layout", KINDS)
def test_our_own_outputs_pass_for_every_runtime_they_are_made_for(outputs: Outputs, key: str, layout: str) -> None:
    folder = getattr(outputs, layout)(key)
    found = check_folder(folder)
    assert found.kind is KINDS[layout]
    assert found.runtimes == MADE_FOR[found.kind]
    failing = [(f.rule, f.runtime) for f in found.failing]
    # GPTQModel has names of its own for Mixtral's experts, so that there the finding is right.
    assert failing == ([("gptqmodel-names", Runtime.GPTQMODEL)] if (key, layout) == ("mixtral", "gptq") else [])


def test_the_demo_passes_everywhere_it_can_be_loaded() -> None:
    code, printed, _errors = command("check", "demo")
    assert code == 0
    assert "llama.cpp" in printed


def test_every_rule_has_a_name_of_its_own_and_says_what_it_does() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES) >= 15
    assert all(rule.look.__doc__ and rule.sources for rule in RULES)


def test_every_rule_is_described() -> None:
    text = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    names = [*(rule.name for rule in RULES), *FILE_RULES]
    assert [name for name in names if f"| `{name}` |" not in text] == []
    described = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `") and "--" not in line]
    assert sorted(described) == sorted(names)


def test_the_documents_say_of_each_rule_what_was_run_and_what_was_read() -> None:
    text = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    known = {rule.name: rule.sources for rule in RULES} | {name: of for name, (_look, of) in FILE_RULES.items()}
    cells = {line.split("`")[1]: line.rsplit(" | ", 1)[1] for line in text.splitlines() if line.startswith("| `")}
    assert {name: cells[name] for name in known} == {name: f"{summary(of)} |" for name, of in known.items()}


def test_a_finding_says_what_is_known_of_its_own_runtime(outputs: Outputs) -> None:
    findings = check_folder(outputs.gptq("mixtral"), [Runtime.TRANSFORMERS, Runtime.GPTQMODEL]).findings
    said = {finding.runtime: finding.source for finding in findings}
    assert said[Runtime.TRANSFORMERS] == "ran with transformers 5.23"
    assert said[Runtime.GPTQMODEL].startswith("ran with GPTQModel 7.7.0 on 20")


def test_findings_are_shown_with_the_runtime_what_happens_and_the_mend(outputs: Outputs) -> None:
    code, printed, errors = command("check", outputs.gptq("qwen3_moe"), "--runtime", "transformers,vllm")
    assert code == 4
    assert "gptq-in-transformers: the experts are in the GPTQ layout" in printed
    assert "transformers silently wrong: starts the experts at random, without an error" in printed
    assert "to mend it: use the compressed-tensors folder" in printed
    assert errors.startswith("Error: ")
    assert "does not work in transformers (findings: 1)" in errors


def test_findings_are_json_for_machines(outputs: Outputs) -> None:
    folder = outputs.gptq("qwen3_moe")
    code, printed, _errors = command("check", folder, "--runtime", "transformers", "--json")
    found = json.loads(printed)
    assert code == 4
    assert (found["folder"], found["kind"], found["runtimes"]) == (str(folder), "gptq", ["transformers"])
    (row,) = found["findings"]
    assert (row["rule"], row["runtime"], row["effect"]) == ("gptq-in-transformers", "transformers", "silently wrong")
    assert row["what"]
    assert row["mend"]


def test_what_is_only_slower_is_no_failure(outputs: Outputs, tmp_path: Path) -> None:
    folder = Copies(outputs=outputs, folder=tmp_path)("compressed")
    tiny_models.edit_config(folder, hidden_size=128, num_experts_per_tok=4)
    code, printed, _errors = command("check", folder, "--runtime", "vllm", "--tensor-parallel", "2", "--json")
    assert code == 0
    assert [row["effect"] for row in json.loads(printed)["findings"]] == [Effect.SLOWER]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--runtime", "vllm,tgi"], 2, "--runtime 'tgi' is not known; choose of vllm"),
        (["--runtime", ","], 2, "is not known; choose of"),
    ],
)
def test_an_unknown_runtime_is_a_wrong_use(options: list[str], code: int, said: str) -> None:
    found, printed, errors = command("check", "demo", *options)
    assert (found, printed) == (code, "")
    assert said in errors


def test_what_is_no_model_folder_is_one_sentence(outputs: Outputs, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = Copies(outputs=outputs, folder=tmp_path)("compressed")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for place, said in (
        (tmp_path / "nothing", "is not a folder"),
        (tmp_path / "empty", "has no config.json"),
        (folder, "holds neither model.safetensors nor model.safetensors.index.json"),
    ):
        code, printed, errors = command("check", place)
        assert (code, printed, errors.count("\n")) == (4, "", 1)
        assert said in errors


def test_a_cut_off_shard_is_one_sentence(outputs: Outputs, tmp_path: Path) -> None:
    folder = Copies(outputs=outputs, folder=tmp_path)("compressed")
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-5])
    code, printed, errors = command("check", folder)
    assert (code, printed) == (4, "")
    assert f"{file} is not a sound safetensors file" in errors


def test_a_plan_is_held_against_the_same_rules(outputs: Outputs) -> None:
    source = open_checkpoint(outputs.original("qwen3_moe"))
    plan = plan_of(source, keep_of(source, 8))
    assert planned_notes(plan.model_copy(update={"quantization": Quantization(group_size=32)}), source.config) == []
    (few,) = planned_notes(plan.model_copy(update={"quantization": Quantization(bits=3, group_size=32)}), source.config)
    assert few.startswith("codes have 3 bits: vllm refuses (takes other than 4 and 8 bits in its Humming")
    bits = {0: 4, 1: 8, 2: 4}
    mixed = plan.model_copy(update={"quantization": Quantization(group_size=32), "layer_bits": bits})
    assert "transformers silently wrong" in planned_notes(mixed, source.config)[0]
    assert planned_notes(plan.model_copy(update={"quantization": None}), source.config) == []
    narrow = plan.model_copy(update={"quantization": Quantization(group_size=16)})
    assert planned_notes(narrow, source.config) == []
    (groups,) = planned_notes(narrow, source.config, gptq=True)
    assert groups.startswith("groups have 16 columns: vllm refuses")


def test_a_run_is_held_against_the_rules_of_its_exports(outputs: Outputs) -> None:
    config = open_checkpoint(outputs.original("mixtral")).config
    scheme = Scheme(bits=4, group_size=16)
    assert notes_before(config, 4, scheme, degroup=False, gptq=False) == []
    notes = notes_before(config, 4, scheme, degroup=False, gptq=True)
    assert any(note.startswith("groups have 16 columns: vllm refuses") for note in notes)
    assert any("gptqmodel refuses" in note for note in notes)


def test_the_commands_plan_and_run_say_so_before_any_work(outputs: Outputs, tmp_path: Path) -> None:
    folder = outputs.original("qwen3_moe")
    profile = profile_of(folder, corpus_of(tiny_models.windows(300, count=2, length=16)), tmp_path / "work")
    (tmp_path / "profile").mkdir()
    save_profile(profile, tmp_path / "profile")
    code, _printed, errors = command("plan", tmp_path / "profile", "--keep", "0.5", "--bits", "3", "--group-size", "32")
    assert code == 0
    assert "Note: codes have 3 bits: vllm refuses" in errors
    code, _printed, errors = command(
        *("run", "demo", "-o", tmp_path / "out", "--bits", "2", "--max-windows", "1", "--dry-run"),
    )
    assert code == 0
    assert "Note: codes have 2 bits: vllm refuses" in errors
    assert not (tmp_path / "out").exists()
