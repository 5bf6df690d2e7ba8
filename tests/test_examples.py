"""docs/examples and action.yml: the script runs for real, the action's steps run in order, the YAML is sound."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
import fork_server
import pytest
import yaml
from action_runner import EXPRESSION, Job

from moepress.cli import cli
from moepress.stages.places import model_folder
from moepress.stages.run.recipe import make_recipe
from moepress.stages.run.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
WORKFLOWS = sorted(EXAMPLES.glob("*-*.yml"))
SMALL = ("--tokens", "512", "--window", "32", "--max-windows", "2", "--no-throughput", "--device", "cpu")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def executable(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `moepress` and `python` are those of this test."""
    folder = tmp_path_factory.mktemp("bin")
    executable(folder / "moepress", f'#!/bin/sh\nexec {shlex.join(fork_server.python())} -m moepress "$@"\n')
    executable(folder / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    return folder


Press = Callable[..., tuple[int, dict[str, str], str]]


@pytest.fixture(scope="module")
def press(bin_folder: Path) -> Press:
    """Runs press.sh in a folder as a CI step: exit code, what it wrote to GITHUB_OUTPUT, stderr."""

    def run(folder: Path, *arguments: str) -> tuple[int, dict[str, str], str]:
        (folder / "output").write_text("before=1\n")
        environment = os.environ | {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            "GITHUB_OUTPUT": str(folder / "output"),
        }
        script = ["bash", str(EXAMPLES / "press.sh"), *arguments]
        done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        written = (folder / "output").read_text().splitlines()
        assert written[0] == "before=1"
        assert all(line in done.stdout.splitlines() for line in written[1:])
        return done.returncode, dict(line.split("=", 1) for line in written[1:]), done.stderr

    return run


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory, press: Press) -> tuple[Path, dict[str, str]]:
    """A folder in which press.sh pressed `my_model`, the demo model, into `out` by the recipe, and its outputs."""
    folder = tmp_path_factory.mktemp("ci")
    shutil.copytree(model_folder("demo"), folder / "my_model", ignore=shutil.ignore_patterns("__*", "text"))
    code, outputs, errors = press(folder, "out", "my_model", "--recipe", str(EXAMPLES / "recipe.yaml"), *SMALL)
    assert code == 0, errors
    return folder, outputs


@pytest.fixture
def workspace(pressed: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy of that folder, to be spoiled."""
    shutil.copytree(pressed[0], tmp_path / "workspace", symlinks=True)
    folder = tmp_path / "workspace"
    for file in (folder / "out" / "recipe.yaml", folder / "out" / "journal.jsonl"):  # they name the model's place
        file.write_text(file.read_text().replace(str(pressed[0]), str(folder)))
    (folder / "summary.md").unlink()
    return folder


def test_the_script_leaves_report_and_outputs(pressed: tuple[Path, dict[str, str]]) -> None:
    folder, outputs = pressed
    assert outputs.pop("exit-code") == "0"
    headline = outputs.pop("headline")
    assert headline.startswith("my_model, pruned + 4 bit: 9.2 MB → ")
    assert set(outputs) == {"report", "junit", "provenance"}
    for name in outputs.values():
        assert (folder / name).stat().st_size > 0
    summary = (folder / "summary.md").read_bytes()
    assert summary == (folder / "out" / "report.md").read_bytes()
    assert len(summary) < 900 << 10


def test_junit_has_a_case_for_every_threshold_and_model(pressed: tuple[Path, dict[str, str]]) -> None:
    (suite,) = ET.parse(pressed[0] / "out" / "junit.xml").getroot()
    cases = {(case.get("classname"), str(case.get("name")).split(" at most")[0]) for case in suite}
    models, limits = ("moepress.pruned", "moepress.pruned + 4 bit"), ("perplexity increase", "KL divergence")
    assert cases == {(model, limit) for model in models for limit in limits}
    assert suite.get("failures") == "0"


def test_the_digests_are_those_of_the_files(pressed: tuple[Path, dict[str, str]]) -> None:
    folder = pressed[0]
    found = json.loads((folder / "out" / "provenance.json").read_text())
    (model,) = found["inputs"]
    rows = [(folder / "my_model", row) for row in model["files"]] + [(folder / "out", row) for row in found["outputs"]]
    assert {"model/config.json", "exports/gptq/config.json", "plan.json"} <= {row["path"] for _, row in rows}
    for place, row in rows:
        assert hashlib.sha256((place / row["path"]).read_bytes()).hexdigest() == row["sha256"], row["path"]


def test_a_missed_threshold_goes_through_as_3_with_all_files_in_place(workspace: Path, press: Press) -> None:
    recipe = str(EXAMPLES / "recipe.yaml")
    code, outputs, errors = press(workspace, "out", "my_model", "--recipe", recipe, *SMALL, "--max-kl", "0.00001")
    assert code == 3, errors
    assert errors.startswith("Error: pruned: KL divergence")
    assert outputs["exit-code"] == "3"
    assert outputs["headline"].startswith("my_model")
    (suite,) = ET.parse(workspace / outputs["junit"]).getroot()
    assert suite.get("failures") == "2"
    assert (workspace / "summary.md").read_text().startswith("# my\\_model")


def test_what_went_wrong_goes_through_and_names_no_report(tmp_path: Path, press: Press) -> None:
    code, outputs, errors = press(tmp_path, "out", "nowhere")
    assert (code, outputs) == (4, {"exit-code": "4"})
    assert "nowhere" in errors
    assert press(tmp_path, "out")[0] == 2


def action_job(workspace: Path, tmp_path: Path, bin_folder: Path, **inputs: str) -> Job:
    """The action with these inputs, after all of its steps; pip is told apart from Python, for it wants the network."""
    fake = executable(
        tmp_path / "python",
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; '
        f'cp {bin_folder}/moepress "$3/bin/moepress"; exit 0; fi\n'
        f'[ "$1 $2" = "-m pip" ] || exec {sys.executable} "$@"\n',
    )
    known = {name: str(row.get("default", "")) for name, row in ACTION["inputs"].items()}
    given = {name.replace("_", "-"): value for name, value in inputs.items()}
    assert given.keys() <= known.keys()
    (tmp_path / "temporary").mkdir()
    job = Job(workspace=workspace, temporary=tmp_path / "temporary", action=ROOT, inputs=known | given, python=fake)
    job.run(ACTION["runs"]["steps"])
    return job


def test_the_action_installs_presses_checks_caches_and_uploads(
    workspace: Path, tmp_path: Path, bin_folder: Path
) -> None:
    before = (workspace / "out" / "report.json").read_bytes()
    job = action_job(
        workspace,
        tmp_path,
        bin_folder,
        model="my_model",
        recipe=str(EXAMPLES / "recipe.yaml"),
        out="out",
        args=" ".join(SMALL[:4]) + "\n" + " ".join(SMALL[4:]),
        check="vllm,transformers",
        extras="onnx",
    )
    assert job.failed == 0, job.errors
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[1] == f"-m pip install --quiet --constraint {ROOT}/constraints.txt {ROOT}[onnx]"
    names = [name.split("@")[0] for name, _ in job.used]
    assert names == [f"actions/{n}" for n in ("setup-python", "cache/restore", "cache/save", "upload-artifact")]
    restored, saved, uploaded = (values for _, values in job.used[1:])
    assert restored["key"] == saved["key"] == f"{restored['restore-keys'].removesuffix('-')}-77-1"
    assert re.fullmatch(r"moepress-[0-9a-f]{16}-77-1", saved["key"])
    assert uploaded["path"].split() == ["out", "!out/exports/onnx-before"]
    shown = {name: job.filled(row["value"]) for name, row in ACTION["outputs"].items()}
    assert shown["exit-code"] == "0"
    assert shown["headline"].startswith("my_model, pruned + 4 bit: 9.2 MB → ")
    assert all((workspace / shown[name]).is_file() for name in ("report", "junit", "provenance"))
    assert job.summary.read_bytes() == (workspace / "out" / "report.md").read_bytes()
    assert (workspace / "out" / "report.json").read_bytes() == before  # gone on with, not made anew


def test_inputs_are_never_shell_and_a_press_that_failed_is_still_cached_and_uploaded(
    workspace: Path, tmp_path: Path, bin_folder: Path
) -> None:
    (workspace / "a text; touch spoiled").write_text("not shell")
    job = action_job(
        workspace,
        tmp_path,
        bin_folder,
        model="my_model",
        recipe=str(EXAMPLES / "recipe.yaml"),
        out="out",
        data="a text; touch spoiled\n$(touch spoiled)",
        args=" ".join(SMALL),
        cache_key="$(touch spoiled)",
    )
    assert job.failed == 4  # the second file is not there
    assert "$(touch spoiled)" in job.errors
    assert not (workspace / "spoiled").exists()
    assert [name.split("@")[0] for name, _ in job.used][-2:] == ["actions/cache/save", "actions/upload-artifact"]


def test_the_cache_has_another_key_for_other_texts_and_settings(tmp_path: Path, bin_folder: Path) -> None:
    steps = [step for step in ACTION["runs"]["steps"] if step.get("id") == "options"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "temporary").mkdir()

    def key(text: str, **inputs: str) -> str:
        (tmp_path / "texts" / "a text.txt").write_text(text)
        known = {name: str(row.get("default", "")) for name, row in ACTION["inputs"].items()}
        job = Job(
            workspace=tmp_path,
            temporary=tmp_path / "temporary",
            action=ROOT,
            inputs=known | {"model": "demo"} | inputs,
            python=bin_folder / "python",
            path=f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        )
        job.run(steps)
        assert job.failed == 0, job.errors
        return job.outputs["options"]["key"]

    first = key("one", calibration="texts\n")
    assert key("one", calibration="texts\n") == first
    others = [key("two", calibration="texts\n"), key("one", data="texts"), key("one", calibration="texts", keep="0.5")]
    assert len({first, *others}) == 4
    words = (tmp_path / "temporary" / "moepress-options").read_text().splitlines()
    assert words == ["moepress-out", "demo", "--keep=0.5", "--calibration=texts"]


def runs_of(steps: list[dict[str, Any]]) -> list[str]:
    return [step["run"] for step in steps if "run" in step]


def check_steps(steps: list[dict[str, Any]], *, composite: bool) -> None:
    """Each step is run or used, is pinned and safe to run, and reads outputs of earlier steps alone."""
    seen: set[str] = set()
    for step in steps:
        assert ("run" in step) != ("uses" in step)
        for name in re.findall(r"steps\.([\w-]+)\.", json.dumps(step)):
            assert name in seen, f"{name} is no earlier step"
        seen |= {step["id"]} if "id" in step else set()
        if "uses" in step:
            assert step["uses"] == "./" or re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", step["uses"])
        else:
            assert not EXPRESSION.search(step["run"]), "an expression in a script is run as shell; pass it in env"
            assert (step.get("shell") == "bash") == composite
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)


def test_the_action_is_well_formed() -> None:
    assert {"name", "description", "inputs", "outputs", "runs"} <= ACTION.keys()
    assert ACTION["runs"]["using"] == "composite"
    check_steps(ACTION["runs"]["steps"], composite=True)
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    read = {name for found in EXPRESSION.findall(text) for name in re.findall(r"inputs\.([\w-]+)", found)}
    read |= set(re.findall(r"^ +if: .*?inputs\.([\w-]+)", text, re.MULTILINE))
    assert read == set(ACTION["inputs"])
    assert all(row["description"] for rows in (ACTION["inputs"], ACTION["outputs"]) for row in rows.values())
    assert all(isinstance(row.get("default", ""), str) for row in ACTION["inputs"].values())


def test_the_options_that_the_action_writes_are_those_of_run() -> None:
    (script,) = (run for run in runs_of(ACTION["runs"]["steps"]) if "moepress-options" in run)
    written = set(re.findall(r'"([a-z-]+)=\$[A-Z_]+"', script)) | set(re.findall(r"--([a-z-]+)=\$source", script))
    assert len(written) == 10
    known = {name for parameter in cli.commands["run"].params for name in parameter.opts}
    assert {f"--{name}" for name in written} <= known


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_is_well_formed(file: Path) -> None:
    flow = yaml.safe_load(file.read_text(encoding="utf-8"))
    triggers = flow.pop(True)  # YAML 1.1 reads the key `on` so
    assert {"name", "permissions", "jobs"} <= flow.keys()
    assert "workflow_dispatch" in triggers
    dispatched = (triggers["workflow_dispatch"] or {}).get("inputs", {})
    text = file.read_text(encoding="utf-8")
    assert set(re.findall(r"\binputs\.([\w-]+)", text)) == set(dispatched)
    for job in flow["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys()
        check_steps(job["steps"], composite=False)
        for step in job["steps"]:
            if step.get("uses") == "./":
                assert set(step["with"]) <= set(ACTION["inputs"])
                assert set(re.findall(r"outputs\.([\w-]+)", text)) <= set(ACTION["outputs"])


def test_the_workflows_call_the_script_with_options_that_exist() -> None:
    nightly = yaml.safe_load((EXAMPLES / "nightly-report.yml").read_text(encoding="utf-8"))
    (line,) = (run for run in runs_of(nightly["jobs"]["report"]["steps"]) if "press.sh" in run)
    words = shlex.split(line)
    assert words[:2] == ["bash", "docs/examples/press.sh"]
    parent = click.Context(cli, **cli.context_settings)  # without it, `run` would have no -h from now on
    context = cli.commands["run"].make_context("run", [*words[3:], "--output", words[2], "--resume"], parent=parent)
    assert (ROOT / context.params["recipe_file"]).is_file()
    artifact = yaml.safe_load((EXAMPLES / "press-artifact.yml").read_text(encoding="utf-8"))
    (step,) = (s for s in artifact["jobs"]["press"]["steps"] if s.get("uses") == "./")
    assert (ROOT / step["with"]["recipe"]).is_file()
    assert any("docs/examples/press.sh" in run for run in runs_of(ACTION["runs"]["steps"]))


def test_the_recipe_is_one() -> None:
    recipe = make_recipe(load_recipe(EXAMPLES / "recipe.yaml"))
    assert recipe.max_ppl_increase is not None
    assert recipe.max_kl is not None


def test_the_jobs_of_an_array_make_the_plain_result(bin_folder: Path, tmp_path: Path) -> None:
    """The second and the third begin together; the first, which fetches the result, comes when they have ended."""
    options = "--bits 4 --group-size 64 --tokens 512 --window 32"
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "MODEL": "demo",
        "STORE": str(tmp_path / "store"),
        "OUT": str(tmp_path / "result"),
        "OPTIONS": options,
        "SHARDS": "3",
        "THREADS": "1",
        "MEMORY": "2048",
    }
    script = str(EXAMPLES / "array-job.sh")
    jobs = [subprocess.Popen(["bash", script], env=environment | {"SLURM_ARRAY_TASK_ID": n}) for n in ("2", "1")]
    assert [job.wait(timeout=300) for job in jobs] == [0, 0]
    subprocess.run(["bash", script], env=environment | {"SLURM_ARRAY_TASK_ID": "0"}, check=True, timeout=300)
    plain = [str(bin_folder / "moepress"), "quantize", "demo", "-o", str(tmp_path / "plain"), *options.split()]
    subprocess.run(plain, check=True, timeout=300)
    result, expected = tmp_path / "result", tmp_path / "plain"
    assert {p.name: p.read_bytes() for p in result.iterdir()} == {p.name: p.read_bytes() for p in expected.iterdir()}


def test_the_job_of_a_cluster_calls_workers_with_options_that_exist() -> None:
    pods = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))["spec"]
    assert pods["completionMode"] == "Indexed"
    (worker,) = pods["template"]["spec"]["containers"]
    words = shlex.split(worker["args"][0])
    assert words[:3] == ["exec", "moepress", "work"]
    known = {name for parameter in cli.commands["work"].params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    assert f"$JOB_COMPLETION_INDEX/{pods['completions']}" in words
