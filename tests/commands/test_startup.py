"""What a command imports: neither torch nor transformers before it says that a path is wrong, whatever the command; and
with a model only what its work takes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stage_runs import command

# Runs command lines one after the other in one process that has imported nothing; prints their codes and imports.
DRIVER = """
import contextlib, io, json, sys
from moepress.cli import main

found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["moepress", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as done:
            code = done.code
    heavy = {"torch", "transformers", "pyarrow", "onnx", "onnxruntime", "matplotlib", "jinja2", "sympy"}
    found.append([code, err.getvalue(), sorted(heavy & sys.modules.keys())])
print(json.dumps(found))
"""

OUT = ["-o", "x"]
LINES: list[tuple[list[str], int, str]] = [
    *[
        ([*line, *OUT], 4, "Error: nope is not a folder; give the folder of a Hugging Face model")
        for line in (
            ["profile", "nope"],
            ["prune", "nope", "--plan", "nope.json"],
            ["quantize", "nope"],
            ["export", "nope", "--to", "gptq"],
            ["export", "nope", "--to", "onnx"],
            ["validate", "demo", "nope"],
            ["run", "nope"],
            ["calibration", "make", "nope", "--prompts", "nope.txt"],
        )
    ],
    *[
        (line, 4, "Error: nope is not a folder")
        for line in (["inspect", "nope"], ["check", "nope"], ["validate", "nope", "b"], ["generate", "nope", "hi"])
    ],
    (["inspect", "../no/hub/id"], 4, "is not a folder"),
    (["inspect", "demo", "--targets-file", "nope.toml"], 4, "Error: Cannot read nope.toml"),
    *[([name, "no/model"], 4, "nor whole in the hub's cache") for name in ("inspect", "check")],
    (["plan", "nope"], 4, "Error: nope has no profile.json; give a folder made by `moepress profile`."),
    (["prune", "demo", "--profile", "nope", "--keep", "0.5", *OUT], 4, "Error: nope has no profile.json"),
    (["prune", "demo", "--plan", "nope.json", *OUT], 4, "Error: Cannot read nope.json: No such file or directory."),
    (["quantize", "demo", "--plan", "nope.json", *OUT], 4, "Error: Cannot read nope.json: No such file or directory."),
    (["calibration", "make", "demo", "--prompts", "nope.txt", *OUT], 4, "Error: Cannot read nope.txt"),
    (["run", "demo", "--recipe", "nope.yaml", *OUT], 4, "Error: nope.yaml is not a readable YAML recipe"),
    *[
        ([name, "demo", "--calibration", "nope", *OUT], 4, "Error: nope: no such file or folder")
        for name in ("profile", "quantize", "run")
    ],
    (["run", "demo", "--data", "nope", *OUT], 4, "Error: nope: no such file or folder"),
    (["validate", "demo", "demo", "--data", "nope"], 4, "Error: nope: no such file or folder"),
    (["targets"], 0, ""),
    (["completion", "bash"], 0, ""),
    *[([name, "-h"], 0, "") for name in ("run", "profile", "plan", "prune", "quantize", "export", "inspect")],
    *[
        ([name, "-h"], 0, "")
        for name in ("targets", "doctor", "check", "validate", "generate", "calibration", "completion")
    ],
]


Outcomes = list[tuple[int, str, list[str]]]

# One after the other, in one process that starts without any of these: who may import least comes first.
WITH_A_MODEL: list[tuple[list[str], set[str]]] = [
    (["plan", "profile", "--keep", "0.75", "-o", "again.json"], set()),
    (["check", "pruned"], set()),
]


def driven(lines: list[list[str]], place: Path) -> Outcomes:
    line, offline = [sys.executable, "-c", DRIVER, json.dumps(lines)], os.environ | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run(line, capture_output=True, text=True, check=True, cwd=place, env=offline)
    return [(code, said, loaded) for code, said, loaded in json.loads(found.stdout)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    place = tmp_path_factory.mktemp("empty")
    found = driven([line for line, _, _ in LINES], place)
    assert list(place.iterdir()) == []
    return found


@pytest.fixture(scope="module")
def with_a_model(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What these commands import once a process before them has asked transformers about the models."""
    place = tmp_path_factory.mktemp("model")
    profile, plan, pruned = place / "profile", place / "plan.json", place / "pruned"
    for line in (
        ("profile", "demo", "-o", profile, "--tokens", 256, "--window", 32, "--no-bit-losses"),
        ("plan", profile, "--keep", "0.75", "-o", plan),
        ("prune", "demo", "--plan", plan, "-o", pruned),
        ("check", pruned),
    ):
        code, _printed, errors = command(*line)
        assert code == 0, errors
    return driven([line for line, _ in WITH_A_MODEL], place)


@pytest.mark.parametrize("number", range(len(LINES)), ids=[" ".join(line) for line, _, _ in LINES])
def test_a_command_without_a_model_imports_no_torch(outcomes: Outcomes, number: int) -> None:
    (code, said, loaded), (_, expected, message) = outcomes[number], LINES[number]
    assert (code, loaded) == (expected, [])
    assert message in said
    assert said.count("\n") == (1 if message else 0)


@pytest.mark.parametrize("number", range(len(WITH_A_MODEL)), ids=[" ".join(line) for line, _ in WITH_A_MODEL])
def test_a_command_imports_only_what_its_work_takes(with_a_model: Outcomes, number: int) -> None:
    code, said, loaded = with_a_model[number]
    assert code == 0, said
    assert set(loaded) <= WITH_A_MODEL[number][1]


def test_paths_are_refused_in_the_words_of_what_would_read_them(tmp_path: Path) -> None:
    from moepress.calibration.profile import load_profile
    from moepress.errors import InvalidInputError
    from moepress.models.storage.folder import read_json
    from moepress.stages.places import require_file, require_profiles

    def words(function: object, *arguments: object) -> str:
        assert callable(function)
        with pytest.raises(InvalidInputError) as caught:
            function(*arguments)
        return str(caught.value)

    assert words(require_profiles, [tmp_path]) == words(load_profile, tmp_path)
    for file in (tmp_path / "nope.json", tmp_path):
        assert words(require_file, file) == words(read_json, file)
