"""Write safetensors shards as streams, and the files around them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepress.models.storage.folder import INDEX, SINGLE
from moepress.models.storage.foreign import SIDECARS
from moepress.models.storage.inside import is_carried, require_inside
from moepress.models.storage.safetensors_file import Stored, read_bytes
from moepress.runs.files import open_plain, put, rewrite, room_for

_NOT_CARRIED = {"config.json", "__init__.py", INDEX, "README.md", "moepress.json", "metrics.json", "training.json"}
_NOT_CARRIED |= set(SIDECARS)  # they speak of other weights than those that are written; exports write their own
_TEMPLATES = "additional_chat_templates"
_COPIED_BYTES = 8 << 20

Chunk = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor to be written; `data` gives its bytes in order, in chunks, when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    data: Callable[[], Iterator[Chunk]]


def array_entry(name: str, array: NDArray[np.float64]) -> Entry:
    """An entry for fp64 numbers that are in memory."""
    data = np.ascontiguousarray(array, dtype="<f8").tobytes()
    return Entry(name=name, dtype="F64", shape=array.shape, bytes=len(data), data=lambda: iter((data,)))


def copied_entry(entry: Stored) -> Entry:
    """An entry for what lies in another file, read in parts when its turn comes."""

    def data() -> Iterator[Chunk]:
        for start in range(0, entry.bytes, _COPIED_BYTES):
            yield read_bytes(entry, start, min(_COPIED_BYTES, entry.bytes - start))

    return Entry(name=entry.name, dtype=entry.dtype, shape=entry.shape, bytes=entry.bytes, data=data)


def write_shard(file: Path, entries: Iterable[Entry], *, kind: str = "pt") -> None:
    """Write a safetensors file in the order given; needs the memory of one entry.

    `kind` is the `format` in its metadata, by which loaders know whose tensors these are.

    The header is padded with spaces to a multiple of 8 bytes, as the format's own library does.

    Raises:
        MoepressError: the disk is full.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": kind}}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.bytes],
        }
        position += entry.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with room_for(file, 8 + len(raw) + position, resumable=True), rewrite(file) as stream:
        stream.write(len(raw).to_bytes(8, "little"))
        stream.write(raw)
        for entry in entries:
            before = stream.tell()
            for chunk in entry.data():
                stream.write(chunk)
            assert stream.tell() - before == entry.bytes, f"{entry.name}: size differs from its header"


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a sharded model; a model in one `model.safetensors` needs none."""
    if set(weight_map.values()) == {SINGLE}:
        return
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    put(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face does: two spaces, sorted keys."""
    put(file, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and licence as bytes; returns the names copied.

    Raises:
        InvalidInputError: one is a link that leads out of the folder, or no plain file.
    """
    copied = []
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name in _NOT_CARRIED or file.name.endswith(".index.json"):
            continue
        if is_carried(file.name):
            require_inside(source, file)
            with open_plain(file) as stream:
                put(target / file.name, stream.read())
            copied.append(file.name)
    return copied + _copy_templates(source, target)


def _copy_templates(source: Path, target: Path) -> list[str]:
    """The further chat templates of transformers' tokenizers, the one folder that belongs to a model."""
    copied = []
    for file in sorted((source / _TEMPLATES).glob("*.jinja")):
        (target / _TEMPLATES).mkdir(exist_ok=True)
        require_inside(source, file)
        with open_plain(file) as stream:
            put(target / _TEMPLATES / file.name, stream.read())
        copied.append(f"{_TEMPLATES}/{file.name}")
    return copied
