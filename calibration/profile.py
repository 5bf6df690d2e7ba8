"""A profile: how a model used its experts on some text. Small, mergeable, and read without torch.

On disk a profile is a folder: `profile.json` (what was observed) and `statistics.safetensors` (fp64 accumulators named
`layers.<L>.<accumulator>`, see `calibration.accumulators`). `calibration.collect` makes one.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepress.calibration.accumulators import ACCUMULATORS, TOTALS
from moepress.converters.safetensors.scheme import SUPPORTED_BITS
from moepress.errors import InvalidInputError
from moepress.models.families.family import Part, Shape, shape_of
from moepress.models.families.table import family_of
from moepress.models.storage.folder import read_json
from moepress.models.storage.inside import check_files
from moepress.models.storage.safetensors_file import Stored, read_array, read_header
from moepress.models.storage.writer import array_entry, write_json, write_shard
from moepress.runs.phases import phase
from moepress.runs.progress import waiting
from moepress.runs.store.remote import open_file, pieces, size_of
from moepress.runs.text import cut

if TYPE_CHECKING:
    from moepress.calibration.corpus import Corpus
    from moepress.converters.safetensors.artifact import Artifact
    from moepress.models.storage.checkpoint import Checkpoint

Statistic = NDArray[np.float64]
SCHEMA_VERSION = "1.0"
SHARDS = 8
_HASHED_WHOLE_BYTES = 1 << 30
STATISTICS, DESCRIPTION = "statistics.safetensors", "profile.json"
BIT_LOSSES, BIT_TOKENS, GRID_LOSSES = "bit_losses", "bit_tokens", "grid_losses"
"""Beside the accumulators of a layer, where it was probed: fp64 [widths], [1], [types]. They have no domains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Statistics of a model's experts.

    Attributes:
        model: fingerprint of the checkpoint that was run.
        model_name: its folder's name, for people.
        family: its family's name.
        config: its config.json, so that plans need no model.
        shape: its numbers.
        domains: names, the first axis of all statistics.
        layers: the MoE layers, ascending.
        calibration: what it was fed: digests, seed, window, tokens per domain, notes.
        inventory: bytes and parameters of the checkpoint by part, for size estimates.
        statistics: layer -> accumulator -> fp64 [S, B, E] (totals [S, B]); `bit_losses` and `bit_tokens` if measured.
        mtp: the same of multi-token-prediction layers, apart, for sizes and losses are those of decoder layers.
        grids: GGUF's types that `grid_losses` are of, in order, and `rounded`; empty where none were measured.
        linears: the matrices that `--include` may add, as JSON (`compress.budget.sizes.linear_rows`).
        file: what a GGUF file of the model is made of, as JSON (`compress.budget.gguf_sizes`); with `grids`.
        kind_losses: what rounding one kind of matrix in some layers costs, as JSON (`compress.budget.kind_losses`).
    """

    model: str
    model_name: str
    family: str
    config: Mapping[str, Any]
    shape: Shape
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    calibration: Mapping[str, Any]
    inventory: Mapping[str, Any]
    statistics: Mapping[int, Mapping[str, Statistic]]
    mtp: Mapping[int, Mapping[str, Statistic]] = field(default_factory=dict)
    grids: tuple[str, ...] = ()
    kind_losses: tuple[Mapping[str, Any], ...] = ()
    linears: tuple[Mapping[str, Any], ...] = ()
    file: Mapping[str, Any] | None = None


@phase("check")
def fingerprint(checkpoint: "Checkpoint | Artifact") -> str:
    """A digest of the config, of every tensor's name, dtype, shape and place, and of the bytes.

    Shards above 1 GiB are sampled (256 places of 4 KiB each): hashing all of a 671 B model would take longer than
    pruning it.
    """
    with waiting("looking at the model's bytes"):
        return _digest(checkpoint)


def _digest(checkpoint: "Checkpoint | Artifact") -> str:
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.stored):
        entry = checkpoint.stored[name]
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.begin}".encode())
    for shard in checkpoint.shards:
        path = checkpoint.folder / shard
        size = size_of(path)
        if size <= _HASHED_WHOLE_BYTES:
            digest.update(_whole_digest(path, size, path.stat().st_mtime_ns).encode())
            continue
        places = [size * index // 256 for index in range(256)]
        for piece in pieces(path, [(place, place + 4096) for place in places]):
            digest.update(piece)
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _whole_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    """SHA-256 of a file, remembered within the process: `run` asks for the same model at every stage."""
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def describe_corpus(corpus: "Corpus", seed: int) -> dict[str, Any]:
    """What a profile, a plan and a report say about the calibration text."""
    return {
        "digest": corpus.digest,
        "embedded": corpus.embedded,
        "seed": seed,
        "window": int(corpus.windows.shape[1]),
        "windows": int(corpus.windows.shape[0]),
        "tokens": int(corpus.windows.numel()),
        "tokens_per_domain": dict(zip(corpus.domains, map(int, corpus.tokens_per_domain), strict=True)),
        "bos": corpus.bos_policy,
        "notes": list(corpus.notes),
    }


def save_profile(profile: Profile, folder: Path) -> None:
    """Write a profile's two files into a folder that exists."""
    entries = [
        array_entry(f"{place}.{layer}.{name}", value)
        for place, found in (("layers", profile.statistics), ("mtp", profile.mtp))
        for layer in sorted(found)
        for name, value in sorted(found[layer].items())
    ]
    (folder / STATISTICS).unlink(missing_ok=True)  # a link of that name would not be followed
    write_shard(folder / STATISTICS, entries)
    description = {
        "schema_version": SCHEMA_VERSION,
        "model": profile.model,
        "model_name": profile.model_name,
        "family": profile.family,
        "config": dict(profile.config),
        "domains": list(profile.domains),
        "layers": list(profile.layers),
        "shards": SHARDS,
        "calibration": dict(profile.calibration),
        "inventory": dict(profile.inventory),
    }
    if profile.mtp:
        description["mtp_layers"] = sorted(profile.mtp)
    if profile.linears:
        description["linears"] = [dict(row) for row in profile.linears]
    if profile.grids:
        rows = [dict(row) for row in profile.kind_losses]
        description |= {"grids": list(profile.grids), "kind_losses": rows, "file": profile.file}
    write_json(folder / DESCRIPTION, description)


def load_profile(folder: Path) -> Profile:
    """Read a profile.

    Raises:
        InvalidInputError: the folder is not a profile, or statistics are missing from it.
    """
    if folder.is_dir():
        check_files(folder)
    if not (folder / DESCRIPTION).is_file():
        raise InvalidInputError(f"{folder} has no {DESCRIPTION}; give a folder made by `moepress profile`.")
    found = _description(folder / DESCRIPTION)
    family = family_of(found.config)
    shape = shape_of(family, found.config)
    if any(layer >= shape.layers for layer in found.layers) or any(n < shape.layers for n in found.mtp_layers):
        raise InvalidInputError(f"{folder / DESCRIPTION} has layers that its config has not; profile the model again.")
    entries = read_header(folder / STATISTICS)
    return Profile(
        model=found.model,
        model_name=found.model_name,
        family=family.name,
        config=found.config,
        shape=shape,
        domains=found.domains,
        layers=found.layers,
        calibration=found.calibration,
        inventory={part.value: dict(row) for part, row in found.inventory.items()},
        statistics={layer: _statistics(folder, entries, layer, found, shape.experts) for layer in found.layers},
        mtp={n: _statistics(folder, entries, n, found, shape.experts, place="mtp") for n in found.mtp_layers},
        grids=found.grids,
        kind_losses=tuple(row.model_dump(mode="json") for row in found.kind_losses),
        linears=tuple(row.model_dump(mode="json") for row in found.linears),
        file=found.file,
    )


_Layer = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]


class _Weight(BaseModel):
    """Of one part of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    parameters: int = Field(ge=0, lt=1 << 63)
    bytes: int = Field(ge=0, lt=1 << 63)


class _KindRow(BaseModel):
    """What rounding one kind of matrix costs; see `compress.budget.sensitivities`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str | None
    layers: tuple[_Layer, _Layer] | None
    kl: float = Field(ge=0, allow_inf_nan=False, strict=True)
    error: float = Field(ge=0, allow_inf_nan=False, strict=True)


class _LinearRow(BaseModel):
    """A matrix that `--include` may add."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: Part
    layer: _Layer | None
    routed: bool
    rows: int = Field(gt=0, lt=1 << 40)
    columns: int = Field(gt=0, lt=1 << 40)


class _Description(BaseModel):
    """profile.json."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal["1.0"]
    model: str
    model_name: str
    config: dict[str, Any]
    domains: tuple[str, ...] = Field(min_length=1)
    layers: tuple[_Layer, ...] = Field(min_length=1)
    mtp_layers: tuple[_Layer, ...] = ()
    calibration: dict[str, Any]
    inventory: dict[Part, _Weight]
    grids: tuple[str, ...] = ()
    kind_losses: tuple[_KindRow, ...] = ()
    linears: tuple[_LinearRow, ...] = ()
    file: dict[str, Any] | None = None


def _description(file: Path) -> _Description:
    """Read and check profile.json.

    Raises:
        InvalidInputError: naming the first field that is wrong.
    """
    found = read_json(file)
    version = found.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InvalidInputError(
            f"{file} has schema version {cut(version)} and this moepress reads {SCHEMA_VERSION}; profile the model "
            "again."
        )
    try:
        made = _Description.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"{file} is not sound: {where}: {first['msg']}; profile the model again.") from error
    for name, values in (("domains", made.domains), ("layers", made.layers), ("mtp_layers", made.mtp_layers)):
        if len(set(values)) < len(values):
            raise InvalidInputError(f"{file} names one of its {name} twice; profile the model again.")
    _check_calibration(file, made)
    return made


def _check_calibration(file: Path, made: _Description) -> None:
    """What plans and reports read of it; of merged profiles other things are there."""
    tokens, notes = made.calibration.get("tokens", 0), made.calibration.get("notes", [])
    sound = isinstance(tokens, int) and 0 <= tokens < 1 << 63
    if not sound or not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise InvalidInputError(f"{file}: its calibration is not what a profile holds; profile the model again.")


def _statistics(
    folder: Path, entries: Mapping[str, Stored], layer: int, found: _Description, experts: int, place: str = "layers"
) -> dict[str, Statistic]:
    """One layer's accumulators and totals, whole, finite and of the right shape."""
    rows, whole, totals = {}, (len(found.domains), SHARDS, experts), (len(found.domains), SHARDS)
    for name in _names(entries, f"{place}.{layer}."):
        entry = entries[f"{place}.{layer}.{name}"]
        wanted = whole if name in ACCUMULATORS else totals if name in TOTALS else None
        if entry.dtype != "F64" or (wanted is not None and entry.shape != wanted):
            raise InvalidInputError(
                f"{folder / STATISTICS}: {entry.name} is {entry.dtype} {list(entry.shape)}, and F64 "
                f"{'' if wanted is None else list(wanted)} is wanted; profile the model again."
            )
        rows[name] = read_array(entry)
        if not bool(np.isfinite(rows[name]).all()) or (wanted is not None and bool((rows[name] < 0).any())):
            raise InvalidInputError(f"{folder / STATISTICS}: {entry.name} holds no sums; profile the model again.")
    lacking = [name for name in (*ACCUMULATORS, *TOTALS) if name not in rows]
    if lacking:
        raise InvalidInputError(f"{folder / STATISTICS} lacks {place}.{layer}.{lacking[0]}; profile the model again.")
    _check_bit_losses(folder, layer, rows, found.grids)
    return rows


def _check_bit_losses(folder: Path, layer: int, found: Mapping[str, Statistic], grids: Sequence[str]) -> None:
    if GRID_LOSSES in found and found[GRID_LOSSES].shape != (len(grids),):
        raise InvalidInputError(
            f"{folder / STATISTICS}: layers.{layer}.{GRID_LOSSES} is not what {DESCRIPTION} says; profile the model "
            "again."
        )
    if BIT_LOSSES not in found:
        return
    losses = found[BIT_LOSSES]
    tokens = found.get(BIT_TOKENS)
    if losses.shape != (len(SUPPORTED_BITS),) or tokens is None or tokens.shape != (1,):
        raise InvalidInputError(f"{folder / STATISTICS}: layers.{layer}.{BIT_LOSSES} is not what a profile holds.")


def _names(entries: Mapping[str, Stored], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in entries if name.startswith(prefix)]


def _merged_bit_losses(found: Sequence[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    """Their mean over tokens; nothing where one profile has none, for a part of the text would mislead."""
    if not all(BIT_LOSSES in statistics for statistics in found):
        return {}
    tokens = np.stack([statistics[BIT_TOKENS] for statistics in found])
    merged = {BIT_TOKENS: tokens.sum(axis=0)}
    for name in (BIT_LOSSES, GRID_LOSSES):
        if all(name in statistics for statistics in found):
            losses = np.stack([statistics[name] for statistics in found])
            merged[name] = (tokens * losses).sum(axis=0) / max(tokens.sum(), 1)
    return merged


def _merged_kind_losses(profiles: Sequence[Profile]) -> dict[str, Any]:
    """Their mean; nothing where one profile has none, or others."""
    first = profiles[0]
    keys = [[(row["kind"], row["layers"]) for row in profile.kind_losses] for profile in profiles]
    if any(profile.grids != first.grids or own != keys[0] for profile, own in zip(profiles, keys, strict=True)):
        return {}
    rows = []
    for alike in zip(*(profile.kind_losses for profile in profiles), strict=True):
        errors = [row["error"] for row in alike]
        mean = {"kl": sum(row["kl"] for row in alike) / len(alike), "error": math.hypot(*errors) / len(alike)}
        rows.append({**alike[0], **mean})
    return {"grids": first.grids, "kind_losses": tuple(rows)}


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """Put profiles of one model together: domains of the same name are added, others stand side by side.

    Raises:
        InvalidInputError: they are of different models.
    """
    first = profiles[0]
    if len(profiles) == 1:
        return first
    if any(p.model != first.model for p in profiles):
        raise InvalidInputError("The profiles are of different models; merge only profiles of one model.")
    domains = tuple(dict.fromkeys(d for p in profiles for d in p.domains))
    predicting = [n for n in first.mtp if all(n in p.mtp for p in profiles)]  # one was made without: a part misleads
    calibration: dict[str, Any] = {
        "merged": [dict(p.calibration) for p in profiles],
        "tokens": sum(int(p.calibration.get("tokens", 0)) for p in profiles),
        "embedded": any(p.calibration.get("embedded") for p in profiles),
    }
    return Profile(
        model=first.model,
        model_name=first.model_name,
        family=first.family,
        config=first.config,
        shape=first.shape,
        domains=domains,
        layers=first.layers,
        calibration=calibration,
        inventory=first.inventory,
        linears=first.linears,
        file=first.file,
        statistics={n: _merged(domains, profiles, [p.statistics[n] for p in profiles]) for n in first.layers},
        mtp={n: _merged(domains, profiles, [p.mtp[n] for p in profiles]) for n in predicting},
        **_merged_kind_losses(profiles),
    )


def _merged(
    domains: Sequence[str], profiles: Sequence[Profile], found: Sequence[Mapping[str, Statistic]]
) -> dict[str, Statistic]:
    """One layer's accumulators of several profiles, by the domains of all of them."""
    merged: dict[str, Statistic] = {}
    for name, sample in found[0].items():
        if name in (BIT_LOSSES, BIT_TOKENS, GRID_LOSSES):
            continue
        total = np.zeros((len(domains), *sample.shape[1:]))
        for profile, statistics in zip(profiles, found, strict=True):
            rows = [domains.index(d) for d in profile.domains]
            if ACCUMULATORS.get(name) == "max":
                total[rows] = np.maximum(total[rows], statistics[name])
            else:
                np.add.at(total, rows, statistics[name])
        merged[name] = total
    if not all(bool(statistics["leave_one_out"].any()) for statistics in found):
        merged["leave_one_out"][:] = 0  # one was made without: a sum over a part of the text would mislead
    return merged | _merged_bit_losses(found)
