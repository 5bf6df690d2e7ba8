"""export: lay the codes of a quantized folder out in another format. Codes do not change."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from moepress import __version__
from moepress.converters.safetensors import compressed_tensors, compressed_tensors_config, gptq, gptq_config
from moepress.converters.safetensors.artifact import Artifact, refuse_floats
from moepress.converters.safetensors.names import Names, renamed
from moepress.converters.safetensors.patterns import PREFIX
from moepress.converters.safetensors.scheme import Scheme
from moepress.converters.safetensors.targets import groups_by_part, targets_of
from moepress.errors import UnsupportedError
from moepress.models.storage.folder import read_json
from moepress.models.storage.tensors import DTYPES, read_tensor, tensor_entry
from moepress.models.storage.writer import Entry, copy_companions, write_index, write_json, write_shard
from moepress.runs.journal import Run
from moepress.runs.progress import track

Target = Literal["gptq", "compressed-tensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export did.

    Attributes:
        bytes_after: size of all tensors.
        modules: number of quantized matrices.
        scale_error: largest relative change of a scale; 0 when all are exact in the target's dtype.
        notes: what a user should know.
    """

    bytes_after: int
    modules: int
    scale_error: float
    notes: list[str] = field(default_factory=list)


def check_target(artifact: Artifact, target: Target) -> None:
    """Refuse what a layout cannot hold, before any work.

    Raises:
        UnsupportedError: codes are floats, bits of experts differ, or lm_head is quantized.
    """
    refuse_floats(artifact.floats, target, artifact.folder)
    if len(_schemes(artifact)[0]) > 1:
        raise UnsupportedError(
            f"{artifact.folder} has experts of mixed bits, which moepress lays out for ONNX only (--to onnx); loaders "
            "of other layouts take one width for all of them."
        )
    if target == "gptq" and artifact.family.head in artifact.shapes and artifact.is_quantized(artifact.family.head):
        raise UnsupportedError("The GPTQ layout of a quantized lm_head is read by no MoE loader; quantize without it.")


def _schemes(artifact: Artifact) -> tuple[dict[Scheme, list[int]], dict[Scheme, list[str]]]:
    """Scheme -> layers whose experts have it, and -> the other quantized matrices that have it."""
    experts, others = dict[Scheme, set[int]](), dict[Scheme, list[str]]()
    for name in sorted(n for n in artifact.shapes if artifact.is_quantized(n)):
        scheme, layer = artifact.scheme_of(name), artifact.family.layer_of(name)
        if layer is not None and artifact.family.expert_of(name) is not None:
            experts.setdefault(scheme, set()).add(layer)
        else:
            others.setdefault(scheme, []).append(name)
    return {scheme: sorted(layers) for scheme, layers in experts.items()}, others


def export(artifact: Artifact, target: Target, run: Run, names: Names = Names.HUB) -> Exported:
    """Write the artifact in another layout into the run's folder and finish the run; shard by shard.

    Args:
        artifact: what is laid out.
        target: the layout.
        run: whose folder gets it.
        names: whose names the tensors get.

    Raises:
        UnsupportedError: a scale lies outside what the target's dtype can hold, or lm_head is quantized.
        InvalidInputError: the artifact is not whole.
    """
    check_target(artifact, target)
    other = renamed(artifact.family, artifact.shapes) if names is Names.TRANSFORMERS else {}
    by_shard: dict[str, list[str]] = {shard: [] for shard in artifact.shards}
    for name in artifact.shapes:
        stored = artifact.stored.get(name) or artifact.stored[f"{name.removesuffix('.weight')}.{artifact.suffixes[0]}"]
        by_shard[stored.file.name].append(name)
    errors: list[float] = [0.0]
    with track(f"export to {target}", len(by_shard), unit="shards") as advance:
        for shard, mine in by_shard.items():
            if run.done(shard) is None:
                run.write(shard, shard, functools.partial(_write_shard, artifact, target, mine, other))
            done = run.done(shard)
            errors.append(float(done.note["scale_error"]) if done else 0.0)
            advance(1)
    return _finish(artifact, target, run, max(errors), names, other)


def _write_shard(
    artifact: Artifact, target: Target, names: list[str], other: Mapping[str, str], path: Path
) -> Mapping[str, Any]:
    entries: list[Entry] = []
    error = 0.0
    for name in names:
        if artifact.is_quantized(name):
            codes, scales = artifact.codes(name)
            tensors = _LAYOUTS[target](artifact, name, other.get(name, name), codes, scales, artifact.zeros(name))
            error = max(error, gptq.half_scale_error(scales) if target == "gptq" else 0.0)
            entries += [tensor_entry(part, tensor) for part, tensor in tensors.items()]
        else:
            entries.append(tensor_entry(other.get(name, name), read_tensor(artifact.stored[name])))
    write_shard(path, entries)
    return {"scale_error": error}


def _gptq(
    artifact: Artifact, name: str, written: str, codes: Tensor, scales: Tensor, zeros: Tensor | None
) -> dict[str, Tensor]:
    return gptq.layer_tensors(written.removesuffix(".weight"), codes, scales, artifact.scheme_of(name), zeros)


def _compressed(
    artifact: Artifact, name: str, written: str, codes: Tensor, scales: Tensor, zeros: Tensor | None
) -> dict[str, Tensor]:
    """Scales get the model's dtype where it holds them exactly (ours always do), else they stay fp16."""
    dtype = DTYPES[artifact.stored[artifact.family.embeddings].dtype]
    exact = bool((scales.to(dtype).to(scales.dtype) == scales).all())
    scheme, stored = artifact.scheme_of(name), dtype if exact else scales.dtype
    return compressed_tensors.layer_tensors(written.removesuffix(".weight"), codes, scales, scheme, stored, zeros)


_LAYOUTS: dict[Target, Callable[[Artifact, str, str, Tensor, Tensor, Tensor | None], dict[str, Tensor]]] = {
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}


def _finish(
    artifact: Artifact, target: Target, run: Run, scale_error: float, written: Names, renames: Mapping[str, str]
) -> Exported:
    from moepress.models.storage.safetensors_file import read_header

    weight_map: dict[str, str] = {}
    total = 0
    for shard in artifact.shards:
        entries = read_header(run.folder / shard)
        weight_map |= dict.fromkeys(entries, shard)
        total += sum(entry.bytes for entry in entries.values())
    write_index(run.folder, weight_map, total)
    quantized = {n.removesuffix(".weight") for n in artifact.shapes if artifact.is_quantized(n)}
    plain = sorted(
        (
            renames.get(n, n).removesuffix(".weight")
            for n, s in artifact.shapes.items()
            if _is_plain_linear(artifact, n, s)
        ),
        key=artifact.family.by_layer,
    )
    config, family, (experts, others) = dict(artifact.config), artifact.family, _schemes(artifact)
    scheme = next(iter(experts), artifact.scheme)
    apart = {other: names for other, names in others.items() if other != scheme}
    if target == "gptq":
        config["quantization_config"] = gptq_config.quantize_config(
            scheme,
            [gptq_config.module_pattern(name) for name in plain],
            {
                f"^{target.removeprefix(PREFIX)}": other
                for other, names in apart.items()
                for target in targets_of(family, names, joined=True)
            },
        )
        write_json(run.folder / "quantize_config.json", config["quantization_config"])
    else:
        tied = [] if family.head in artifact.shapes else [family.head]
        names = family.excluded([*(f"{name}.weight" for name in plain), *tied])
        ignored = sorted(names, key=family.by_layer)
        groups = groups_by_part(family, experts, others) if apart else ()
        config["quantization_config"] = compressed_tensors_config.quantization_config(scheme, ignored, groups)
    write_json(run.folder / "config.json", config)
    copy_companions(artifact.folder, run.folder)
    if target != "gptq":
        (run.folder / "quantize_config.json").unlink(missing_ok=True)  # of the GPTQ folder that this one was made of
    notes = []
    if scale_error > 0:
        notes.append(f"Some scales are not exact in fp16; the largest changes by {scale_error:.2g} of its value.")
    if written is Names.TRANSFORMERS and not renames:
        notes.append(
            f"The names of {family.name} are the same on the hub and in transformers; --names changes nothing."
        )
    result = Exported(bytes_after=total, modules=len(quantized), scale_error=scale_error, notes=notes)
    note = {"moepress": __version__, "stage": "export", "target": target, "modules": len(quantized), "notes": notes}
    before = artifact.folder / "moepress.json"
    said = read_json(before) if before.is_file() else {}
    # Asked of every layout: whether scales have either sign, and which experts these are.
    note |= {key: said[key] for key in ("solver", "experts_before", "plan") if said.get(key) is not None}
    note |= {"names": written.value} if renames else {}
    write_json(run.folder / "moepress.json", note)
    run.finish()
    return result


def _is_plain_linear(artifact: Artifact, name: str, shape: tuple[int, ...]) -> bool:
    linear = len(shape) == 2 and name.endswith(".weight") and name != artifact.family.embeddings
    return linear and not artifact.is_quantized(name)
