"""Rewrite a checkpoint by a plan: copy, rename, slice. Nothing is dequantized; memory is one chunk of one tensor."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moepress import __version__
from moepress.compress.plan import Plan
from moepress.journal import Run
from moepress.models.checkpoint import Checkpoint, nonfinite
from moepress.models.experts import is_fused, pruned_config, router_disk_names
from moepress.models.family import layer_of
from moepress.models.safetensors_file import DTYPES, Stored, read_bytes
from moepress.models.skeleton import check_tensors
from moepress.models.writer import Entry, copy_companions, write_index, write_json, write_shard
from moepress.progress import track

CHUNK_BYTES = 32 << 20


def prune(checkpoint: Checkpoint, plan: Plan, run: Run) -> dict[str, Any]:
    """Write the pruned model into the run's folder and finish the run; every shard is a piece.

    Args:
        checkpoint: the original; its tensors are checked against its config first.
        plan: held against the checkpoint by `check_plan` before.
        run: the output in the making.

    Returns:
        Bytes before and after, tensors written, notes.

    Raises:
        InvalidInputError: tensors are missing or surplus, or hold NaN or Inf.
    """
    check_tensors(checkpoint.family, checkpoint.config, checkpoint.shapes, folder=checkpoint.folder)
    planned = {shard: shard_entries(checkpoint, plan, shard) for shard in checkpoint.shards}
    planned = {shard: entries for shard, entries in planned.items() if entries}
    with track("prune", len(planned)) as advance:
        for shard, entries in planned.items():
            if run.done(shard) is None:
                run.write(shard, shard, functools.partial(_write, entries))
            advance(1)
    weight_map = {entry.name: shard for shard, entries in planned.items() for entry in entries}
    after = sum(entry.bytes for entries in planned.values() for entry in entries)
    write_index(run.folder, weight_map, after)
    config = pruned_config(checkpoint.family, checkpoint.config, plan.experts, degroup=plan.degroup)
    write_json(run.folder / "config.json", config)
    copied = copy_companions(checkpoint.folder, run.folder)
    dropped = sum(1 for name in checkpoint.stored if (layer_of(name) or 0) >= checkpoint.shape.layers)
    notes = [f"The multi-token-prediction layer was dropped ({dropped} tensors)."] if dropped else []
    result = {
        "bytes_before": checkpoint.total_bytes,
        "bytes_after": after,
        "tensors": len(weight_map),
        "experts_before": plan.experts_before,
        "experts": plan.experts,
        "copied": copied,
        "notes": notes,
    }
    write_json(
        run.folder / "moepress.json", {"moepress": __version__, "stage": "prune", **result, "plan": _summary(plan)}
    )
    run.finish()
    return result


def _summary(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(
        mode="json", include={"model", "model_name", "criterion", "domain_weights", "groups", "keep"}
    )


def _write(entries: list[Entry], path: Any) -> None:
    write_shard(path, entries)


def shard_entries(checkpoint: Checkpoint, plan: Plan, shard: str) -> list[Entry]:
    """What a shard of the original becomes, in its original order; pruned experts' tensors are not in it."""
    selected = _selected_rows(checkpoint, plan)
    entries = []
    for stored in sorted((e for e in checkpoint.stored.values() if e.file.name == shard), key=lambda e: e.begin):
        layer = layer_of(stored.name)
        if layer is not None and layer >= checkpoint.shape.layers:
            continue
        name: str | None = stored.name
        if stored.name in selected:
            entries.append(_rows_entry(stored, selected[stored.name], checkpoint.allow_nonfinite))
            continue
        found = checkpoint.family.expert_of(stored.name)
        if found is not None and found[0] in plan.keep:
            name = _new_name(checkpoint, plan, *found)
        if name is not None:
            data = functools.partial(_copy, stored, [(0, stored.bytes)], checkpoint.allow_nonfinite)
            entries.append(Entry(name=name, dtype=stored.dtype, shape=stored.shape, bytes=stored.bytes, data=data))
    return entries


def _new_name(checkpoint: Checkpoint, plan: Plan, layer: int, expert: int, rest: str) -> str | None:
    kept = _positions(plan, layer)
    return checkpoint.family.renumber(layer, kept[expert], rest) if expert in kept else None


def _positions(plan: Plan, layer: int) -> dict[int, int]:
    return {old: new for new, old in enumerate(plan.keep[layer])}


def _selected_rows(checkpoint: Checkpoint, plan: Plan) -> dict[str, list[int]]:
    """Tensors with an expert axis -> the rows kept."""
    rows: dict[str, list[int]] = {}
    for layer, kept in plan.keep.items():
        for name in router_disk_names(checkpoint, layer):
            rows[name] = kept
        if is_fused(checkpoint, layer):
            rows[checkpoint.family.fused_gate_up.format(layer=layer)] = kept
            rows[checkpoint.family.fused_down.format(layer=layer)] = kept
    return rows


def _rows_entry(stored: Stored, kept: list[int], allow_nonfinite: bool) -> Entry:
    row = stored.bytes // stored.shape[0]
    ranges = [(index * row, row) for index in kept]
    return Entry(
        name=stored.name,
        dtype=stored.dtype,
        shape=(len(kept), *stored.shape[1:]),
        bytes=row * len(kept),
        data=functools.partial(_copy, stored, ranges, allow_nonfinite),
    )


def _copy(stored: Stored, ranges: list[tuple[int, int]], allow_nonfinite: bool) -> Iterator[bytearray]:
    check: Callable[[bytearray], bool] = (
        (lambda _chunk: True) if allow_nonfinite else functools.partial(_finite, stored.dtype)
    )
    for begin, length in ranges:
        for offset in range(begin, begin + length, CHUNK_BYTES):
            chunk = read_bytes(stored, offset, min(CHUNK_BYTES, begin + length - offset))
            if not check(chunk):
                raise nonfinite(stored)
            yield chunk


def _finite(dtype: str, chunk: bytearray) -> bool:
    kind = DTYPES[dtype]
    if not kind.is_floating_point or not chunk:
        return True
    if kind is torch.float8_e4m3fn:  # no infinities; NaN has all seven lower bits set
        return not bool((torch.frombuffer(chunk, dtype=torch.uint8) & 0x7F).eq(0x7F).any())
    values = torch.frombuffer(chunk, dtype=kind)
    return bool(torch.isfinite(values.float() if kind.itemsize == 1 else values).all())
