"""A model folder's files: config.json, the index and the headers of the shards, held against each other. No weights."""

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.models.storage.inside import check_files, require_inside
from moepress.models.storage.misnamed import misnamed
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.runs.files import read_text
from moepress.runs.parsing import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        InvalidInputError: the file is missing, not JSON, or not an object.
    """
    try:
        value = parse_json(read_text(file))
    except OSError as error:
        raise InvalidInputError(f"Cannot read {file}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        if other := misnamed(file):
            raise InvalidInputError(other) from error
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
        InvalidInputError: no safetensors, or two sets; index and shards disagree; a name leads out of the folder.
        UnsupportedError: the weights are in another format.
    """
    weight_map: dict[str, Any] | None = None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise InvalidInputError(f"{folder / INDEX} has no sound weight_map; restore it.")
        names = sorted(set(weight_map.values()))
        if (folder / SINGLE).is_file() and names != [SINGLE]:
            raise InvalidInputError(
                f"{folder} holds two sets of weights, {SINGLE} and the shards that {INDEX} names: transformers loads "
                "the "
                "one, vLLM and SGLang the other; delete the one that is not meant."
            )
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise no_weights(folder)
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


_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".npz": "MLX (npz)",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".nemo": "NeMo",
    ".ot": "Rust's ot",
}
# Of Mistral's own format: other names for the same weights, beside those of transformers in its public repositories.
OWN_NAMES = "consolidated"


def no_weights(folder: Path) -> MoepressError:
    """The refusal of a folder without safetensors that can be found, which says what lies there instead."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    if "model.onnx" in names:
        return InvalidInputError(f"{folder} holds an ONNX model; give the folder that it was exported from.")
    if "adapter_config.json" in names:
        return UnsupportedError(
            f"{folder} holds a LoRA adapter (adapter_config.json) and no model; merge it into its base model "
            "(merge_and_unload of peft, then save_pretrained) and give that folder."
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards and all(name.startswith(OWN_NAMES) for name in shards):
        return UnsupportedError(
            f"{folder} holds weights in Mistral's own format ({shards[0]}); give a folder in transformers' format, "
            "with "
            f"{SINGLE} or {INDEX}."
        )
    if shards:
        return InvalidInputError(
            f"{folder} holds {shards[0]} but no {INDEX} that says which files belong to the model; download the index "
            f"too, or rename a single file to {SINGLE}."
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return InvalidInputError(
            f"{folder} holds pickle weights ({pickles[0]}), which can run code when read and are refused; convert them "
            "with transformers (from_pretrained, then save_pretrained) on a machine where you trust them."
        )
    for name in names:
        if Path(name).suffix in _OTHER_FORMATS:
            return UnsupportedError(
                f"{folder} holds {_OTHER_FORMATS[Path(name).suffix]} weights ({name}), which moepress does not read; "
                "give the folder of the model that they were made from, with safetensors."
            )
    return InvalidInputError(f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face model.")


def unread_weights(folder: Path, shards: Collection[str], stored: Mapping[str, Stored]) -> tuple[str, ...]:
    """What is to be said of weight files that lie beside the model's own and that nobody reads.

    Raises:
        InvalidInputError: one of them holds tensors of the model a second time, and who reads which differs.
        UnsupportedError: a LoRA adapter lies there, which transformers would add to the model.
    """
    own = {(folder / name).resolve() for name in shards}
    there = sorted(p.name for p in folder.iterdir() if p.is_file() and p.resolve() not in own)
    if "adapter_config.json" in there:
        raise UnsupportedError(
            f"{folder} holds a LoRA adapter (adapter_config.json) beside a model: transformers loads the two together; "
            "merge the adapter into the model, or delete it."
        )
    for name in there:
        if name.endswith(".safetensors") and not name.startswith(OWN_NAMES):
            _refuse_second(folder, name, stored)
    unread = [name for name in there if name.endswith((".safetensors", *_PICKLES, *_OTHER_FORMATS))]
    unread = [name for name in unread if not name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))]
    if not unread:
        return ()
    more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    by = f"{INDEX} does not name them" if (folder / INDEX).is_file() else f"{SINGLE} is the model"
    return (f"Weight files that are not read: {unread[0]}{more} ({by}; transformers does not read them either).",)


def _refuse_second(folder: Path, name: str, stored: Mapping[str, Stored]) -> None:
    try:
        double = sorted(read_header(folder / name).keys() & stored.keys())
    except InvalidInputError:  # nobody reads it, so it need not be sound
        return
    if double:
        own = stored[double[0]].file.name
        raise InvalidInputError(
            f"{folder} holds {double[0]} twice, in {own} and in {name}"
            f"{f', which {INDEX} does not name' if (folder / INDEX).is_file() else ''}: transformers loads the first, "
            f"others may load the second; delete {name} if it is left over."
        )


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
