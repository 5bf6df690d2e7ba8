"""provenance.json: of which files a result was made, by what, and which files it is; all by SHA-256."""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from moepress.converters.gguf.file import gguf_file, open_gguf
from moepress.hub.snapshot import origin_of
from moepress.runs.files import sha256_of, write_atomically
from moepress.runs.progress import track
from moepress.validation.report.schema import Report

PROVENANCE_NAME = "provenance.json"
_PACKAGES = ("compressed-tensors", "numpy", "safetensors", "tokenizers")  # beside those that the report names
_OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".pt", ".pth"}  # beside safetensors


def model_files(place: Path) -> list[Path]:
    """What belongs to a model, by name: of a GGUF file itself or all its parts; of a folder what lies in it but hidden
    files, subfolders and weights of formats that it is not run from."""
    model = gguf_file(place)
    if model is not None and place.is_file():
        return list(open_gguf(model).files)
    found = (file for file in place.iterdir() if file.is_file() and not file.name.startswith((".", "__")))
    other = _OTHER_WEIGHTS - ({model.suffix} if model is not None else set())
    return sorted(file for file in found if file.suffix not in other)


def provenance(
    report: Report,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that provenance.json holds; reads every file once. Only `created` differs between two equal runs.

    Args:
        report: of the result; its calibration, conventions, versions and machine are taken over.
        inputs: by a name in the report, model folders.
        outputs: by the path that is to be written, files.
        recipe: all settings, where there was one.
    """
    models = {name: model_files(folder) for name, folder in inputs.items()}
    total = sum(map(len, models.values())) + len(outputs)
    with track("SHA-256", total, unit="files") as advance:
        return {
            "schema_version": "1.0",
            "tool": {"name": "moepress", "version": report.tool_version},
            "created": report.created,
            "commands": list(report.commands),
            "inputs": [
                {
                    "name": name,
                    "folder": inputs[name].resolve().name,
                    **_hub(inputs[name]),
                    "files": [_digest(file.name, file, advance) for file in files],
                }
                for name, files in models.items()
            ],
            "outputs": [_digest(name, file, advance) for name, file in sorted(outputs.items())],
            "recipe": None if recipe is None else dict(recipe),
            "calibration": None if report.calibration is None else report.calibration.model_dump(mode="json"),
            "evaluation": _evaluation(report),
            "versions": _versions(report),
            "hardware": _hardware(report),
        }


def write_provenance(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write provenance.json into a folder, atomically."""
    file = folder / PROVENANCE_NAME
    write_atomically(file, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return file


def files_below(root: Path, names: Iterable[str]) -> dict[str, Path]:
    """Files and all that lies in folders of these names below a folder, by their path from there; absent ones not."""
    found = dict[str, Path]()
    for place in (root / name for name in names):
        files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
        found |= {file.relative_to(root).as_posix(): file for file in files}
    return found


def _hub(folder: Path) -> dict[str, str | None]:
    """The id and commit of a model that lies in the hub's cache."""
    origin = origin_of(folder)
    return {} if origin is None else {"repository": origin.repo, "revision": origin.revision}


def _digest(name: str, file: Path, advance: Any) -> dict[str, Any]:
    row = {"path": name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}
    advance(1)
    return row


def _evaluation(report: Report) -> dict[str, Any]:
    quality = report.quality
    names = ("convention", "window", "windows", "tokens", "bos_policy", "digest", "embedded", "domains")
    return {name: getattr(quality, name) for name in names}


def _versions(report: Report) -> dict[str, str]:
    found = dict(report.environment.versions) if report.environment is not None else {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # bundled without its metadata
            continue
    return dict(sorted(found.items()))


def _hardware(report: Report) -> dict[str, Any]:
    environment = report.environment
    named = {} if environment is None else environment.model_dump(include={"device", "cpus", "platform"})
    return named | {"memory_bytes": int(psutil.virtual_memory().total)}
