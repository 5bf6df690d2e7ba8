"""A profile: how a model used its experts on some text. Small, mergeable, and read without torch.

On disk a profile is a folder: `profile.json` (what was observed) and `statistics.safetensors` (fp64 accumulators named
`layers.<L>.<accumulator>`, see `calibration.accumulators`). `calibration.collect` makes one.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moepress.calibration.accumulators import ACCUMULATORS
from moepress.converters.safetensors.scheme import SUPPORTED_BITS
from moepress.errors import InvalidInputError
from moepress.models.families.family import Shape, shape_of
from moepress.models.families.table import family_of
from moepress.models.storage.folder import read_json
from moepress.models.storage.inside import check_files
from moepress.models.storage.safetensors_file import read_array, read_header
from moepress.models.storage.writer import array_entry, write_json, write_shard
from moepress.runs.files import open_plain, sha256_of
from moepress.runs.phases import phase

if TYPE_CHECKING:
    from moepress.calibration.corpus import Corpus
    from moepress.converters.safetensors.artifact import Artifact
    from moepress.models.storage.checkpoint import Checkpoint

Statistic = NDArray[np.float64]
SCHEMA_VERSION = "1.0"
SHARDS = 8
_HASHED_WHOLE_BYTES = 1 << 30
STATISTICS, DESCRIPTION = "statistics.safetensors", "profile.json"
BIT_LOSSES, BIT_TOKENS = "bit_losses", "bit_tokens"
"""Beside the accumulators of a layer, where it was probed: fp64 [widths], [1]. They have no domains."""


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


@phase("check")
def fingerprint(checkpoint: "Checkpoint | Artifact") -> str:
    """A digest of the config, of every tensor's name, dtype, shape and place, and of the bytes.

    Shards above 1 GiB are sampled (256 places of 4 KiB each): hashing all of a 671 B model would take longer than
    pruning it.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.stored):
        entry = checkpoint.stored[name]
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.begin}".encode())
    for shard in checkpoint.shards:
        path = checkpoint.folder / shard
        size = path.stat().st_size
        if size <= _HASHED_WHOLE_BYTES:
            digest.update(_whole_digest(path, size, path.stat().st_mtime_ns).encode())
            continue
        with open_plain(path) as stream:
            for index in range(256):
                stream.seek(size * index // 256)
                digest.update(stream.read(4096))
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _whole_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    """SHA-256 of a file, remembered within the process: `run` asks for the same model at every stage."""
    return sha256_of(path)


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
        array_entry(f"layers.{layer}.{name}", value)
        for layer in profile.layers
        for name, value in sorted(profile.statistics[layer].items())
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
    found = read_json(folder / DESCRIPTION)
    if found.get("schema_version") != SCHEMA_VERSION:
        raise InvalidInputError(
            f"{folder / DESCRIPTION} has schema version {found.get('schema_version')!r} and this moepress reads "
            f"{SCHEMA_VERSION}; profile the model again."
        )
    entries = read_header(folder / STATISTICS)
    try:
        config, layers, domains = found["config"], tuple(found["layers"]), tuple(found["domains"])
        family = family_of(config)
        shape = shape_of(family, config)
        statistics = {
            layer: {name: read_array(entries[f"layers.{layer}.{name}"]) for name in _names(entries, layer)}
            for layer in layers
        }
        for layer in layers:
            for name in ACCUMULATORS:
                if statistics[layer][name].shape != (len(domains), SHARDS, shape.experts):
                    raise InvalidInputError(f"{folder / STATISTICS}: layers.{layer}.{name} has the wrong shape.")
            _check_bit_losses(folder, layer, statistics[layer])
        return Profile(
            model=found["model"],
            model_name=found["model_name"],
            family=family.name,
            config=config,
            shape=shape,
            domains=domains,
            layers=layers,
            calibration=found["calibration"],
            inventory=found["inventory"],
            statistics=statistics,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{folder} is not a whole profile ({error!r}); profile the model again.") from error


def _check_bit_losses(folder: Path, layer: int, found: Mapping[str, Statistic]) -> None:
    if BIT_LOSSES not in found:
        return
    losses = found[BIT_LOSSES]
    sound = losses.shape == (len(SUPPORTED_BITS),) and found[BIT_TOKENS].shape == (1,)
    if not sound or not bool(np.isfinite(losses).all()):
        raise InvalidInputError(f"{folder / STATISTICS}: layers.{layer}.{BIT_LOSSES} is not what a profile holds.")


def _names(entries: Mapping[str, object], layer: int) -> list[str]:
    prefix = f"layers.{layer}."
    return [name.removeprefix(prefix) for name in entries if name.startswith(prefix)]


def _merged_bit_losses(found: Sequence[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    """Their mean over tokens; nothing where one profile has none, for a part of the text would mislead."""
    if not all(BIT_LOSSES in statistics for statistics in found):
        return {}
    tokens = np.stack([statistics[BIT_TOKENS] for statistics in found])
    losses = np.stack([statistics[BIT_LOSSES] for statistics in found])
    return {BIT_LOSSES: (tokens * losses).sum(axis=0) / max(tokens.sum(), 1), BIT_TOKENS: tokens.sum(axis=0)}


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
    statistics: dict[int, dict[str, Statistic]] = {}
    for layer in first.layers:
        merged: dict[str, Statistic] = {}
        for name, sample in first.statistics[layer].items():
            if name in (BIT_LOSSES, BIT_TOKENS):
                continue
            total = np.zeros((len(domains), *sample.shape[1:]))
            for profile in profiles:
                rows = [domains.index(d) for d in profile.domains]
                value = profile.statistics[layer][name]
                if ACCUMULATORS.get(name) == "max":
                    total[rows] = np.maximum(total[rows], value)
                else:
                    np.add.at(total, rows, value)
            merged[name] = total
        if not all(bool(p.statistics[layer]["leave_one_out"].any()) for p in profiles):
            merged["leave_one_out"][:] = 0  # one was made without: a sum over a part of the text would mislead
        statistics[layer] = merged | _merged_bit_losses([p.statistics[layer] for p in profiles])
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
        statistics=statistics,
    )
