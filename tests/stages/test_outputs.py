"""Commands and their outputs: whole or not at all, never somebody else's; inputs that are not what they seem."""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from stage_runs import add_tokenizer, command, content

from moepress.calibration.profile import load_profile
from moepress.compress.estimates.export import layout_bytes
from moepress.compress.gptq import layer as gptq_layer
from moepress.compress.pruning.plan import make_plan, plan_text
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.runs.files import JOURNAL, LOCK
from moepress.runs.output import partial_folder
from moepress.stages import groundwork, profile

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, text, a profile, a plan and a quantized model; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_model("deepseek_v3", num_hidden_layers=3, shards=3), folder / "model")
    add_tokenizer(folder / "model")
    (folder / "model" / "LICENSE").write_text("licence")
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ABCDEFGH.,;", k=4000)))
    done(command(*calibrated("profile", folder), "-o", folder / "profile"))
    plan = make_plan(load_profile(folder / "profile"), count=12, scheme=Scheme(bits=4, group_size=32))
    (folder / "plan.json").write_text(plan_text(plan))
    done(command(*calibrated("quantize", folder), "-o", folder / "quantized"))
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own"


def calibrated(name: str, folder: Path) -> list[object]:
    more = ["--bits", "4", "--group-size", "32"] if name == "quantize" else []
    text = ["--calibration", folder / "text.txt", "--tokens", "256", "--window", "16", "--max-memory", "1GiB"]
    return [name, folder / "model", *text, *more]


def commands(folder: Path) -> dict[str, list[object]]:
    return {
        "profile": calibrated("profile", folder),
        "prune": ["prune", folder / "model", "--plan", folder / "plan.json"],
        "quantize": calibrated("quantize", folder),
        "export": ["export", folder / "quantized", "--to", "gptq"],
        "run": [*calibrated("run", folder), "--experts", "8", "--group-size", "32"],
    }


NAMES = ("profile", "prune", "quantize", "export", "run")


def done(result: tuple[int, str, str]) -> str:
    assert result[0] == 0, result[2]
    return result[2]


def refused(code: int, *arguments: object) -> str:
    found, printed, errors = command(*arguments)
    assert (found, printed) == (code, ""), errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    return last


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be opened."""
    for stage in ("check", "export", "plan", "profile", "prune", "quantize", "repair", "run.run", "validate"):
        importlib.import_module(f"moepress.stages.{stage}")  # or one imported below would keep what stands in here

    def fail(*_arguments: Any, **_keywords: Any) -> None:
        raise AssertionError("a model was opened")

    for place in ("folder.load_config", "folder.open_shards", "safetensors_file.read_header"):
        monkeypatch.setattr(f"moepress.models.storage.{place}", fail)
    for place in ("checkpoint.load_config", "checkpoint.open_shards"):
        monkeypatch.setattr(f"moepress.models.storage.{place}", fail)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_on_a_live_output_ends_with_6_before_any_model_is_opened(
    made: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    folder = out if name == "run" else partial_folder(out)
    folder.mkdir()
    (folder / JOURNAL).write_text('{"settings": {}}\n')
    (folder / LOCK).write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname()}))
    start = time.perf_counter()
    for more in ([], ["--resume"], ["--force"]):
        assert f"is being written by process {os.getppid()}" in refused(6, *commands(made)[name], "-o", out, *more)
    assert time.perf_counter() - start < 10


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_could_not_be_put_in_place_is_refused_before_any_model_is_opened(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if name != "run":
        assert "is the folder that you are in" in refused(2, *commands(made)[name], "-o", ".")
    assert "too long a name" in refused(2, *commands(made)[name], "-o", "x" * 250)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ],
)
def test_a_link_out_of_the_model_s_folder_is_refused_and_nothing_of_it_goes_anywhere(
    own: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text(SECRET)
    (own / "model" / name).unlink(missing_ok=True)
    (own / "model" / name).symlink_to(secret)
    for command_name in ("profile", "prune", "quantize"):
        message = refused(4, *commands(own)[command_name], "-o", tmp_path / "out")
        assert f"{name} is a link that leads out of the folder ({secret})" in message
        assert not (tmp_path / "out").exists()
    assert "leads out of the folder" in refused(4, "generate", own / "model", "a")


def test_other_places_that_may_hold_such_a_link_are_refused_too(own: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text(SECRET)
    templates = own / "model" / "additional_chat_templates"
    templates.symlink_to(tmp_path)
    assert "additional_chat_templates is a link" in refused(4, *commands(own)["prune"], "-o", tmp_path / "out")
    templates.unlink()
    templates.mkdir()
    (templates / "tool.jinja").symlink_to(secret)
    assert "tool.jinja is a link" in refused(4, *commands(own)["prune"], "-o", tmp_path / "out")
    shutil.rmtree(templates)
    (own / "quantized" / "NOTICE").symlink_to(secret)
    assert "NOTICE is a link" in refused(4, *commands(own)["export"], "-o", tmp_path / "out")
    statistics = own / "profile" / "statistics.safetensors"
    statistics.rename(tmp_path / "moved")
    statistics.symlink_to(tmp_path / "moved")
    assert "statistics.safetensors is a link" in refused(4, "plan", own / "profile", "--experts", "8")
    (own / "model" / "plan.json").symlink_to(own / "plan.json")
    arguments = ["prune", own / "model", "--plan", own / "model" / "plan.json", "-o", tmp_path / "out"]
    assert "plan.json is a link" in refused(4, *arguments)
    (own / "model" / "plan.json").unlink()
    (own / "model" / "recipe.yaml").symlink_to(secret)
    assert "recipe.yaml is a link" in refused(4, "run", "--recipe", own / "model" / "recipe.yaml", "-o", tmp_path / "o")
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hub_s_cache_go_on_working(own: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--maker--tiny"
    snapshot, blobs = root / "snapshots" / "abc123", root / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted((own / "model").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    done(command("prune", snapshot, "--plan", own / "plan.json", "-o", tmp_path / "out"))
    assert (tmp_path / "out" / "LICENSE").read_text() == "licence"
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.fixture
def alarm() -> Iterator[None]:
    signal.alarm(120)  # reading a pipe would wait for ever
    yield
    signal.alarm(0)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "SHARD", "LICENSE"])
def test_a_pipe_in_a_model_s_folder_is_refused(own: Path, tmp_path: Path, name: str) -> None:
    name = sorted(file.name for file in (own / "model").glob("*.safetensors"))[0] if name == "SHARD" else name
    (own / "model" / name).unlink()
    os.mkfifo(own / "model" / name)
    assert f"{name} is a named pipe, not a plain file" in refused(4, *commands(own)["prune"], "-o", tmp_path / "out")
    assert f"{name} is a named pipe" in refused(4, "inspect", own / "model")


@pytest.mark.usefixtures("alarm")
def test_a_pipe_or_device_that_is_named_as_an_input_is_refused(own: Path, tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe.json", tmp_path / "out"
    os.mkfifo(pipe)
    text = [*calibrated("profile", own), "-o", out]
    for file in (pipe, Path("/dev/zero")):
        assert "not a plain file" in refused(4, "prune", own / "model", "--plan", file, "-o", out)
        assert "not a plain file" in refused(4, "run", "--recipe", file, "-o", out)
        assert "not a plain file" in refused(4, "targets", "--targets-file", file)
        assert "not a plain file" in refused(4, *text, "--calibration", file)
    (own / "profile" / "profile.json").unlink()
    os.mkfifo(own / "profile" / "profile.json")
    assert "is a named pipe" in refused(4, "plan", own / "profile", "--experts", "8")
    assert not out.exists()


@pytest.mark.parametrize("name", ["profile", "prune", "quantize", "export"])
def test_a_model_that_changes_during_a_run_is_refused_and_the_resume_gives_the_same_bytes(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    done(command(*commands(own)[name], "-o", tmp_path / "whole"))
    folder = own / ("quantized" if name == "export" else "model")
    shard = sorted(folder.glob("*.safetensors"))[0]
    before = shard.stat()
    work = {"profile": "collect", "prune": "prune", "quantize": "quantize", "export": "export"}[name]
    place = f"moepress.stages.{name}.{work}"
    inner = getattr(importlib.import_module(f"moepress.stages.{name}"), work)

    def touched(*arguments: Any, **keywords: Any) -> Any:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
        return inner(*arguments, **keywords)

    monkeypatch.setattr(place, touched)
    message = refused(4, *commands(own)[name], "-o", tmp_path / "out")
    assert f"{shard} was written to while the output was made" in message
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    done(command(*commands(own)[name], "-o", tmp_path / "out", "--resume"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_plan_and_timings_replace_a_file_only_with_force(own: Path, tmp_path: Path) -> None:
    plan, timings = tmp_path / "plan.json", tmp_path / "timings.json"
    for file in (plan, timings):
        file.write_text("edited by hand")
    make = ["plan", own / "profile", "--experts", "8", "--group-size", "32", "-o", plan]
    assert "is there already" in refused(2, *make)
    prune = [*commands(own)["prune"], "-o", tmp_path / "out", "--timings", timings]
    assert "--timings" in refused(2, *prune)
    assert [file.read_text() for file in (plan, timings)] == ["edited by hand"] * 2
    done(command(*make, "--force"))
    done(command(*prune, "--force"))
    assert json.loads(plan.read_text())["experts"] == 8
    assert json.loads(timings.read_text())["command"] == "prune"


def test_a_report_is_written_again_and_nobody_else_s_files_are_replaced(tmp_path: Path) -> None:
    validate = ["validate", "demo", "demo", "--max-windows", "1", "--no-throughput", "-o", tmp_path / "report"]
    done(command(*validate))
    done(command(*validate))
    for name, text in (("report.md", "# My own notes"), ("provenance.json", "{}"), ("report.json", '{"by": "pytest"}')):
        before = (tmp_path / "report" / name).read_bytes()
        (tmp_path / "report" / name).write_text(text)
        assert f"{name} is not of a report of moepress" in refused(2, *validate)
        assert (tmp_path / "report" / name).read_text() == text
        (tmp_path / "report" / name).write_bytes(before)
    (tmp_path / "report" / "report.html").unlink()
    (tmp_path / "report" / "report.html").symlink_to(tmp_path / "victim")
    assert "report.html is not of a report" in refused(2, *validate)
    done(command(*validate, "--force"))
    assert not (tmp_path / "victim").exists()
    (tmp_path / "report" / JOURNAL).write_text('{"settings": {}}\n')
    assert "is a run's folder" in refused(2, *validate, "--force")


def test_a_stage_s_output_that_was_changed_after_it_was_done_is_noticed_by_the_resume(
    own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = [*commands(own)["run"], "--max-windows", "1", "--no-throughput", "--data", own / "text.txt", "-o", out]
    done(command(*run))
    for name in ("profile/statistics.safetensors", "model/config.json", "model/tokenizer.json"):
        before = (out / name).read_bytes()
        (out / name).write_bytes(before[:-1] + b"x")
        assert f"{out / name} was changed since it was written" in refused(4, *run, "--resume")
        (out / name).write_bytes(before)
    (out / "report.json").write_text("{")
    (out / "model" / "notes.md").write_text("mine")
    done(command(*run, "--resume"))
    assert json.loads((out / "report.json").read_text())["subjects"]
    assert (out / "model" / "notes.md").read_text() == "mine"


def test_a_folder_that_somebody_else_put_where_a_stage_writes_is_not_taken_for_its_output(
    own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = [*commands(own)["run"], "--max-windows", "1", "--no-throughput", "--data", own / "text.txt", "-o", out]
    done(command(*run))
    rows = (out / JOURNAL).read_text().splitlines(keepends=True)
    (out / JOURNAL).write_text(rows[0])
    shutil.rmtree(out / "profile")
    (out / "profile").mkdir()
    (out / "profile" / "mine.txt").write_text("x")
    assert "is not what this run makes there" in refused(2, *run, "--resume")
    assert (out / "profile" / "mine.txt").exists()


def test_the_size_of_a_gptq_export_is_known_before_it_is_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = layout_bytes(open_artifact(made / "quantized"), "gptq")
    monkeypatch.setattr(groundwork, "free_disk", lambda _output: (tmp_path, size - 1))
    message = refused(1, *commands(made)["export"], "-o", tmp_path / "out")
    assert "free and the output" in message
    assert "MiB" in message
    assert not partial_folder(tmp_path / "out").exists()
    monkeypatch.setattr(groundwork, "free_disk", lambda _output: (tmp_path, size))
    done(command(*commands(made)["export"], "-o", tmp_path / "out"))
    assert open_artifact(tmp_path / "out").total_bytes == size


@pytest.mark.parametrize("name", ["profile", "prune", "quantize", "export"])
def test_a_disk_that_fills_up_ends_in_a_sentence_and_more_room_gives_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    done(command(*commands(made)[name], "-o", whole))
    size = sum(file.stat().st_size for file in whole.iterdir())
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 2 // 3 >> 12 << 12}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        for place in (groundwork, profile):
            monkeypatch.setattr(place, "free_disk", lambda _output: (disk, 1 << 40))  # no estimate is tested here
        message = refused(1, *commands(made)[name], "-o", disk / "out")
        assert f"the disk at {disk} is full (" in message
        assert " MiB free" in message
        assert message.endswith("make room there and repeat with --resume.")
        assert ".tmp" not in message
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        done(command(*commands(made)[name], "-o", disk / "out", "--resume"))
        assert content(disk / "out") == content(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_experts_that_do_not_fit_into_memory_are_solved_in_halves(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, sizes = gptq_layer.solve_experts, []

    def tight(stream: Any, layer: int, weights: Any, *more: Any) -> Any:
        sizes.append(len(weights))
        if len(weights) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
        return inner(stream, layer, weights, *more)

    monkeypatch.setattr(gptq_layer, "solve_experts", tight)
    errors = done(command(*commands(made)["quantize"], "-o", tmp_path / "out"))
    assert max(sizes) > 2
    assert "experts at once, which are done in two halves" in errors
    assert content(tmp_path / "out").keys() == content(made / "quantized").keys()


def test_windows_that_do_not_fit_into_memory_are_run_in_halves(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moepress.models.forward.streamed import StreamedModel

    inner = StreamedModel.run_layer

    def tight(model: Any, layer: int, hidden: Any, *more: Any, **options: Any) -> Any:
        if len(hidden) > 8:
            raise MemoryError
        return inner(model, layer, hidden, *more, **options)

    monkeypatch.setattr(StreamedModel, "run_layer", tight)
    errors = done(command(*commands(made)["profile"], "-o", tmp_path / "out"))
    assert "windows at once, which are done in two halves" in errors
    before, after = load_profile(made / "profile"), load_profile(tmp_path / "out")
    for layer in before.layers:
        tokens = [found.statistics[layer]["count"] for found in (before, after)]
        assert (tokens[0] == tokens[1]).all()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["python", "torch", "system"],
)
def test_memory_that_runs_out_for_good_is_one_sentence_that_names_the_option(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_arguments: Sequence[Any], **_keywords: Any) -> None:
        raise error

    monkeypatch.setattr("moepress.stages.profile.collect", fail)
    message = refused(1, *commands(made)["profile"], "-o", tmp_path / "out")
    assert "The machine ran out of memory; give a smaller --max-memory" in message
