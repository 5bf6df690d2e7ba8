"""`--push`: what is uploaded, what is refused before any work, and what stays when an upload fails."""

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_client import client, contents, empty_cache, forget, moepress, run_command
from hub_server import READER, WRITER, Hub
from stage_runs import command

from moepress.stages.places import model_folder
from moepress.stages.push import Push

SMALL = ["--tokens", "512", "--window", "32", "--max-memory", "1GiB"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plan.json for half of the demo's experts; beside it `profile`."""
    folder = tmp_path_factory.mktemp("plan")
    assert command("profile", "demo", "-o", folder / "profile", *SMALL)[0] == 0
    assert command("plan", folder / "profile", "--experts", "8", "-o", folder / "plan.json")[0] == 0
    return folder / "plan.json"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with client(home) as hub:
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub


def published(hub: Hub, repo: str) -> dict[str, bytes]:
    """What a repository holds, without the file that the hub puts into each."""
    return {name: data for name, data in hub.repos[repo].files().items() if name != ".gitattributes"}


def test_a_pushed_model_comes_back_byte_for_byte(hub: Hub, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    code, printed, errors = command("prune", "demo", "--plan", plan, "-o", out, "--push", "maker/pruned")
    assert code == 0, errors
    assert printed.splitlines()[-1] == f"Pushed: {hub.url}/maker/pruned"
    assert published(hub, "maker/pruned") == contents(out)
    assert hub.repos["maker/pruned"].private is False
    code, _, errors = command("quantize", "maker/pruned", "-o", tmp_path / "q", "--group-size", "64", *SMALL)
    assert code == 0, errors
    assert contents(model_folder("maker/pruned")) == {
        name: data for name, data in contents(out).items() if name not in ("metrics.json", "training.json")
    }


def check_names(out: Path, commit: str) -> None:
    """Everything that a run leaves names the hub's model, with its commit."""
    model = f"maker/demo@{commit}"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == model
    card = (out / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["license"]) == ("maker/demo", "mit")
    assert f"[maker/demo](https://huggingface.co/maker/demo) (revision `{commit}`)" in card
    assert "# maker/demo, pressed with moepress" in card
    (source,) = json.loads((out / "provenance.json").read_text())["inputs"]
    assert (source["repository"], source["revision"]) == ("maker/demo", commit)
    report = json.loads((out / "report.json").read_text())
    assert (report["title"], report["subjects"][0]["folder"]) == ("maker/demo", model)


def test_a_model_is_pressed_by_its_id_and_pushed_with_its_card(hub: Hub, tmp_path: Path) -> None:
    out, demo = tmp_path / "out", contents(model_folder("demo"))
    commit = hub.add("maker/demo", demo | {"README.md": b"---\nlicense: mit\n---\n# Demo\n"})
    small = [*SMALL, "--group-size", "64", "--max-windows", "1", "--no-throughput"]
    pushing = ["run", "maker/demo", "-o", out, *small, "--push", "makers/pressed", "--private"]
    code, printed, errors = command(*pushing, "--json")
    assert code == 0, errors
    assert json.loads(printed)["title"] == "maker/demo"
    check_names(out, commit)
    assert f"Note: {out / 'model'} is on {hub.url}/makers/pressed" in errors
    assert published(hub, "makers/pressed") == contents(out / "model")
    assert b"## Before and after" in published(hub, "makers/pressed")["README.md"]
    assert hub.repos["makers/pressed"].private is True
    commits = len(hub.repos["makers/pressed"].commits)
    hub.add("maker/demo", demo | {"README.md": b"a later commit"})
    forget()
    code, printed, errors = command(*pushing, "--resume")
    assert code == 0, errors
    assert f"Pushed: {hub.url}/makers/pressed" in printed
    assert len(hub.repos["makers/pressed"].commits) == commits  # nothing had changed
    code, _, errors = command(*pushing, "--resume", "--max-ppl-increase", "0%", "--max-kl", "0")
    assert code == 3
    assert "Nothing is pushed to makers/pressed, for a threshold was missed." in errors
    assert len(hub.repos["makers/pressed"].commits) == commits


@pytest.mark.parametrize(
    ("options", "token", "code", "message"),
    [
        (["--push", "maker/x"], None, 2, "needs a token of the hub, and there is none; log in with `hf auth login`"),
        (["--push", "maker/x"], READER, 2, "this machine's token may only read"),
        (["--push", "maker/x"], "hf_old", 2, "does not take this machine's token"),
        (["--push", "other/x"], WRITER, 2, "maker does not belong to other; name one of maker, makers"),
        (["--push", "x"], WRITER, 2, "--push x is not of the form OWNER/NAME"),
        (["--push", "maker/x@main"], WRITER, 2, "--push maker/x@main is not of the form OWNER/NAME"),
        (["--private"], WRITER, 2, "--private goes with --push only"),
    ],
)
def test_a_push_that_can_not_succeed_is_refused_before_any_work(
    hub: Hub,
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    token: str | None,
    code: int,
    message: str,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    out = tmp_path / "out"
    for arguments in (
        ("prune", "demo", "--plan", plan),
        ("quantize", "demo", *SMALL),
        ("export", "demo", "--to", "gptq"),
        ("run", "demo", *SMALL),
    ):
        found, printed, errors = command(*arguments, "-o", out, *options)
        assert (found, printed) == (code, "")
        assert message in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "home"])
    assert not [r for r in hub.requests if r.method != "GET"]


def test_a_hub_that_does_not_answer_is_told_before_any_work(hub: Hub, plan: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, errors = command("prune", "demo", "--plan", plan, "-o", tmp_path / "out", "--push", "maker/x")
    assert code == 1
    assert "--push maker/x: the hub can not be asked (" in errors
    assert not (tmp_path / "out").exists()


def test_a_dry_run_pushes_nothing(hub: Hub, plan: Path, tmp_path: Path) -> None:
    arguments = ("prune", "demo", "--plan", plan, "-o", tmp_path / "out", "--push", "maker/x", "--dry-run")
    assert command(*arguments)[0] == 0
    assert hub.repos == {}


def test_an_upload_that_fails_leaves_the_output_and_says_how_to_repeat_it(
    hub: Hub, home: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my pruned"
    hub.add("maker/demo", contents(model_folder("demo")), private=True)
    hub.full = 1 << 20
    arguments = ("prune", "maker/demo", "--plan", plan, "-o", out, "--push", "maker/pruned", "--private")
    code, printed, errors = moepress(hub, home, *arguments, token=WRITER)
    assert code == 1, errors
    assert "8 of 16 experts stay" in printed
    last = errors.splitlines()[-1]
    assert last.startswith(f"Error: {out} is whole, but its upload to maker/pruned failed (")
    assert "HTTP 403: the storage is full" in last
    assert "model.safetensors" not in published(hub, "maker/pruned")
    assert (home / "hub" / "models--maker--demo" / "snapshots").is_dir()
    made = contents(out)
    assert {"model.safetensors", "README.md", "moepress.json"} <= made.keys()
    again = last.split("to repeat only that: ")[1]
    assert shlex.split(again) == ["hf", "upload", "maker/pruned", str(out), "--private"]
    hub.full = None
    tool = Path(sys.executable).with_name("hf")
    code, _, errors = run_command(hub, home, tool, *shlex.split(again)[1:], token=WRITER)
    assert code == 0, errors
    assert published(hub, "maker/pruned") == made


def test_weights_of_another_model_make_room_and_other_files_stay(hub: Hub, plan: Path, tmp_path: Path) -> None:
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "quantize_config.json", "config.json")
    others = {"notes.md": b"mine", "gguf/model.gguf": b"x", "old/model.safetensors": b"y", "picture.png": b"z"}
    hub.add("maker/pruned", dict.fromkeys(old, b"old") | others)
    out = tmp_path / "out"
    code, _, errors = command("prune", "demo", "--plan", plan, "-o", out, "--push", "maker/pruned")
    assert code == 0, errors
    assert published(hub, "maker/pruned") == contents(out) | others


def test_an_export_is_pushed_with_a_card_of_its_own(hub: Hub, tmp_path: Path) -> None:
    demo = contents(model_folder("demo"))
    commit = hub.add("maker/demo", demo | {"README.md": b"---\nlicense: mit\nlanguage: [en]\n---\n", "LICENSE": b"MIT"})
    quantized, out = tmp_path / "quantized", tmp_path / "out"
    small = [*SMALL, "--group-size", "64"]
    code, _, errors = command("quantize", "maker/demo", "-o", quantized, *small, "--push", "maker/quantized")
    assert code == 0, errors
    front = yaml.safe_load((quantized / "README.md").read_text().split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("maker/demo", "quantized")
    assert (front["license"], front["tags"]) == ("mit", ["moepress", "moe", "compressed-tensors"])
    assert f"(revision `{commit}`)" in (quantized / "README.md").read_text()
    code, _, errors = command("export", quantized, "--to", "gptq", "-o", out, "--push", "maker/gptq")
    assert code == 0, errors
    assert published(hub, "maker/gptq") == contents(out)
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert (front["base_model"], front["license"], front["tags"][-1]) == ("maker/demo", "mit", "gptq")
    shutil.rmtree(quantized)
    empty_cache()
    code, printed, errors = command("check", "maker/gptq", "--runtime", "gptqmodel", "--json")
    assert code == 0, errors
    assert json.loads(printed)["kind"] == "gptq"


def test_an_onnx_model_comes_back_and_runs(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    code, _, errors = command("export", "demo", "--to", "onnx", "-o", out, "--push", "maker/onnx")
    assert code == 0, errors
    assert published(hub, "maker/onnx") == contents(out)
    forget()
    prompt = ("def main():", "--max-new-tokens", "4", "--json")
    code, printed, errors = command("generate", "maker/onnx", *prompt)
    assert code == 0, errors
    assert json.loads(printed)["runtime"].startswith("ONNX Runtime")
    assert json.loads(printed)["text"] == json.loads(command("generate", out, *prompt)[1])["text"]
    code, _, errors = command("check", "maker/onnx")
    assert code == 0, errors


def test_the_command_that_repeats_an_upload_is_quoted() -> None:
    assert Push(repo="a/b").command(Path("x y")) == "hf upload a/b 'x y'"
