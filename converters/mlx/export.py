"""export to MLX: the codes of a compressed-tensors folder as mlx-lm has them. Not one of them changes.

MLX's affine layout stores a matrix as uint32 words, a row being one little-endian bit stream of codes from 0 on, which
is what `weight_packed` holds already; with W = code * scale + bias our symmetric codes have the bias
-2**(bits-1) * scale, exact in the scales' dtype, and those with zero points -(zero + 2**(bits-1)) * scale, rounded to
it. The experts of a layer are one tensor a projection, `switch_mlp`.

Source: mlx-lm 0.32 (`utils.load_model`, `models/switch_layers.py`), tried on the CPU.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moepress import __version__
from moepress.converters.safetensors.artifact import Artifact, refuse_floats
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import UnsupportedError
from moepress.models.families.family import Part, part_of
from moepress.models.storage.experts import without_mtp
from moepress.models.storage.safetensors_file import read_bytes, read_header
from moepress.models.storage.tensors import tensor_bytes
from moepress.models.storage.writer import (
    Chunk,
    Entry,
    copied_entry,
    copy_companions,
    write_index,
    write_json,
    write_shard,
)
from moepress.runs.journal import Run
from moepress.runs.progress import track

GROUPS = (32, 64, 128)
FAMILIES: Mapping[str, str] = {
    "qwen3_moe": "mlp.switch_mlp",
    "qwen2_moe": "mlp.switch_mlp",
    "olmoe": "mlp.switch_mlp",
    "deepseek_v2": "mlp.switch_mlp",
    "deepseek_v3": "mlp.switch_mlp",
    "kimi_k2": "mlp.switch_mlp",
    "glm4_moe": "mlp.switch_mlp",
    "mixtral": "block_sparse_moe.switch_mlp",
}
"""`model_type` -> where mlx-lm's model has the experts of a layer."""
_MATRICES = ("gate_proj", "up_proj", "down_proj")
_KEPT_BITS = {"BF16": 8, "F16": 11, "F32": 24}  # a product is rounded by at most two to minus that of itself


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxExported:
    """What an export did: bytes of all tensors, how many matrices have codes, and what a user should know."""

    bytes_after: int
    modules: int
    notes: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrices:
    """A quantized module of the result: its name, and the matrices on disk that it is made of."""

    module: str
    names: tuple[str, ...]
    stacked: bool


def check_mlx(artifact: Artifact) -> None:
    """Refuse what mlx-lm could not load, before any work.

    Raises:
        UnsupportedError: the family, the layout or the groups.
    """
    family = artifact.family.name
    if family not in FAMILIES:
        raise UnsupportedError(
            f"Models of type {family} can not be exported to MLX: moepress has no row for them; it has "
            f"{', '.join(sorted(FAMILIES))}."
        )
    refuse_floats(artifact.floats, "mlx", artifact.folder)
    if artifact.layout != "compressed-tensors":
        raise UnsupportedError("MLX's words are those of the compressed-tensors folder; export that one to mlx.")
    for scheme in {scheme for _targets, scheme in artifact.schemes}:
        if scheme.group_size > 0 and scheme.group_size % 32:
            raise UnsupportedError(
                f"Groups of {scheme.group_size} columns can not be exported to MLX, which has {GROUPS}; use "
                "--group-size 32, 64 or 128."
            )
    if _rounding(artifact) >= 0.5:
        raise UnsupportedError(
            "Codes of 8 bits with zero points can not be exported to MLX, whose biases have the dtype of scales: zero "
            "points times scales would be off by as much as the distance of two codes; quantize without --asymmetric."
        )


def export_mlx(artifact: Artifact, run: Run) -> MlxExported:
    """Write the folder, a shard for every layer, and finish the run.

    Raises:
        UnsupportedError: as `check_mlx`.
        InvalidInputError: a tensor is damaged.
    """
    check_mlx(artifact)
    shards = _by_layer(artifact)
    names = {layer: f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n, layer in enumerate(shards, start=1)}
    modules: dict[str, tuple[int, int]] = {}
    with track("export to mlx", len(shards), unit="shards") as advance:
        for layer, (coded, plain) in shards.items():
            modules |= {one.module: _width(artifact, one) for one in coded}
            if run.done(names[layer]) is None:
                write = functools.partial(_write, artifact, coded, plain)
                run.write(names[layer], names[layer], write)
            advance(1)
    weight_map, total = _listed(run.folder, names.values())
    write_index(run.folder, weight_map, total)
    write_json(run.folder / "config.json", _config(artifact, modules))
    copy_companions(artifact.folder, run.folder)
    (run.folder / "quantize_config.json").unlink(missing_ok=True)
    notes = _notes(artifact)
    summary = {"moepress": __version__, "stage": "export", "target": "mlx", "modules": len(modules), "notes": notes}
    write_json(run.folder / "moepress.json", summary)
    run.finish()
    return MlxExported(bytes_after=total, modules=len(modules), notes=notes)


def mlx_bytes(artifact: Artifact) -> int:
    """Bytes of all tensors, exactly."""
    coded = [one for matrices, _plain in _by_layer(artifact).values() for one in matrices]
    plain = [name for _coded, names in _by_layer(artifact).values() for name in names]
    sizes = [entry.bytes for one in coded for entry in _entries(artifact, one)]
    return sum(sizes) + sum(artifact.stored[name].bytes for name in plain)


def _by_layer(artifact: Artifact) -> dict[int | None, tuple[list[_Matrices], list[str]]]:
    """What each shard holds: modules with codes, and tensors as they are; multi-token prediction is left out."""
    family, layers = artifact.family, artifact.outline.shape.layers
    shards: dict[int | None, tuple[list[_Matrices], list[str]]] = {}
    for layer in (*range(layers), None):
        coded, plain = list[_Matrices](), list[str]()
        for name in artifact.outline.names_by_layer.get(layer, ()):
            if family.expert_of(name) is not None or part_of(family, name, layers) is Part.TOWERS:
                continue
            if artifact.is_quantized(name):
                coded.append(_Matrices(module=name.removesuffix(".weight"), names=(name,), stacked=False))
            else:
                plain.append(name)
        if layer is not None and layer in artifact.outline.moe_layers:
            coded += _stacks(artifact, layer)
        shards[layer] = coded, plain
    return shards


def _stacks(artifact: Artifact, layer: int) -> Iterator[_Matrices]:
    experts = [artifact.family.expert_names(layer, n) for n in range(artifact.outline.shape.experts)]
    for place, leaf in enumerate(_MATRICES):
        module = f"{artifact.family.layers_at}{layer}.{FAMILIES[artifact.family.name]}.{leaf}"
        yield _Matrices(module=module, names=tuple(own[place] for own in experts), stacked=True)


def _write(artifact: Artifact, coded: Sequence[_Matrices], plain: Sequence[str], path: Path) -> None:
    entries = [entry for one in coded for entry in _entries(artifact, one)]
    entries += [copied_entry(artifact.stored[name]) for name in plain]
    write_shard(path, entries, kind="mlx")


def _entries(artifact: Artifact, one: _Matrices) -> tuple[Entry, ...]:
    """Words, scales and biases of a module."""
    first = one.names[0].removesuffix(".weight")
    words, scales = artifact.stored[f"{first}.weight_packed"], artifact.stored[f"{first}.weight_scale"]
    (_bits, group), (rows, columns) = _width(artifact, one), artifact.shapes[one.names[0]]
    lead = (len(one.names),) if one.stacked else ()
    return (
        _entry(f"{one.module}.weight", "U32", (*lead, *words.shape), 4, lambda: _words(artifact, one)),
        *(
            _entry(
                f"{one.module}.{leaf}",
                scales.dtype,
                (*lead, rows, columns // group),
                4 if scales.dtype == "F32" else 2,
                functools.partial(made, artifact, one, group),
            )
            for leaf, made in (("scales", _scales), ("biases", _biases))
        ),
    )


def _entry(name: str, dtype: str, shape: tuple[int, ...], width: int, data: Callable[[], Iterator[Chunk]]) -> Entry:
    size = width
    for length in shape:
        size *= length
    return Entry(name=name, dtype=dtype, shape=shape, bytes=size, data=data)


def _words(artifact: Artifact, one: _Matrices) -> Iterator[Chunk]:
    for name in one.names:
        yield read_bytes(artifact.stored[f"{name.removesuffix('.weight')}.weight_packed"])


def _scales(artifact: Artifact, one: _Matrices, group: int) -> Iterator[Chunk]:
    for name in one.names:
        yield _spread(artifact, name, group, artifact.scales(name))


def _biases(artifact: Artifact, one: _Matrices, group: int) -> Iterator[Chunk]:
    """What code 0 stands for."""
    for name in one.names:
        scales, zeros, lowest = artifact.scales(name), artifact.zeros(name), artifact.scheme_of(name).code_min
        steps = scales.new_full(scales.shape, lowest) if zeros is None else (lowest - zeros).to(scales.dtype)
        yield _spread(artifact, name, group, scales * steps)


def _spread(artifact: Artifact, name: str, group: int, numbers_OG: Tensor) -> Chunk:
    """Bytes of numbers of our groups, for each of MLX's."""
    times = artifact.shapes[name][1] // group // numbers_OG.shape[1]
    return tensor_bytes(numbers_OG.repeat_interleave(times, dim=1))


def _group(scheme: Scheme, columns: int) -> int:
    """The largest group that MLX has and that lies whole in ours; a larger one of ours is repeated."""
    own = scheme.columns_per_group(columns)
    return next(size for size in reversed(GROUPS) if own % size == 0)


def _width(artifact: Artifact, one: _Matrices) -> tuple[int, int]:
    """Bits and group of a module's codes."""
    scheme = artifact.scheme_of(one.names[0])
    return scheme.bits, _group(scheme, artifact.shapes[one.names[0]][1])


def _listed(folder: Path, names: Any) -> tuple[dict[str, str], int]:
    weight_map: dict[str, str] = {}
    total = 0
    for name in names:
        entries = read_header(folder / name)
        weight_map |= dict.fromkeys(entries, name)
        total += sum(entry.bytes for entry in entries.values())
    return weight_map, total


def _config(artifact: Artifact, modules: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """config.json with what mlx-lm asks for and transformers 5 does not save, and the codes of every module."""
    config: dict[str, Any] = json.loads(json.dumps(dict(without_mtp(artifact.family, artifact.config))))
    config.pop("quantization_config", None)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {**rope, "type": rope["rope_type"]})
    if artifact.family.name in ("qwen3_moe", "qwen2_moe"):
        config.setdefault("num_experts", config.get("num_local_experts"))
    if artifact.family.name == "kimi_k2":
        config["model_type"] = "deepseek_v3"
    usual = max(set(modules.values()), key=list(modules.values()).count)
    stated: dict[str, Any] = {"bits": usual[0], "group_size": usual[1], "mode": "affine"}
    stated |= {m: {"bits": b, "group_size": g, "mode": "affine"} for m, (b, g) in modules.items() if (b, g) != usual}
    return config | {"quantization": stated, "quantization_config": stated}


def _notes(artifact: Artifact) -> list[str]:
    layers = artifact.outline.shape.layers
    dropped = sum((artifact.family.layer_of(name) or 0) >= layers for name in artifact.shapes)
    notes = [f"The multi-token-prediction layer was left out ({dropped} tensors)."] if dropped else []
    if share := _rounding(artifact):
        notes.append(
            f"Biases, zero points times scales, are rounded: by at most {share:.2g} of the distance of two codes."
        )
    return notes


def _rounding(artifact: Artifact) -> float:
    """How far a bias may be from zero point times scale, as a share of the scale; 0 where each has room for it."""
    widths = [scheme.bits for _targets, scheme in artifact.schemes if not scheme.symmetric]
    stored = {entry.dtype for name, entry in artifact.stored.items() if name.endswith(".weight_scale")}
    kept = min((_KEPT_BITS[dtype] for dtype in stored), default=24)
    return 0.0 if kept >= 24 or not widths else float(2 ** (max(widths) - kept))
