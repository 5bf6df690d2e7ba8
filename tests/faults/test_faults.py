"""The faults that have to be survived, by number, and the test that shows each of them."""

import ast
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stage_runs import add_tokenizer, command, content

from moepress.calibration.profile import load_profile

TESTS = Path(__file__).parent.parent
SHOWN_BY: dict[int, str] = {
    1: "models/storage/test_checkpoint.py::test_a_truncated_or_empty_shard_is_refused",
    2: "models/storage/test_checkpoint.py::test_trailing_bytes_are_refused",
    3: "models/storage/test_checkpoint.py::test_a_missing_shard_is_named",
    4: "stages/test_outputs.py::test_a_link_out_of_the_model_s_folder_is_refused_and_nothing_of_it_goes_anywhere",
    5: "models/storage/test_checkpoint.py::test_only_the_first_ten_disagreements_are_listed",
    6: "models/storage/test_checkpoint.py::test_duplicate_keys_in_a_header_are_refused",
    7: "models/storage/test_checkpoint.py::test_a_tensor_of_another_shape_is_named",
    8: "models/storage/test_checkpoint.py::test_fp8_without_its_scale_is_refused",
    9: "models/storage/test_checkpoint.py::test_a_nonfinite_weight_is_refused_naming_layer_and_expert",
    10: "calibration/test_profile.py::test_activations_that_overflow_are_refused_naming_the_layer",
    11: "compress/gptq/test_pipeline.py::test_an_expert_that_saw_no_token_is_quantized_too",
    12: "compress/gptq/test_solver.py::test_a_hopeless_hessian_is_rounded_to_nearest_and_says_so",
    13: "compress/pruning/test_plan.py::test_an_illegal_count_is_refused_before_any_weight_is_read",
    14: "stages/test_outputs.py::test_a_disk_that_fills_up_ends_in_a_sentence_and_more_room_gives_the_same_bytes",
    15: "faults/test_kills.py::test_twenty_random_kills_and_power_cuts_change_nothing",
    16: "runs/test_journal.py::test_our_orphan_temporary_files_are_swept_and_no_others",
    17: "runs/test_journal.py::test_a_second_process_is_refused_while_the_first_runs",
    18: "stages/test_resume.py::test_a_resume_with_other_settings_is_refused_by_name",
    19: "stages/test_resume.py::test_a_resumed_run_that_is_interrupted_exits_130_and_can_be_resumed",
    20: "runs/test_output.py::test_a_read_only_disk_is_refused_before_any_work",
    21: "runs/test_output.py::test_the_output_may_not_lie_inside_an_input",
    22: "runs/test_output.py::test_a_full_folder_needs_force",
    23: "models/storage/test_checkpoint.py::test_pickle_weights_are_refused_with_the_way_to_convert",
    24: "faults/test_faults.py::test_code_that_lies_beside_a_model_is_never_run",
    25: "calibration/test_templates.py::test_whatever_a_template_raises_is_a_sentence",
    26: "converters/onnx/test_folder.py::test_weights_in_other_places_than_the_folder_are_refused",
    27: "faults/test_fuzz.py::test_spoiled_inputs_end_with_a_sentence",
    28: "models/storage/test_checkpoint.py::test_more_layers_than_there_are_tensors_are_refused_at_once",
    29: "stages/test_outputs.py::test_experts_that_do_not_fit_into_memory_are_solved_in_halves",
    30: "faults/test_faults.py::test_one_and_two_workers_give_the_same_bytes",
    31: "runs/test_placing.py::test_a_file_that_somebody_puts_there_during_the_run_is_kept_and_the_result_too",
    32: "runs/test_output.py::test_a_mount_point_is_refused_before_any_work_and_a_folder_inside_of_it_works",
    33: "faults/test_kills.py::test_a_power_cut_after_the_end_leaves_every_file_whole",
    34: "stages/test_outputs.py::test_a_model_that_changes_during_a_run_is_refused_and_the_resume_gives_the_same_bytes",
    35: "runs/test_text.py::test_tables_and_consoles_print_no_control_characters",
    36: "converters/safetensors/test_patterns.py::test_what_could_take_for_ever_or_is_no_pattern_is_refused_at_once",
    37: "runs/test_files.py::test_a_planted_link_at_a_temporary_name_is_not_followed",
}
CODE = "from pathlib import Path\nPath({marker!r}).write_text('owned')\n"


@functools.cache
def names_of_tests(file: str) -> frozenset[str]:
    """The tests of a file, those in classes too; it is not run."""
    nodes = ast.walk(ast.parse((TESTS / file).read_text(encoding="utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def test_every_fault_has_a_test() -> None:
    assert list(SHOWN_BY) == list(range(1, 38))


@pytest.mark.parametrize("number", SHOWN_BY)
def test_the_test_of_a_fault_is_there(number: int) -> None:
    file, _, name = SHOWN_BY[number].partition("::")
    assert name in names_of_tests(file)


@pytest.fixture
def model(tiny_copy: Callable[..., Path]) -> Path:
    folder = tiny_copy("deepseek_v3")
    add_tokenizer(folder)
    return folder


def done(*arguments: object) -> None:
    code, _, errors = command(*arguments)
    assert code == 0, errors


def calibrated(tmp_path: Path) -> list[str]:
    text = tmp_path / "one.txt"
    text.write_text("".join(chr(97 + n * n % 26) for n in range(4000)))
    return ["--domain", f"one={text}", "--tokens", "256", "--window", "16"]


def test_code_that_lies_beside_a_model_is_never_run(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    named = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "setup", "sitecustomize"):
        (model / f"{name}.py").write_text(CODE.format(marker=str(marker)))
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(values | {"auto_map": named}))
    profile, plan, out = tmp_path / "profile", tmp_path / "plan.json", tmp_path / "out"
    commands: list[list[object]] = [
        ["inspect", model],
        ["check", model],
        ["profile", model, *calibrated(tmp_path), "-o", profile],
        ["plan", profile, "--experts", "12", "--group-size", "32", "-o", plan],
        ["prune", model, "--plan", plan, "-o", out],
        ["quantize", model, "--plan", plan, *calibrated(tmp_path), "-o", tmp_path / "codes"],
        ["generate", model, "a", "--max-new-tokens", "2"],
    ]
    for arguments in commands:
        code, _, errors = command(*arguments)
        assert code in ((0, 3) if arguments[0] == "check" else (0,)), errors
        assert not marker.exists()
    assert (out / "modeling_evil.py").read_text() == (model / "modeling_evil.py").read_text()  # as bytes, and no more


def test_one_and_two_workers_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """The model's; what a profile has summed differs in the last bits, as sums in another order do."""
    threads = torch.get_num_threads()
    plan = tmp_path / "plan.json"
    try:
        for number, count in enumerate((1, 2, 2)):
            torch.set_num_threads(count)
            done("profile", model, *calibrated(tmp_path), "-o", tmp_path / f"profile-{number}")
            if not number:
                done("plan", tmp_path / "profile-0", "--experts", "12", "--group-size", "32", "-o", plan)
            done("quantize", model, "--plan", plan, *calibrated(tmp_path), "-o", tmp_path / f"codes-{number}")
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path / "codes-0") == content(tmp_path / "codes-1") == content(tmp_path / "codes-2")
    assert content(tmp_path / "profile-1") == content(tmp_path / "profile-2")
    alone, both = (load_profile(tmp_path / f"profile-{number}") for number in (0, 1))
    for layer, sums in alone.statistics.items():
        for name, values in sums.items():
            assert np.allclose(values, both.statistics[layer][name], rtol=1e-5, atol=1e-6), name
