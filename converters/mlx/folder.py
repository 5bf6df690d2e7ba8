"""A folder in MLX's layout, opened for running; and whether mlx-lm is there."""

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.folder import load_config, open_shards
from moepress.models.storage.safetensors_file import Stored

INSTALL = 'pip install "mlx[cpu]" && pip install --no-deps mlx-lm'


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxFolder:
    """A model that mlx-lm runs.

    Attributes:
        folder: where it lies.
        config: config.json.
        stored: every tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.config["vocab_size"])

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        return int(self.config.get("max_position_embeddings") or 2048)

    @property
    def experts(self) -> int | None:
        """Routed experts of a layer, as the stacks have them."""
        return next((e.shape[0] for n, e in self.stored.items() if n.endswith(".switch_mlp.up_proj.weight")), None)

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.bytes for entry in self.stored.values())

    @property
    def parameters(self) -> int:
        """How many weights it has when dense."""
        count = 0
        for name, entry in self.stored.items():
            if name.endswith((".scales", ".biases")):
                continue
            size = math.prod(entry.shape)
            count += size * 32 // self._bits(name) if entry.dtype == "U32" else size
        return count

    def _bits(self, name: str) -> int:
        stated = self.config["quantization"]
        own = stated.get(name.removesuffix(".weight"))
        return int(own["bits"] if isinstance(own, dict) else stated["bits"])


def is_mlx(folder: Path) -> bool:
    """Whether a folder states MLX's quantization."""
    if not (folder / "config.json").is_file():
        return False
    stated = load_config(folder).get("quantization")
    return isinstance(stated, dict) and isinstance(stated.get("bits"), int) and "group_size" in stated


def open_mlx(folder: Path) -> MlxFolder:
    """Open a folder; reads headers, no weights.

    Raises:
        InvalidInputError: it is not sound.
    """
    config = load_config(folder)
    stored, _ = open_shards(folder)
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or isinstance(vocabulary, bool) or vocabulary < 1:
        raise InvalidInputError(
            f"{folder / 'config.json'}: vocab_size is {vocabulary!r}, which is no size; restore it."
        )
    return MlxFolder(folder=folder, config=config, stored=stored)


def mlx_version() -> str | None:
    """mlx-lm's version, or None where it is not installed."""
    try:
        return importlib.metadata.version("mlx-lm")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_mlx() -> None:
    """Refuse where MLX is not installed.

    Raises:
        UnsupportedError: naming what to install.
    """
    if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx_lm") is None:
        raise UnsupportedError(f"Running an MLX folder needs mlx and mlx-lm; install them: {INSTALL}")
