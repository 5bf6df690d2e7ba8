"""quantize: one walk over the layers. Calibration tokens flow through the pruned model; each layer is solved on what
reaches it, and its quantized output goes on to the next.

Pieces are the shards of the result: a layer, or where a layer is large its parts. A run that was killed, or that
stopped after as many pieces as were asked for, finds its finished pieces, takes their dequantized weights in place of
solving, and so ends with the same bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moepress.calibration.collect import resume_hidden, save_hidden
from moepress.calibration.corpus import Corpus
from moepress.calibration.ends import drop_ends, gather_ends
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.ends import end_groups
from moepress.compress.gptq.finish import finish
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.job import Frame, Job, frame_of, open_job
from moepress.compress.gptq.layer import quantize_layer, write_outer
from moepress.compress.gptq.pieces import SpentError, layer_report
from moepress.compress.gptq.reference import (
    drop_original,
    resume_original,
    save_original,
)
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import (
    Limits,
    Scratch,
)
from moepress.runs.journal import Run
from moepress.runs.phases import in_layer, phase
from moepress.runs.progress import track


def quantize(
    model: StreamedModel,
    corpus: Corpus,
    run: Run,
    limits: Limits,
    *,
    options: QuantizeOptions,
    include: Iterable[Include],
    companions: Path,
    summary: Mapping[str, Any],
    mtp_notes: Sequence[str] = (),
    max_pieces: int | None = None,
) -> dict[str, Any]:
    """Quantize a model (perhaps seen through a keep list) into a compressed-tensors folder and finish the run.

    Args:
        model: the streamed model that calibration flows through.
        corpus: calibration windows.
        run: the output in the making.
        limits: memory and batch size.
        options: scheme, Hessians, solver.
        include: parts besides the routed experts, with their bits where they have their own (`include.Included`).
        companions: the folder whose tokenizer and other files go along.
        summary: what moepress.json is to say about the plan and the calibration.
        mtp_notes: what is to be said of the multi-token-prediction layers, which then stay; without it they go.
        max_pieces: stop after so many new pieces; the run is then not finished and can be resumed.

    Returns:
        `finished`, `pieces_done` and `pieces`; of a finished run also bytes, per-layer errors, experts that fell back,
        notes.
    """
    frame = frame_of(model, options, include, mtp=bool(mtp_notes))
    options, layers = frame.options, frame.layers
    if options.hessian.end_tokens:
        wanted = end_groups(model.source, model.shape.layers, options, frame.include)
        gather_ends(model, corpus, run, limits, options.hessian.end_tokens, wanted)
    scratch, text = Scratch(run.folder, limits.memory_bytes), f"{corpus.windows.numel():,} tokens"
    try:
        with (
            torch.inference_mode(),
            track("quantize", layers, unit="layers", about=text) as advance,
        ):
            job = open_job(frame, corpus.windows, run, scratch, limits, max_pieces=max_pieces)
            stream, reference = job.stream, job.reference
            first = resume_hidden(run, stream, layers)
            if reference is not None:
                resume_original(run, reference, first, layers)
            advance(first)
            for layer in range(first, layers):
                job.allowance.require()
                with in_layer(layer), phase("other"):
                    quantize_layer(job, layer)
                if layer == model.shape.layers - 1 and run.done("outer") is None:
                    write_outer(job)
                with in_layer(layer):
                    _save(run, job, layer, last=layer == layers - 1)
                    stream.forget()
                advance(1, _error_text(run, layer))
    except SpentError:
        return {"finished": False, **_progress(frame, run)}
    finally:
        scratch.close()
    return {"finished": True, **_progress(frame, run), **finish(run, frame, companions, summary, mtp_notes)}


def _save(run: Run, job: Job, layer: int, *, last: bool) -> None:
    if job.reference is not None:
        save_original(run, job.reference, layer, last=last)
    save_hidden(run, job.stream, layer, last=last)
    if job.reference is not None:
        drop_original(run, layer - 1)
    drop_ends(run, layer)


def _error_text(run: Run, layer: int) -> str:
    """The relative error of a layer that is done, for people who wait."""
    found = layer_report(piece for piece in run.pieces.values() if piece.note.get("layer") == layer)["layer_error"]
    return f"error {next(iter(found.values())):.2%}" if found else ""


def _progress(frame: Frame, run: Run) -> dict[str, int]:
    names = frame.piece_names
    return {"pieces_done": sum(piece in run.pieces for piece in names), "pieces": len(names)}
