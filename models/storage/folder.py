"""A model folder's files: config.json, the index and the headers of the shards, held against each other. No weights."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moepress.errors import InvalidInputError
from moepress.models.storage.inside import check_files, in_hub_cache, require_inside
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.runs.files import read_text

__all__ = ["INDEX", "SINGLE", "in_hub_cache", "load_config", "open_shards", "read_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        InvalidInputError: the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(read_text(file))
    except OSError as error:
        raise InvalidInputError(f"Cannot read {file}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file} is not valid JSON ({error}); restore it.") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{file} does not hold a JSON object; restore it.")
    return value


def load_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder.

    Raises:
        InvalidInputError: there is no such folder, or no sound config.json in it.
    """
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is not a folder; give the folder of a Hugging Face model.")
    check_files(folder)
    if not (folder / "config.json").is_file():
        raise InvalidInputError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
    return read_json(folder / "config.json")


def open_shards(folder: Path) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Read all headers of a folder and hold them against its index.

    Raises:
        InvalidInputError: no safetensors; index and shards disagree; a name leads out of the folder.
    """
    weight_map: dict[str, Any] | None = None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise InvalidInputError(f"{folder / INDEX} has no sound weight_map; restore it.")
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise _no_weights(folder)
    stored: dict[str, Stored] = {}
    for name in names:
        for tensor, entry in read_header(_inside(folder, name)).items():
            if tensor in stored:
                raise InvalidInputError(
                    f"{tensor} lies in both {stored[tensor].file.name} and {name}; delete one of them."
                )
            stored[tensor] = entry
    if weight_map is not None:
        _same_as_index(folder, weight_map, stored)
    return stored, tuple(names)


def _no_weights(folder: Path) -> InvalidInputError:
    if (folder / "model.onnx").is_file():
        return InvalidInputError(f"{folder} holds an ONNX model; give the folder that it was exported from.")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        return InvalidInputError(
            f"{folder} holds pickle weights ({pickles[0]}), which can run code when read and are refused; convert them "
            "with transformers (from_pretrained, then save_pretrained) on a machine where you trust them."
        )
    return InvalidInputError(f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face model.")


def _inside(folder: Path, name: str) -> Path:
    """The path of a shard, refused when it could lead out of the folder."""
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in {"", ".", ".."}
    if not plain:
        raise InvalidInputError(f"{folder / INDEX} names {name!r}, which leads out of the folder; refused.")
    path = folder / name
    try:
        there = path.exists()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise InvalidInputError(f"{folder / INDEX} names {name}, which is missing; download it.")
    require_inside(folder, path)
    return path


def _same_as_index(folder: Path, weight_map: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    wrong = sorted(
        {name for name in weight_map if name not in stored or stored[name].file.name != weight_map[name]}
        | {name for name in stored if name not in weight_map}
    )
    if wrong:
        raise InvalidInputError(
            f"{folder / INDEX} and the shards disagree about {len(wrong)} tensors, first {', '.join(wrong[:10])}; "
            "download or copy the folder again."
        )
