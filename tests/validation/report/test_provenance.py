"""provenance.json: every file by its SHA-256, nothing that changes from run to run but the time."""

import hashlib
import json
from pathlib import Path

from moepress.validation.quality.results import Quality
from moepress.validation.report.provenance import files_below, model_files, provenance, write_provenance
from moepress.validation.report.schema import Calibration, Environment, Report, SubjectInfo


def report_of(quality: Quality, created: str) -> Report:
    return Report(
        tool_version="0.1.0",
        created=created,
        subjects=(SubjectInfo(label="demo", stored_bytes=2, parameters=1),),
        quality=quality,
        calibration=Calibration(sources=("a.txt",), embedded=False, tokens=64, seed=7, digest="ab"),
        environment=Environment(versions={"torch": "2.13.0"}, device="cpu", cpus=2, platform="Linux"),
    )


def test_only_what_belongs_to_a_model_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    folder = tmp_path / "model"
    (folder / "original").mkdir(parents=True)
    for name in (
        "config.json",
        "pytorch_model.bin",
        ".gitattributes",
        "__init__.py",
        "original/params.json",
        "LICENSE",
    ):
        (folder / name).write_text(name)
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")  # as in the hub's cache
    assert [file.name for file in model_files(folder)] == ["LICENSE", "config.json", "model.safetensors"]


def test_files_are_named_by_digest_and_two_runs_differ_in_the_time_alone(quality: Quality, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    (out / "model").mkdir(parents=True)
    model.mkdir()
    (model / "config.json").write_bytes(b"{}")
    (out / "model" / "b.json").write_bytes(b"b")
    (out / "plan.json").write_bytes(b"a")
    made = files_below(out, ("plan.json", "model", "repair"))
    assert list(made) == ["plan.json", "model/b.json"]
    first, again = (
        provenance(report_of(quality, time), {"original": model}, made, {"seed": 7}) for time in ("one", "two")
    )
    assert first["inputs"] == [
        {
            "name": "original",
            "folder": "model",
            "files": [{"path": "config.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}],
        }
    ]
    assert [row["path"] for row in first["outputs"]] == ["model/b.json", "plan.json"]
    assert first["outputs"][0]["sha256"] == hashlib.sha256(b"b").hexdigest()
    assert (first["calibration"]["digest"], first["calibration"]["seed"]) == ("ab", 7)
    assert first["recipe"] == {"seed": 7}
    assert first["evaluation"]["digest"] == quality.digest
    assert {"torch", "numpy", "safetensors"} <= first["versions"].keys()
    assert (first["hardware"]["cpus"], first["hardware"]["device"]) == (2, "cpu")
    assert first["hardware"]["memory_bytes"] > 1 << 28
    assert first | {"created": "two"} == again
    file = write_provenance(out, first)
    assert json.loads(file.read_text()) == json.loads(json.dumps(first))
    assert {p.name for p in out.iterdir()} == {"model", "plan.json", "provenance.json"}
