"""Rewrite a checkpoint by a plan: copy, rename, slice. Nothing is dequantized; memory is one chunk of one tensor.

A repair scales down projections as they are copied (of fp8 weights their block scales), or copies refitted ones in
their place, and replaces routers' biases and rows.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from moepress import __version__
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.repair_walk import drop_walk
from moepress.compress.pruning.repaired import Edits, Repairs, edits_of, scaled
from moepress.errors import UnsupportedError
from moepress.models.families.family import Family
from moepress.models.forward.tensor_check import check_mtp, check_tensors
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import Cut, cuts_of, mtp_layers, prune_source, pruned_config
from moepress.models.storage.finite import all_finite, nonfinite
from moepress.models.storage.mtp import Mtp, mtp_keep_sets, mtp_note
from moepress.models.storage.safetensors_file import Stored, read_bytes
from moepress.models.storage.tensors import DTYPES, read_tensor, tensor_bytes, tensor_entry
from moepress.models.storage.writer import Chunk, Entry, copy_companions, write_index, write_json, write_shard
from moepress.runs.journal import Run
from moepress.runs.phases import phase
from moepress.runs.progress import track

CHUNK_BYTES = 32 << 20
_NOTHING = Edits()
_SCALES = "_scale_inv"


def prune(
    checkpoint: Checkpoint, plan: Plan, run: Run, *, mtp: Mtp = Mtp.KEEP, repairs: Repairs | None = None
) -> dict[str, Any]:
    """Write the pruned model into the run's folder and finish the run; every shard is a piece.

    Args:
        checkpoint: the original; its tensors are checked against its config first.
        plan: held against the checkpoint by `check_plan` before.
        run: the output in the making.
        mtp: whether the multi-token-prediction layer goes or stays, pruned like the others.
        repairs: what is changed besides, made for this plan; without them every tensor keeps its bytes.

    Returns:
        Bytes before and after, tensors written, repairs, notes.

    Raises:
        InvalidInputError: tensors are missing or surplus, or hold NaN or Inf.
    """
    with phase("check"):
        check_tensors(
            checkpoint.family, checkpoint.config, checkpoint.outline.shape, checkpoint.shapes, folder=checkpoint.folder
        )
    predicting = mtp_keep(checkpoint, plan, mtp)
    config = pruned_config(
        checkpoint.family, checkpoint.config, plan.experts, degroup=plan.degroup, keep_mtp=bool(predicting)
    )
    config = _renumbered(config, checkpoint, {**plan.keep, **predicting})  # refused before anything is written
    edits = edits_of(prune_source(checkpoint, plan.keep, degroup=plan.degroup), repairs) if repairs else _NOTHING
    planned = planned_entries(checkpoint, {**plan.keep, **predicting}, edits)
    with track("prune", len(planned), unit="shards") as advance:
        for shard, entries in planned.items():
            if run.done(shard) is None:
                with phase("write", size=sum(entry.bytes for entry in entries)):
                    run.write(shard, shard, functools.partial(_write, entries))
            advance(1)
    weight_map = {entry.name: shard for shard, entries in planned.items() for entry in entries}
    after = planned_bytes(planned)
    write_index(run.folder, weight_map, after)
    write_json(run.folder / "config.json", config)
    copied = copy_companions(checkpoint.folder, run.folder)
    dropped = sum(1 for name in checkpoint.stored if (checkpoint.family.layer_of(name) or 0) >= checkpoint.shape.layers)
    result: dict[str, Any] = {
        "bytes_before": checkpoint.total_bytes,
        "bytes_after": after,
        "tensors": len(weight_map),
        "experts_before": plan.experts_before,
        "experts": plan.experts,
        "mtp_keep": {str(layer): kept for layer, kept in predicting.items()},
        "copied": copied,
        "notes": [
            *checkpoint.notes,
            *mtp_note(dropped, predicting, plan.experts_before, measured=predicting.keys() <= plan.mtp_keep.keys()),
        ],
    }
    if repairs is not None:
        result["repair"] = repairs.model_dump(mode="json")
    write_json(
        run.folder / "moepress.json", {"moepress": __version__, "stage": "prune", **result, "plan": plan_summary(plan)}
    )
    if repairs is not None:
        run.require_ready()
        drop_walk(run, downs=True)
    run.finish()
    return result


def _renumbered(config: dict[str, Any], checkpoint: Checkpoint, keep: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """The config, with experts under their new numbers in the lists of what a quantization leaves out.

    Raises:
        UnsupportedError: a pattern in such a list goes by the numbers of experts.
    """
    stated, family = config.get("quantization_config"), checkpoint.family
    if not isinstance(stated, dict):
        return config
    changed = dict(stated)
    for key in ("ignore", "modules_to_not_convert"):
        if isinstance(stated.get(key), list):
            found = [_renamed(family, entry, keep) for entry in stated[key]]
            changed[key] = [entry for entry in found if entry is not None]
    return config | {"quantization_config": changed}


def _renamed(family: Family, entry: Any, keep: Mapping[int, Sequence[int]]) -> Any:
    """An entry of such a list; None where it is of an expert that goes."""
    if not isinstance(entry, str):
        return entry
    if entry.startswith("re:"):
        if re.search(r"experts(\\)?\.[(\[]?\d", entry):
            raise UnsupportedError(
                f"config.json: quantization_config leaves out {entry[:80]!r}, which goes by numbers of experts; these "
                "change: write the modules' names in its place."
            )
        return entry
    expert = family.expert_of(f"{entry}.weight")
    if expert is None or expert[0] not in keep:
        return entry
    layer, number, rest = expert
    kept = list(keep[layer])
    return family.renumber(layer, kept.index(number), rest).removesuffix(".weight") if number in kept else None


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What `moepress.json` says of the plan that an output was pruned by."""
    return plan.model_dump(
        mode="json", include={"model", "model_name", "criterion", "domain_weights", "groups", "keep"}
    )


def _write(entries: list[Entry], path: Any) -> None:
    write_shard(path, entries)


def mtp_keep(checkpoint: Checkpoint, plan: Plan, mtp: Mtp) -> dict[int, list[int]]:
    """The experts that the multi-token-prediction layers keep; empty when they go.

    Raises:
        InvalidInputError: such a layer is to stay and is not whole.
        UnsupportedError: nothing says which of its experts should stay.
    """
    if mtp is Mtp.DROP:
        return {}
    for layer in mtp_layers(checkpoint):
        check_mtp(checkpoint, layer, folder=checkpoint.folder)
    return mtp_keep_sets(checkpoint, plan.experts, plan.mtp_keep, degroup=plan.degroup)


def planned_bytes(planned: Mapping[str, Sequence[Entry]]) -> int:
    """Size of all tensors of a pruned model."""
    return sum(entry.bytes for entries in planned.values() for entry in entries)


def planned_entries(
    checkpoint: Checkpoint, keep: Mapping[int, Sequence[int]], edits: Edits = _NOTHING
) -> dict[str, list[Entry]]:
    """What the shards of the original become, tensors in their original order; a shard without any is not there.

    One pass over all tensors: a model may have a hundred thousand of them, in hundreds of shards.

    Args:
        checkpoint: the original.
        keep: layer -> experts kept, ascending. A layer behind the last that is not among them is dropped.
        edits: what a repair changes; by default nothing.
    """
    selected = _selected(checkpoint, keep)
    positions = {layer: {old: new for new, old in enumerate(kept)} for layer, kept in keep.items()}
    by_shard: dict[str, list[Stored]] = {shard: [] for shard in checkpoint.shards}
    for stored in checkpoint.stored.values():
        by_shard[stored.file.name].append(stored)
    layers, planned, layer_of = checkpoint.shape.layers, {}, checkpoint.family.layer_of
    for shard, tensors in by_shard.items():
        stay = [t for t in tensors if (layer_of(t.name) or 0) < layers or layer_of(t.name) in keep]
        stay.sort(key=lambda stored: stored.begin)
        entries = [entry for stored in stay if (entry := _entry(checkpoint, stored, positions, selected, edits))]
        if entries:
            planned[shard] = entries
    return planned


def _entry(
    checkpoint: Checkpoint,
    stored: Stored,
    positions: Mapping[int, Mapping[int, int]],
    selected: Mapping[str, Cut],
    edits: Edits,
) -> Entry | None:
    """What a tensor becomes; None when it is a pruned expert's."""
    name = stored.name
    if name in edits.tensors:
        return tensor_entry(name, edits.tensors[name])
    if name in selected and name in edits.stored:
        return _refitted_entry(stored, name, selected[name].shape(stored.shape), edits.stored[name])
    if name in selected:
        return _cut_entry(stored, selected[name], checkpoint.allow_nonfinite, edits.factors.get(name))
    found = checkpoint.family.expert_of(name)
    if found is not None and found[0] in positions:
        if found[1] not in positions[found[0]]:
            return None
        name = checkpoint.family.renumber(found[0], positions[found[0]][found[1]], found[2])
        if name in edits.stored:
            return _refitted_entry(stored, name, stored.shape, edits.stored[name])
    # Of an fp8 weight it is the block scales that take the factor, and its own bytes stay.
    scales = stored.dtype != "F8_E4M3"
    factors = edits.factors.get(name.removesuffix(_SCALES)) if scales else None
    data = functools.partial(_copy, stored, [(0, stored.bytes)], checkpoint.allow_nonfinite, factors)
    return Entry(name=name, dtype=stored.dtype, shape=stored.shape, bytes=stored.bytes, data=data)


def _refitted_entry(stored: Stored, name: str, shape: tuple[int, ...], parts: Sequence[Stored]) -> Entry:
    """A tensor whose values lie in other files, one behind the other."""

    def data() -> Iterator[Chunk]:
        for part in parts:
            yield from _copy(part, [(0, part.bytes)], allow_nonfinite=False, factors=None)

    return Entry(name=name, dtype=stored.dtype, shape=shape, bytes=sum(part.bytes for part in parts), data=data)


def _selected(checkpoint: Checkpoint, keep: Mapping[int, Sequence[int]]) -> dict[str, Cut]:
    """Stored tensors of which a part stays; of one that stands in others, such as codes and scales, all of those."""
    cuts: dict[str, Cut] = {}
    for layer, kept in keep.items():
        for name, cut in cuts_of(checkpoint, layer, kept).items():
            cuts |= dict.fromkeys(checkpoint.stored_names(name), cut)
    return cuts


def _cut_entry(stored: Stored, cut: Cut, allow_nonfinite: bool, factors: Sequence[float] | None) -> Entry:
    shape = cut.shape(stored.shape)
    if cut.table:
        return Entry(
            name=stored.name,
            dtype=stored.dtype,
            shape=shape,
            bytes=stored.bytes,
            data=lambda: iter((tensor_bytes(cut.of(read_tensor(stored))),)),
        )
    outer, inner = math.prod(stored.shape[: cut.axis]), stored.bytes // math.prod(stored.shape[: cut.axis + 1])
    ranges = [((block * stored.shape[cut.axis] + index) * inner, inner) for block in range(outer) for index in cut.kept]
    return Entry(
        name=stored.name,
        dtype=stored.dtype,
        shape=shape,
        bytes=len(ranges) * inner,
        data=functools.partial(_copy, stored, ranges, allow_nonfinite, factors),
    )


def _copy(
    stored: Stored, ranges: list[tuple[int, int]], allow_nonfinite: bool, factors: Sequence[float] | None
) -> Iterator[Chunk]:
    """The bytes of these ranges in chunks, each range times its factor where there are factors."""
    check: Callable[[bytearray], bool] = (
        (lambda _chunk: True) if allow_nonfinite else functools.partial(all_finite, stored.dtype)
    )
    for number, (begin, length) in enumerate(ranges):
        for offset in range(begin, begin + length, CHUNK_BYTES):
            size = min(CHUNK_BYTES, begin + length - offset)
            with phase("read", size=size):
                chunk = read_bytes(stored, offset, size)
            with phase("check"):
                sound = check(chunk)
            if not sound:
                raise nonfinite(stored)
            yield chunk if factors is None else _times(stored, chunk, factors[number])


def _times(stored: Stored, chunk: bytearray, factor: float) -> memoryview:
    values = scaled(torch.frombuffer(chunk, dtype=DTYPES[stored.dtype]), factor)
    return tensor_bytes(values)
