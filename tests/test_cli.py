"""The command line: exit codes, one sentence for every error, JSON and nothing else, dry runs that write nothing."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import fork_server
import pytest
import tiny_models
from stage_runs import command, content

from moepress.cli import cli
from moepress.compress.pruning.plan import COLLAPSE_NOTE
from moepress.runs.files import JOURNAL
from moepress.stages.places import model_folder

SMALL = ["--tokens", "512", "--window", "32"]
COMMANDS = sorted(cli.commands)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`profile`, `plan.json` and `quantized` of the demo model, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    done(command("profile", "demo", "-o", folder / "profile", *SMALL))
    done(command("plan", folder / "profile", "--experts", "8", "--group-size", "64", "-o", folder / "plan.json"))
    done(command("quantize", "demo", "--plan", folder / "plan.json", "-o", folder / "quantized", *SMALL))
    return folder


def done(result: tuple[int, str, str]) -> str:
    code, printed, errors = result
    assert code == 0, errors
    return printed


def refused(result: tuple[int, str, str], code: int) -> str:
    """The one sentence on stderr of a command that ended with this code."""
    found, printed, errors = result
    assert found == code, errors
    assert printed == ""
    *notes, error, end = errors.split("\n")
    assert end == ""
    assert all(note.startswith("Note: ") for note in notes), errors
    assert error.startswith("Error: ")
    return error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_of_itself(name: str) -> None:
    for flag in ("--help", "-h"):
        text = done(command(name, flag))
        assert "Example:" in text
        assert f"moepress {name} " in text.split("Example:")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_help_comes_fast_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from moepress.cli import cli; sys.argv = ['moepress', '--help']\n"
        "try:\n    cli.main(['--help'])\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'safetensors', 'pyarrow'} "
        "& set(sys.modules)), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
    assert "moepress run demo -o out" in found.stdout


def test_what_libraries_leave_in_memory_is_not_searched_as_they_are_imported_nor_at_the_end() -> None:
    code = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10_000, gc.get_threshold()[0]))\n"
        "from moepress.cli import main; sys.argv = ['moepress', 'targets', '--json']; main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frozen, threshold = found.stdout.splitlines()[-1].split()
    assert frozen == "True"
    assert int(threshold) > 10_000


def test_the_module_can_be_run_and_tells_its_version() -> None:
    from moepress import __version__

    found = subprocess.run([sys.executable, "-m", "moepress", "--version"], capture_output=True, text=True, check=True)
    assert __version__ in found.stdout
    assert found.stderr == ""


def test_wrong_use_of_an_option_exits_2() -> None:
    for arguments in (["profile"], ["profile", "demo"], ["frobnicate"], ["plan", "x", "--criterion", "magic"]):
        code, printed, errors = command(*arguments)
        assert (code, printed) == (2, "")
        assert "Error: " in errors
        assert "Traceback" not in errors


ILLEGAL: list[tuple[list[str], str]] = [
    (["plan", "{}/profile", "--keep", "0.6"], "Cannot keep 10 of 16 experts"),
    (["plan", "{}/profile"], "neither --keep nor --experts was given"),
    (["plan", "{}/profile", "--keep", "7"], "--keep 7.0 is not a share"),
    (["plan", "{}/profile", "--experts", "8", "--domain-weight", "klingon=1"], "no domain 'klingon'"),
    (["plan", "{}/profile", "--experts", "8", "--domain-weight", "klingon"], "NAME=NUMBER"),
    (["plan", "{}/profile", "--experts", "8", "--bits", "5"], "--bits 5 is not supported"),
    (["plan", "{}/profile", "--experts", "8", "--group-size", "7"], "--group-size 7 is not supported"),
    (["prune", "demo", "-o", "{}/new"], "either --plan plan.json, or --profile"),
    (["prune", "demo", "--profile", "{}/profile", "--experts", "6", "-o", "{}/new"], "Cannot keep 6 of 16"),
    (["prune", "demo", "--plan", "{}/plan.json", "-o", "{}/profile"], "is not empty"),
    (["prune", "demo", "--plan", "{}/plan.json", "-o", "{}/plan.json"], "is a file"),
    (["prune", "{}/quantized/../quantized", "--plan", "{}/plan.json", "-o", "{}/quantized/x"], "lies inside the input"),
    (["quantize", "demo", "-o", "{}/new", "--group-size", "96"], "--group-size 96 does not divide"),
    (["quantize", "demo", "-o", "{}/new", "--max-memory", "lots"], "--max-memory 'lots' is not a size"),
    (["profile", "demo", "-o", "{}/new", "--device", "abacus"], "--device abacus is not available"),
    (["export", "{}/quantized", "--to", "compressed-tensors", "-o", "{}/new"], "layout already"),
]


@pytest.mark.parametrize(("arguments", "message"), ILLEGAL, ids=[row[1] for row in ILLEGAL])
def test_illegal_requests_exit_2_with_one_sentence(folder: Path, arguments: list[str], message: str) -> None:
    assert message in refused(command(*(a.format(folder) for a in arguments)), 2)
    assert sorted(p.name for p in folder.iterdir()) == ["plan.json", "profile", "quantized"]


def test_a_plan_for_another_model_exits_2(folder: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = command("prune", tiny_model("mixtral"), "--plan", folder / "plan.json", "-o", tmp_path / "out")
    assert "The plan" in refused(result, 2)


def test_a_missed_threshold_exits_3(folder: Path, tmp_path: Path) -> None:
    limits = ["--max-kl", "0.000001", "--max-windows", "1", "--no-throughput"]
    code, printed, errors = command("validate", "demo", folder / "quantized", *limits, "--json")
    assert code == 3, errors
    json.loads(printed)
    assert errors.startswith("Error: ")
    assert "the limit is 1e-06" in errors
    assert "Traceback" not in errors


def test_validating_twice_gives_the_same_report_apart_from_times(folder: Path, tmp_path: Path) -> None:
    found, limits = [], ["--max-windows", "1", "--no-throughput"]
    for out in (tmp_path / "one", tmp_path / "two"):
        code, _, errors = command("validate", "demo", folder / "quantized", *limits, "-o", out)
        assert code == 0, errors
        report = json.loads((out / "report.json").read_text())
        assert report.pop("created")
        assert str(report.pop("commands")).endswith(f"-o {out.name}']")
        found.append(report)
    assert found[0] == found[1]


def test_corrupt_input_exits_4_naming_the_file(folder: Path, tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    broken = tiny_copy("mixtral")
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert str(shard) in refused(command("inspect", broken), 4)
    assert "nowhere is not a folder" in refused(command("inspect", "nowhere"), 4)
    assert "has no config.json" in refused(command("inspect", tmp_path), 4)
    assert "profile.json" in refused(command("plan", tmp_path, "--keep", "0.5"), 4)
    (tmp_path / "plan.json").write_text("{")
    result = command("prune", "demo", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert "plan.json" in refused(result, 4)
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_exits_5(tiny_copy: Callable[..., Path]) -> None:
    model = tiny_copy("mixtral")
    tiny_models.edit_config(model, model_type="llama")
    message = refused(command("inspect", model), 5)
    assert "'llama'" in message


def test_a_model_that_is_quantized_already_is_told_what_that_costs(folder: Path, tmp_path: Path) -> None:
    result = command("quantize", folder / "quantized", "-o", tmp_path / "out", *SMALL)
    code, _, told = result
    assert code == 0
    assert "stored as int4 already; quantizing them again costs quality" in told


def test_a_model_that_is_not_quantized_is_not_exported(tmp_path: Path) -> None:
    assert "make one with" in refused(command("export", model_folder("demo"), "--to", "gptq", "-o", tmp_path / "o"), 5)


def test_an_output_that_another_process_writes_exits_6(folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / JOURNAL).write_text('{"settings": {}}\n')
    with subprocess.Popen(["sleep", "600"]) as other:
        (work / "lock.json").write_text(json.dumps({"pid": other.pid, "host": socket.gethostname()}))
        before, place = content(work), ["-o", tmp_path / "out"]
        results = [
            command("prune", "demo", "--plan", folder / "plan.json", *place, flag) for flag in ("--resume", "--force")
        ]
        other.kill()
    for result in results:
        message = refused(result, 6)
        assert str(other.pid) in message
        assert socket.gethostname() in message
    assert content(work) == before


def test_an_output_that_cannot_be_made_is_refused_naming_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = command("prune", "demo", "--plan", folder / "plan.json", "-o", tmp_path / "file" / "out")
    assert str(tmp_path / "file") in refused(result, 2)


def parsed(result: tuple[int, str, str]) -> dict[str, Any]:
    found = json.loads(done(result))
    assert isinstance(found, dict)
    return found


def test_json_is_all_that_is_on_stdout(folder: Path, tmp_path: Path) -> None:
    assert parsed(command("inspect", "demo", "--json"))["experts"] == 16
    plan = parsed(command("plan", folder / "profile", "--keep", "0.5", "--criterion", "frequency", "--json"))
    assert plan["experts"] == 8
    assert plan["criterion"] == "frequency"
    assert set(plan["keep"]) == {"1", "2", "3", "4"}
    pruned = parsed(command("prune", "demo", "--plan", folder / "plan.json", "-o", tmp_path / "pruned", "--json"))
    assert pruned["experts"] == 8
    assert pruned["bytes_after"] < pruned["bytes_before"]
    exported = parsed(command("export", folder / "quantized", "--to", "gptq", "-o", tmp_path / "gptq", "--json"))
    mla, shared = 4, 3  # of each layer: q_a, q_b, kv_a and o; gate, up and down
    assert exported["modules"] == 4 * 8 * 3 + 5 * mla + 4 * shared + 3
    profiled = parsed(command("profile", "demo", "-o", tmp_path / "profile", *SMALL, "--no-loo", "--json"))
    assert profiled["calibration"]["tokens"] == 512
    options = ["--bits", "8", "--group-size", "64", *SMALL, "--json"]
    quantized = parsed(command("quantize", tmp_path / "pruned", "-o", tmp_path / "quantized", *options))
    assert quantized["scheme"] == {"bits": 8, "group_size": 64}
    assert set(quantized["layer_error"]) == {"0", "1", "2", "3", "4"}  # layer 0 has no experts


def test_people_get_tables_instead(folder: Path, tmp_path: Path) -> None:
    assert "16 routed experts" in done(command("inspect", "demo"))
    assert "8 of 16 experts stay" in done(command("plan", folder / "profile", "--experts", "8", "--group-size", "64"))
    choice = ["--profile", folder / "profile", "--experts", "8", "--criterion", "frequency"]
    code, printed, errors = command("prune", "demo", *choice, "-o", tmp_path / "pruned")
    assert code == 0
    assert "8 of 16 experts stay" in printed
    assert f"Note: {COLLAPSE_NOTE}\n" in errors  # what the plan has to say goes to stderr


def test_the_bits_of_a_plan_are_used_unless_others_are_given(folder: Path, tmp_path: Path) -> None:
    def scheme(*options: str) -> dict[str, Any]:
        arguments = ["quantize", "demo", "--plan", folder / "plan.json", "-o", tmp_path / "out", *SMALL, *options]
        found: dict[str, Any] = parsed(command(*arguments, "--force", "--json"))["scheme"]
        return found

    assert scheme() == {"bits": 4, "group_size": 64}
    assert scheme("--bits", "8") == {"bits": 8, "group_size": 128}


@pytest.mark.parametrize("name", ["profile", "prune", "quantize"])
def test_a_dry_run_projects_and_writes_nothing(folder: Path, tmp_path: Path, name: str) -> None:
    arguments = {
        "profile": SMALL,
        "prune": ["--plan", folder / "plan.json"],
        "quantize": ["--plan", folder / "plan.json", *SMALL],
    }
    before = content(folder)
    table = done(command(name, "demo", "-o", tmp_path / "out", *arguments[name], "--dry-run"))
    assert table.startswith("projected")
    assert f"{name}, time: " in table
    found = parsed(command(name, "demo", "-o", tmp_path / "out", *arguments[name], "--dry-run", "--json"))
    assert {"disk_bytes", "peak_memory_bytes", "seconds"} <= found.keys()
    assert found["seconds"] == pytest.approx(sum(found["time"].values()))
    assert found["output_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert content(folder) == before
    if name == "quantize":
        written = sum(p.stat().st_size for p in (folder / "quantized").glob("*.safetensors"))
        assert found["output_bytes"] == pytest.approx(written, rel=0.02)


def test_a_dry_run_of_the_whole_job_shows_both_long_stages(tmp_path: Path) -> None:
    arguments = ["run", "demo", "-o", tmp_path / "out", *SMALL, "--dry-run"]
    table = done(command(*arguments))
    assert "profile, time: " in table
    assert "quantize, memory: " in table
    found = parsed(command(*arguments, "--json"))
    assert found["experts"] == 12
    assert {"profile", "quantize", "sizes", "recipe"} <= found.keys()
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_to_try_and_which_gpu_holds_it() -> None:
    text = done(command("inspect", "demo", "--tokens", "64", "--context", "256"))
    assert "12 experts (75%)" in text
    assert "64 calibration tokens give 16 to an expert" in text
    assert "Fewer than the 128 columns" in text
    assert "KV cache of 256 tokens" in text
    assert "RTX 3060 12GB" in text
    assert max(map(len, text.split("Which GPU holds it")[1].split("fits: ")[0].splitlines()[1:])) <= 80
    found = parsed(command("inspect", "demo", "--json"))
    assert found["experts"] == 16
    assert {"recommended_expert_counts", "calibration", "machine", "estimates", "targets"} <= found.keys()
    assert {"profile", "prune", "quantize"} <= found["estimates"].keys()


def test_a_dry_run_refuses_what_the_run_would_refuse(folder: Path) -> None:
    for name, options in (("profile", SMALL), ("prune", ["--plan", folder / "plan.json"]), ("quantize", SMALL)):
        result = command(name, "demo", "-o", folder / "profile", *options, "--dry-run")
        assert "is not empty" in refused(result, 2)


def test_profiles_of_two_runs_make_one_plan(folder: Path, tmp_path: Path) -> None:
    done(command("profile", "demo", "-o", tmp_path / "more", *SMALL, "--seed", "1"))
    plan = parsed(
        command("plan", folder / "profile", tmp_path / "more", "--experts", "8", "--no-quantization", "--json")
    )
    assert plan["calibration"]["tokens"] == 1024
    assert plan["quantization"] is None


def test_brackets_in_names_are_printed(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "a [bold] model"
    model.symlink_to(model_folder("demo"))
    plan = tmp_path / "[red].json"
    code, printed, errors = command("plan", folder / "profile", "--keep", "0.5", "-o", plan)
    assert code == 0, errors
    assert f"Plan written to {plan}" in printed
    code, printed, errors = command("inspect", model)
    assert code == 0, errors
    assert "a [bold] model" in printed


def test_a_closed_pipe_ends_without_a_word() -> None:
    python = shlex.join(fork_server.python())
    line = f"{python} -m moepress inspect demo | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert found.returncode == 0
    assert found.stderr == ""


def test_a_read_only_place_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    try:
        if os.access(locked, os.W_OK):
            pytest.skip("this user may write anywhere")
        result = command("prune", "demo", "--plan", folder / "plan.json", "-o", locked / "out")
        assert str(locked) in refused(result, 1)
    finally:
        locked.chmod(0o700)
        shutil.rmtree(locked)
