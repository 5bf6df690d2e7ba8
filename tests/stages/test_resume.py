"""Real processes, killed while they work and resumed: the result has the bytes of an uninterrupted run."""

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_models
from killed_runs import Work, lines, prepared, resume, start
from stage_runs import command, content

from moepress.runs.output import partial_folder


@pytest.fixture(scope="module")
def work(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Work:
    return prepared(tmp_path_factory.mktemp("resume"), tiny_model)


def interrupt(arguments: Sequence[str], out: Path, at_line: int, how: signal.Signals) -> tuple[int, str]:
    """Send a signal as soon as the journal has so many lines; exit code and stderr of the process."""
    with tempfile.TemporaryFile("w+") as errors:
        process = start([*arguments, "-o", str(out)], errors)
        while process.poll() is None and lines(out) < at_line:
            time.sleep(0.0005)
        process.send_signal(how)
        code = process.wait(timeout=60)
        errors.seek(0)
        return code, errors.read()


KILLED_AT = {"profile": 4, "prune": 3, "repair": 5, "quantize": 3, "export": 2}


@pytest.fixture(scope="module")
def killed(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """`killed(name, folder)`: an output in that folder whose run was killed (each command once, then copied)."""
    made: dict[str, Path] = {}

    def get(name: str, folder: Path) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("killed") / "out"
            code, _ = interrupt(work.arguments[name], made[name], KILLED_AT[name], signal.SIGKILL)
            assert code == -signal.SIGKILL
            assert not made[name].exists()
            assert lines(made[name]) >= KILLED_AT[name]
        shutil.copytree(partial_folder(made[name]), partial_folder(folder / "out"))
        return folder / "out"

    return get


Killed = Callable[[str, Path], Path]


@pytest.mark.parametrize("name", list(KILLED_AT))
def test_a_killed_run_ends_with_the_same_bytes(work: Work, killed: Killed, tmp_path: Path, name: str) -> None:
    out = killed(name, tmp_path)
    resume(work.arguments[name], out)
    assert content(out) == work.whole[name]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("how", "name"), [(signal.SIGINT, "quantize"), (signal.SIGTERM, "profile")])
def test_a_resumed_run_that_is_interrupted_exits_130_and_can_be_resumed(
    work: Work, killed: Killed, tmp_path: Path, how: signal.Signals, name: str
) -> None:
    for attempt in range(5):  # what is left of a tiny run may be over before the signal is sent
        (tmp_path / str(attempt)).mkdir()
        out = killed(name, tmp_path / str(attempt))
        code, errors = interrupt([*work.arguments[name], "--resume"], out, lines(out) + 1, how)
        if code != 0:
            break
    assert code == 130
    assert errors.strip() == "Interrupted. What is finished is kept; repeat the command with --resume to go on."
    assert not out.exists()
    assert not (partial_folder(out) / "lock.json").exists()
    resume(work.arguments[name], out)
    assert content(out) == work.whole[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seed", "7"], "--seed was 0, now 7"),
        (["--bits", "8", "--group-size", "32"], "--bits was 4, now 8"),
        (["--match", "own"], "--match (auto follows --bits) was original, now own"),
        (["--include", "dense"], "--include was shared, now dense shared"),
        (["--tokens", "256"], "the calibration text is another one (--calibration, --domain, --tokens, --window"),
        (["--dtype", "bfloat16"], "--dtype was float32, now bfloat16"),
        (["--max-memory", "100MiB"], "--max-memory was "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_resume_with_other_settings_is_refused_by_name(
    work: Work, killed: Killed, tmp_path: Path, changes: list[str], message: str
) -> None:
    out = killed("quantize", tmp_path)
    before = content(partial_folder(out))
    code, printed, errors = command(*work.arguments["quantize"], *changes, "-o", out, "--resume")
    *notes, said = errors.splitlines()
    assert (code, printed) == (2, "")
    assert all(note.startswith("Note: ") for note in notes)  # of memory that is too little for the work
    assert said.startswith("Error: Cannot resume")
    assert message in said
    after = content(partial_folder(out))
    assert after == {name: data for name, data in before.items() if name in after}
    assert before.keys() - after.keys() <= {"lock.json"}  # of the killed process
    assert not out.exists()


def test_an_unfinished_run_is_neither_gone_on_with_nor_thrown_away_unasked(
    work: Work, killed: Killed, tmp_path: Path
) -> None:
    out = killed("prune", tmp_path)
    code, _, errors = command(*work.arguments["prune"], "-o", out)
    assert code == 2
    assert "pass --resume to go on, or --force to start anew" in errors
    code, _, errors = command(*work.arguments["prune"], "-o", out, "--force")
    assert code == 0, errors
    assert content(out) == work.whole["prune"]
    assert not partial_folder(out).exists()


def test_a_resume_with_another_model_is_refused(work: Work, killed: Killed, tmp_path: Path) -> None:
    out, model = killed("profile", tmp_path), tmp_path / "model"
    shutil.copytree(work.model, model)
    tiny_models.rewrite(model, lambda tensors: tensors["model.norm.weight"].mul_(2).sum())
    arguments = [str(model) if a == str(work.model) else a for a in work.arguments["profile"]]
    code, _, errors = command(*arguments, "-o", out, "--resume")
    assert code == 2
    assert "the model is another one, or its files changed" in errors


def test_a_resume_of_an_export_of_another_artifact_is_refused(work: Work, killed: Killed, tmp_path: Path) -> None:
    """The same tensors in the same places, but other bytes: half of the result would be of another model."""
    out, artifact = killed("export", tmp_path), tmp_path / "artifact"
    shutil.copytree(work.arguments["export"][1], artifact)
    shard = sorted(artifact.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, _, errors = command("export", artifact, "--to", "gptq", "-o", out, "--resume")
    assert code == 2
    assert "the model is another one, or its files changed" in errors


def test_a_finished_piece_that_was_changed_is_refused(work: Work, killed: Killed, tmp_path: Path) -> None:
    out = killed("prune", tmp_path)
    shard = sorted(partial_folder(out).glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, _, errors = command(*work.arguments["prune"], "-o", out, "--resume")
    assert code == 4
    assert f"{shard} was changed since it was written" in errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["profile", "prune", "repair", "quantize", "export"])
def test_a_kill_after_each_piece_changes_nothing(work: Work, tmp_path: Path, name: str) -> None:
    landed = 0
    for at_line in range(1, 40):
        out = tmp_path / str(at_line)
        code, _ = interrupt(work.arguments[name], out, at_line, signal.SIGKILL)
        if code == 0:  # the run has fewer lines
            break
        landed += 1
        resume(work.arguments[name], out)
        assert content(out) == work.whole[name]
    assert landed >= 4
