"""The last of `quantize`: what lies beside the shards of weights."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepress import __version__
from moepress.calibration.ends import drop_all_ends
from moepress.compress.gptq.include import unquantized_modules
from moepress.compress.gptq.job import Frame
from moepress.compress.gptq.layer_bits import config_groups, mixed_note, zeros_note
from moepress.compress.gptq.pieces import layer_report
from moepress.converters.safetensors import compressed_tensors_config
from moepress.models.storage.experts import without_mtp
from moepress.models.storage.foreign import BLOCKS_METHOD
from moepress.models.storage.mtp import mtp_note
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.writer import copy_companions, write_index, write_json
from moepress.runs.journal import Run

SHARED = "work"
"""Where in a run's work folder its tasks lie, when several workers do them (`stages.workers`)."""


def finish(
    run: Run, frame: Frame, companions: Path, summary: Mapping[str, Any], mtp_notes: Sequence[str]
) -> dict[str, Any]:
    """Index, config, tokenizer, moepress.json; then the folder takes its final name.

    Args:
        run: with all pieces.
        frame: of the same model and options.
        companions, summary, mtp_notes: as of `pipeline.quantize`.
    """
    source, options, layers = frame.model.source, frame.options, frame.model.shape.layers
    weight_map: dict[str, str] = {}
    total = 0
    for piece, name in frame.piece_names.items():
        done = run.done(piece)
        assert done is not None, piece
        entries = read_header(run.path(done))
        weight_map |= dict.fromkeys(entries, name)
        total += sum(entry.bytes for entry in entries.values())
    write_index(run.folder, weight_map, total)
    ignored = unquantized_modules(source, layers, frame.include, frame.predicting)
    groups = config_groups(source, options.scheme, options.layer_bits, frame.include)
    kept = source.config if frame.predicting else without_mtp(source.family, source.config)
    if options.blocks is None:
        stated = compressed_tensors_config.quantization_config(options.scheme, ignored, groups)
    else:
        stated = {"quant_method": BLOCKS_METHOD, "grid": options.blocks.name, "modules_to_not_convert": ignored}
    config = {**kept, "quantization_config": stated}
    write_json(run.folder / "config.json", config)
    copied = copy_companions(companions, run.folder)
    dropped = sum(len(names) for n, names in frame.names.items() if (n or 0) >= layers)
    notes = [
        *(mtp_notes or mtp_note(dropped, {}, frame.model.shape.experts)),
        *mixed_note(options.layer_bits, frame.include),
        *zeros_note(options.scheme, options.blocks),
    ]
    result = {"bytes_after": total, "copied": copied, "notes": notes, **layer_report(run.pieces.values())}
    if options.layer_bits:
        result["layer_bits"] = {str(layer): bits for layer, bits in sorted(options.layer_bits.items())}
    result["include"] = sorted(frame.include)
    if any(frame.include.values()):
        result["part_bits"] = {part.value: bits for part, bits in sorted(frame.include.items()) if bits is not None}
    note = {"moepress": __version__, "stage": "quantize", **result}
    note["scheme"] = options.scheme.stated()
    if options.blocks is not None:
        note["scheme"] = {"grid": options.blocks.name, "bits": options.blocks.bits}
    write_json(run.folder / "moepress.json", note | dict(summary))
    run.require_ready()
    for name in [p for p in run.pieces if p.startswith("hidden-")]:
        run.drop(name)
    drop_all_ends(run)
    _delete_shared(run.folder / SHARED)  # what workers had, of this sitting or one before
    run.finish()
    return result


def _delete_shared(folder: Path) -> None:
    """Under another name first: a worker that comes too late then finds no folder to write to."""
    gone = folder.with_name(f"{folder.name}.gone")
    if folder.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    if gone.is_dir():
        shutil.rmtree(gone)
