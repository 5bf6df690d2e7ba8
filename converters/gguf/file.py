"""A GGUF file opened for running or looking at: its metadata and list of tensors, no weights.

Reading is the `gguf` package's; what it gives is held against the file before anything is trusted, since llama.cpp
stops the whole process at some of it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.converters.gguf.heads import require_whole_head
from moepress.converters.gguf.runtime import require_gguf
from moepress.errors import InvalidInputError
from moepress.models.storage.block_types import PLAIN, type_of
from moepress.runs.files import require_plain

SUFFIX = ".gguf"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")
"""How the name of a file ends that is one of several."""
_LONG = 64  # entries of a list that is kept as it is; of longer ones only their number


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a file: shape outermost first, type by name, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """A model in GGUF on disk.

    Attributes:
        file: the one to give to llama.cpp: the first where there are several.
        files: all of them.
        keys: metadata; of long lists the number of entries alone.
        tensors: of all files, by name.
    """

    file: Path
    files: tuple[Path, ...]
    keys: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.file.parent

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.keys.get("general.architecture", ""))

    def key(self, name: str, default: Any = None) -> Any:
        """A key of the architecture."""
        return self.keys.get(f"{self.architecture}.{name}", default)

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings."""
        found = self.tensors.get("token_embd.weight")
        return found.shape[0] if found is not None else 0

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        found = self.key("context_length")
        return int(found) if isinstance(found, int) and found > 0 else 2048

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0 for a dense model."""
        found = self.key("expert_count")
        return int(found) if isinstance(found, int) else 0

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def parameters(self) -> int:
        """How many weights it has when dense."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def rounds_activations(self) -> bool:
        """Whether llama.cpp multiplies codes with activations that it has rounded to 8 bits."""
        return any(tensor.type not in PLAIN for tensor in self.tensors.values())


def gguf_file(place: Path) -> Path | None:
    """The file to load of a place: itself, or the only model (or the first of its parts) of a folder; None where there
    is none.

    Raises:
        InvalidInputError: the folder holds several.
    """
    if place.is_file():
        return _first(place) if place.suffix.lower() == SUFFIX else None
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    found = sorted(place.glob(f"*{SUFFIX}"))
    firsts = [file for file in found if (part := PART.search(file.name)) is None or int(part[1]) == 1]
    if len(firsts) > 1:
        names = ", ".join(file.name for file in firsts[:4]) + (", ..." if len(firsts) > 4 else "")
        raise InvalidInputError(f"{place} holds {len(firsts)} GGUF models ({names}); give the path of one of them.")
    return firsts[0] if firsts else None


def _first(file: Path) -> Path:
    """The first part of a file that is one of several, where it is there: it stands for all."""
    named = PART.search(file.name)
    first = file if named is None else file.with_name(f"{file.name[: named.start()]}-00001-of-{named[2]}{SUFFIX}")
    return first if first.is_file() else file


def open_gguf(file: Path) -> GgufModel:
    """Open a file, with its other parts.

    Raises:
        InvalidInputError: it is no GGUF file, or is cut off, or a part is missing.
        UnsupportedError: the package `gguf` is not installed.
    """
    require_gguf()
    files = _parts(file)
    for part in files:
        require_plain(part)
        require_whole_head(part)
    keys: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for part in files:
        found_keys, found = _read(part)
        keys = found_keys | keys
        tensors |= found
    if not isinstance(keys.get("general.architecture"), str):
        raise InvalidInputError(f"{file} states no general.architecture; download or make it again.")
    return GgufModel(file=files[0], files=files, keys=keys, tensors=tensors)


def _parts(file: Path) -> tuple[Path, ...]:
    named = PART.search(file.name)
    if named is None:
        return (file,)
    count, stem = int(named[2]), file.name[: named.start()]
    files = tuple(file.with_name(f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}") for number in range(1, count + 1))
    missing = next((part for part in files if not part.is_file()), None)
    if missing is not None:
        raise InvalidInputError(f"{missing} is missing beside {file.name}; download or copy all {count} parts.")
    return files


def _read(file: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(file)
        keys: dict[str, Any] = {}
        for name, field in reader.fields.items():
            if name.startswith("GGUF."):
                continue
            is_list = bool(field.types) and field.types[0] == GGUFValueType.ARRAY
            keys[name] = len(field.data) if is_list and len(field.data) > _LONG else field.contents()
        tensors = {
            str(tensor.name): TensorInfo(
                name=str(tensor.name),
                shape=tuple(int(size) for size in reversed(tensor.shape.tolist())),
                type=type_of(int(tensor.tensor_type)),
                bytes=int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
    except Exception as error:  # the package checks little: what is wrong shows as errors of numpy and struct
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidInputError(
            f"{file} is no GGUF file that can be read ({why}); download or make it again."
        ) from error
    return keys, tensors
