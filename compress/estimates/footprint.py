"""Memory and disk of a stage, term by term: upper bounds, from the shapes of what is held at the same time."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from moepress.calibration.observe import CHUNK_BYTES, bytes_per_token, tokens_at_once
from moepress.compress.budget.bit_losses import POOLED_TOKENS, TOKENS
from moepress.compress.estimates.figures import Figures, Matrices, expert_matrices
from moepress.compress.gptq.pieces import PIECE_BYTES
from moepress.models.families.family import Part
from moepress.models.forward.scratch import mapped_limit_bytes
from moepress.models.forward.stepping import waiting_bytes
from moepress.models.forward.walk import Limits, choose_limits
from moepress.runs.byte_sizes import size_text
from moepress.runs.memory import kept_bytes

ROWS_AT_ONCE = 8192
"""Tokens of an expert that pass through it together."""
_LATER_BYTES = 128 << 20  # model code (scipy with it, where that is), thread pools: loaded after a run was estimated
_TABLE_BYTES = 1 << 28  # as in models.forward
_CHECKED = 1.0  # copies of a tensor alive while it is read, tested and cast
_MATH_ATTENTION = 2.5  # copies of the scores where torch's attention forms them


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a stage is to do, and where.

    Attributes:
        tokens: calibration tokens.
        window: tokens per sequence.
        memory_bytes: what --max-memory allows; None for half of what is free.
        device: where layers run.
        dtype: what the forward pass computes in.
        domains: of the calibration text.
        free_bytes: on the disk that is written to; None for enough.
    """

    tokens: int
    window: int
    device: torch.device
    dtype: torch.dtype
    memory_bytes: int | None = None
    domains: int = 1
    free_bytes: int | None = None


def libraries_bytes() -> int:
    """What this process holds already: Python, torch, transformers, the names of all tensors."""
    return int(psutil.Process().memory_info().rss) + _LATER_BYTES


def limits_of(figures: Figures, work: Workload) -> Limits:
    """The limits that a run with this work would choose."""
    return choose_limits(figures.shape, work.window, work.memory_bytes, None, work.device)


def buffer_bytes(
    figures: Figures, work: Workload, limits: Limits, *, observe: bool, streams: int = 1, logits: bool = False
) -> tuple[int, int]:
    """Bytes of the buffers of one walk or two, in memory and in files, in the order in which `Scratch` gives them."""
    shape, size = figures.shape, work.dtype.itemsize
    rows = [shape.hidden * size, shape.hidden * size, shape.top_k * 8, shape.top_k * 4]
    rows += [shape.hidden * size, shape.experts * 4] if observe else []
    rows *= streams
    rows += [shape.experts * 4] if logits else []
    left, inside, outside = limits.memory_bytes // 2, 0, 0
    for row in rows:
        if row * work.tokens <= left:
            left -= row * work.tokens
            inside += row * work.tokens
        else:
            outside += row * work.tokens
    return inside, outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What `profile` keeps of tokens until all experts of a layer have been read.

    Attributes:
        tokens: of one pass.
        memory, mapped, table: bytes in memory, in a mapped file, in a file that is written and read row by row.
    """

    tokens: int
    memory: int
    mapped: int
    table: int


def kept_outputs(figures: Figures, work: Workload, limits: Limits, inside: int, *, leave_one_out: bool) -> Kept:
    """The buffer that is made after those of the walk, of which `inside` bytes are in memory."""
    left = limits.memory_bytes // 2 - inside
    each = bytes_per_token(figures.shape, work.dtype, leave_one_out=leave_one_out)
    tokens = tokens_at_once(work.tokens, each, left, work.free_bytes)
    size = tokens * each
    if size <= left:
        return Kept(tokens=tokens, memory=size, mapped=0, table=0)
    return Kept(tokens=tokens, memory=0, mapped=0 if leave_one_out else size, table=size if leave_one_out else 0)


def outputs_bytes(figures: Figures, work: Workload, tokens: int) -> int:
    """What sums over the outputs of a pass take: norms and places of all slots, and a chunk's outputs and streams."""
    hidden, slots, size = figures.shape.hidden, figures.shape.top_k + 1, work.dtype.itemsize
    chunk = min(tokens, max(1, CHUNK_BYTES // (slots * hidden * size)))
    return tokens * slots * 64 + chunk * hidden * (slots * (size + 4) + 40)


def _mapped_bytes(figures: Figures, work: Workload, limits: Limits, mapped: int, streams: int) -> int:
    """Resident pages of mapped files: given back by shares; only the hidden states are also gone over as a whole."""
    row = figures.shape.hidden * work.dtype.itemsize
    hidden = row * work.tokens if row * work.tokens > limits.memory_bytes // 2 else 0
    hidden += row * work.tokens * (streams - 1)
    touched = 4 * row * max(limits.batch_windows * work.window, ROWS_AT_ONCE)
    return min(mapped, mapped_limit_bytes(limits.memory_bytes) + touched + hidden)


def resident(
    figures: Figures,
    work: Workload,
    limits: Limits,
    buffers: tuple[int, int],
    *,
    streams: int = 1,
    layers: int = 1,
) -> dict[str, int]:
    """What every walk holds; a tensor is there twice while it is read: as stored, and in the compute dtype.

    Args:
        figures: the model's.
        work: what is walked over.
        limits: of memory.
        buffers: bytes in memory and in files.
        streams: 2 where the original is walked beside the quantized model.
        layers: 2 where each of them loads its own, too.
    """
    shape, attention, size = figures.shape, figures.attention, work.dtype.itemsize
    tokens = limits.batch_windows * work.window
    wide = attention.heads * (4 * attention.key_width + 3 * attention.value_width)
    activations = tokens * 4 * (12 * shape.hidden + max(wide, 4 * figures.mlp_width) + 4 * shape.experts)
    if attention.key_width > attention.value_width:  # padded to one width, and the output with them
        activations += tokens * attention.heads * 2 * (attention.key_width - attention.value_width) * 4
    if attention.key_width < attention.value_width and work.device.type == "cpu":
        # Fused attention on the CPU wants one width, and `models.families.attention` pads values only: all scores.
        scores = limits.batch_windows * attention.heads * work.window**2 * 4
        activations += round(_MATH_ATTENTION * scores)
    return {
        "libraries": libraries_bytes(),
        "token buffers": buffers[0],
        "mapped files": _mapped_bytes(figures, work, limits, buffers[1], streams),
        "embeddings": _embedding_bytes(figures, tokens, size),
        "layer": figures.layer_parameters * size * layers + round(figures.largest_matrix * 4 * _CHECKED),
        "activations": activations,
    }


def waiting(figures: Figures, work: Workload, limits: Limits, streams: int) -> int:
    """What tokens hold that wait in the middle of a layer while its Linears are solved; 0 where it is too much.

    Where it is, the layer runs from its start for each group of Linears (`compress.gptq.linears.steps_fit`).
    """
    held = streams * work.tokens * waiting_bytes(figures.attention, figures.shape.hidden, work.dtype)
    return held if held <= limits.memory_bytes // 4 else 0


def middles(figures: Figures, work: Workload, limits: Limits, share: float) -> int:
    """The intermediates of that share of a layer's experts, where they are kept (`compress.gptq.experts`)."""
    kept = round(work.tokens * figures.shape.top_k * share) * figures.shape.expert_width * work.dtype.itemsize
    return kept if kept <= limits.memory_bytes // 8 else 0


def slice_bytes(figures: Figures, rows: int) -> int:
    """So many of an expert's tokens, what lies between its matrices, and its output."""
    return rows * 4 * (3 * figures.shape.hidden + 4 * figures.shape.expert_width)


def _embedding_bytes(figures: Figures, tokens: int, size: int) -> int:
    """The table as stored and in the compute dtype; of a large one the rows of a batch."""
    rows = figures.shape.vocabulary
    if 4 * rows * figures.shape.hidden > _TABLE_BYTES:
        return 2 * min(rows, tokens) * figures.shape.hidden * (4 + size)
    return round(rows * figures.shape.hidden * (size + 4 * _CHECKED))


def solver_memory(
    figures: Figures,
    at_once: int,
    extra: Sequence[Matrices],
    sizes: dict[Part, int],
    output: int,
    *,
    moved: bool = False,
) -> dict[str, int]:
    """Experts that are solved together, the widest other Linear, and codes that wait to be written.

    `moved`: their targets come from the original's inputs, one matrix at a time (see `compress.gptq.asymmetry`).
    """
    solver = _experts_bytes(figures, at_once)
    others = max((_solving_bytes(m.rows, m.columns) + m.rows * m.columns * 4 for m in extra), default=0)
    if moved:
        solver += max(_moving_bytes(m.rows, m.columns) for m in expert_matrices(figures, 1))
        solver += at_once * max(4 * m.rows * m.columns for m in expert_matrices(figures, 1))  # s H of each
        others += max((_moving_bytes(m.rows, m.columns) for m in extra), default=0)
    rest = 2 * figures.layer_parameters  # written in 16 bit with the layer's first piece
    tables = max(w.bytes for p, w in figures.parts.items() if p in {Part.EMBEDDINGS, Part.LM_HEAD})
    return {
        "solver": solver,
        "other Linears": others,
        "pieces": min(PIECE_BYTES, sizes[Part.ROUTED]) + min(rest, output),
        "lm_head": round(tables * (1 + _CHECKED)),
    }


def _experts_bytes(figures: Figures, at_once: int) -> int:
    hidden, width = figures.shape.hidden, figures.shape.expert_width
    first, second = (_solving_bytes(m.rows, m.columns) for m in expert_matrices(figures, 1))
    read = 3 * hidden * width * 4
    return at_once * (read + max(first, second)) + 2 * 4 * hidden**2 + 1024 * 4 * (hidden + 3 * width)


def probe_bytes(figures: Figures, at_once: int) -> int:
    """Experts that `profile` solves together to see what bits cost, and the tokens that they are measured on."""
    if not at_once:
        return 0
    hidden, width = figures.shape.hidden, figures.shape.expert_width
    return _experts_bytes(figures, at_once) + 4 * (TOKENS * (3 * hidden + 3 * width) + POOLED_TOKENS * hidden)


def _solving_bytes(rows: int, columns: int) -> int:
    """A stacked matrix, its Hessian, and the solver's copies of them (see `compress.gptq.batch`; `cpu` takes less)."""
    weight, hessian = 4 * rows * columns, 4 * columns * columns
    return weight + hessian + max(3 * hessian, hessian + 5 * weight)


def _moving_bytes(rows: int, columns: int) -> int:
    """C and a part of it, the damped H and its factor; W, W C and the step."""
    return 4 * (4 * columns * columns + 3 * rows * columns)


def freed(limits: Limits, memory: dict[str, int]) -> int:
    """What the heap keeps of tensors that have gone: of those that come and go with batches, what lies between others.

    A quarter of the largest of them, measured, within what the limit leaves for it (`runs.memory`).
    """
    forward = memory["activations"] + memory.get("waiting tokens", 0)
    passing = max(forward, memory.get("solver", 0), memory.get("experts", 0))
    return min(kept_bytes(limits.memory_bytes), passing // 4)


def peak_of(memory: dict[str, int], *moments: Sequence[str]) -> int:
    """What is there all the time, and the largest of the sums of terms that meet."""
    always = memory["libraries"] + memory["token buffers"] + memory["mapped files"] + memory.get("freed tensors", 0)
    return always + max(sum(memory[name] for name in names) for names in moments)


def quantize_peak(memory: dict[str, int]) -> int:
    """`peak_of` the moments of `quantize`."""
    memory = {"sides": 0, "gradients": 0, "logits": 0} | memory
    experts = ("layer", "solver", "expert's tokens", "intermediates", "pieces", "sides")
    linears = ("layer", "activations", "waiting tokens", "other Linears", "sides")
    backward = ("layer", "gradients")
    return peak_of(memory, ("embeddings",), linears, experts, ("lm_head",), backward, ("logits",))


def device_bytes(work: Workload, memory: dict[str, int], *moments: Sequence[str]) -> int | None:
    """What of it lies on the GPU: not the token buffers, and not what waits to be written."""
    return None if work.device.type == "cpu" else max(sum(memory[name] for name in names) for names in moments)


def least_memory(
    figures: Figures, work: Workload, solved: tuple[Sequence[Matrices], dict[Part, int], int] | None
) -> int:
    """The peak of a run that gets no memory at all: one window, one expert, and everything else in files."""
    rest = resident(figures, work, Limits(memory_bytes=1, batch_windows=1), (0, 0))
    rest["expert's tokens"] = slice_bytes(figures, min(work.tokens, ROWS_AT_ONCE))
    if solved is None:
        return peak_of(rest, ("embeddings",), ("layer", "activations"))
    return quantize_peak(rest | {"waiting tokens": 0, "intermediates": 0} | solver_memory(figures, 1, *solved))


def shortages(work: Workload, peak: int, least: int) -> tuple[str, ...]:
    """What is said before the work too: --max-memory, or this machine, is too small whatever the stage does."""
    given, free = work.memory_bytes, int(psutil.virtual_memory().available)
    if given is not None and least > given:
        said = (
            f"--max-memory {size_text(given)} is too little for this model: with one window, one expert at a time and "
            f"everything else in files it is about {size_text(least)}."
        )
        return (said,)
    if (given is None or peak <= given) and peak > free + libraries_bytes():
        return (f"This machine has {size_text(free)} of memory free, and the peak is above that.",)
    return ()


def bound_notes(work: Workload, peak: int, least: int) -> tuple[str, ...]:
    """What --max-memory does not bound, where it can be kept at all."""
    given = work.memory_bytes
    if given is None or least > given or peak <= given:
        return ()
    said = (
        f"--max-memory {size_text(given)} bounds token buffers and the experts in hand; with what is there "
        f"besides, the peak is about {size_text(peak)}."
    )
    return (said,)


def hidden_disk(figures: Figures, work: Workload, spilled: int, streams: int = 1) -> dict[str, int]:
    """The hidden states after a layer are kept for a resume; those of the layer before go when they are written."""
    kept = streams * min(2, figures.shape.layers - 1) * hidden_bytes(figures, work)
    return {"hidden states": kept, "token buffers": spilled}


def disk_peak(disk: dict[str, int], layers: int) -> int:
    """While both hidden states are there the last layer is not; when it is, one of them has gone."""
    early = disk["output"] * (layers - 1) // layers + disk["hidden states"]
    late = disk["output"] + disk.get("statistics by layer", 0) + disk["hidden states"] // max(1, min(2, layers - 1))
    walk = max(early, late) + disk["token buffers"] + disk.get("experts' outputs", 0)
    # The second walk comes when the first has ended: all statistics are there, and no hidden states.
    second = disk.get("statistics by layer", 0) + disk.get("losses by kind", 0)
    # A backward pass comes before the walk, which then drops a layer's factors as it writes its codes.
    begun = disk.get("factors", 0) + disk["hidden states"] + disk["token buffers"]
    return max(walk, second, begun, disk.get("end of the network", 0) + disk["token buffers"])


def hidden_bytes(figures: Figures, work: Workload) -> int:
    """Hidden states of all tokens."""
    return work.tokens * figures.shape.hidden * work.dtype.itemsize
