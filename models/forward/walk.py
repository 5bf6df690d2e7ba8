"""Walk a streamed model layer by layer over many windows, within a memory limit."""

import functools
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from moepress.errors import UsageError
from moepress.models.families.family import Shape
from moepress.models.forward.card import Lane, on_card
from moepress.models.forward.costs import expert_flops, layer_flops, stored_expert_bytes
from moepress.models.forward.recorder import Routed
from moepress.models.forward.replay import Returned, hidden_of
from moepress.models.forward.scratch import Rows
from moepress.models.forward.scratch import Scratch as Scratch  # a walk cannot be opened without one
from moepress.models.forward.streamed import StreamedModel, apply_expert, require_finite_hidden, tokens_of
from moepress.models.storage.experts import Expert
from moepress.models.storage.safetensors_file import Stored
from moepress.models.storage.tensors import read_row, read_tensor, tensor_entry
from moepress.models.storage.writer import Entry
from moepress.runs.memory import in_halves, release_memory, settle
from moepress.runs.phases import beside, phase
from moepress.runs.progress import track

_BATCH_WINDOWS_LIMIT = 16
_CPU_BATCH_TOKENS = 4096  # products of more are no faster there, and what they leave falls out of every cache
_SHARD_TOKENS = 16384
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is held at a time. The result depends on it in the last bits, so a resume keeps it.

    Attributes:
        memory_bytes: what `--max-memory` allows.
        batch_windows: windows that go through a layer together.
        shard_windows: no product has rows of two shards of so many windows, so that whoever has one shard alone gets
            the same bits.
    """

    memory_bytes: int
    batch_windows: int
    shard_windows: int = sys.maxsize


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name.split(":")[0], False):
        there = ", ".join(kind for kind, ok in available.items() if ok)
        raise UsageError(f"--device {name} is not available on this machine; available: {there}.")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` computes in fp32 on the CPU (where it is as fast and more exact) and in bf16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def default_memory() -> int:
    """What may be used without --max-memory: half of what is free now, in bytes."""
    return int(psutil.virtual_memory().available // 2)


def choose_limits(
    shape: Shape,
    window: int,
    memory_bytes: int | None,
    batch_windows: int | None = None,
    device: torch.device | None = None,
) -> Limits:
    """Pick the batch size for the memory that may be used: half of what is free now, and of what a GPU has free."""
    memory = memory_bytes or default_memory()
    if device is not None and device.type == "cuda":
        memory = min(memory, torch.cuda.mem_get_info(device)[0] // 2)
    per_window = window * 4 * 48 * shape.hidden  # some fifty activations of the hidden size live at once
    most = _BATCH_WINDOWS_LIMIT
    if device is None or device.type == "cpu":
        most = min(most, _CPU_BATCH_TOKENS // window)
    fitting = max(1, min(most, memory // 8 // per_window))
    shard = max(1, _SHARD_TOKENS // window)
    return Limits(memory_bytes=memory, batch_windows=batch_windows or fitting, shard_windows=shard)


@dataclass(slots=True, kw_only=True)
class Stream:
    """The state of a walk: hidden states of all windows, and buffers for one layer's routed tokens.

    Attributes:
        hidden: [N, T, D] in the compute dtype, on the CPU; before a layer its input, after it its output. Models with
            several streams have [N, T, S, D].
        windows: their tokens, int64 [N, T].
        inputs: experts' inputs [N * T, D].
        chosen: [N * T, K] int64.
        weights: [N * T, K] fp32.
        residual: [N * T, D] stream before the MoE block, when asked for.
        logits: [N * T, E] router logits, when asked for; -inf for experts that a layer lacks.
        outputs: the experts' outputs of a part of the tokens, made and reused by `calibration.observe`.
        routed: their weighted sums, likewise.
        sums: [N * T, D] fp32, what the routed experts give; None where it is added to `hidden` right away.
        states: what layers hand on besides hidden states, by its place in what they return: [N, ...].
        form: how many values they return; 0 for hidden states alone, not in a tuple.
        importance: [N * T] fp32, how much tokens count in Hessians, on average 1; None where all count alike.
    """

    model: StreamedModel
    limits: Limits
    scratch: Scratch
    windows: Tensor
    hidden: Tensor
    inputs: Tensor
    chosen: Tensor
    weights: Tensor
    residual: Tensor | None = None
    logits: Tensor | None = None
    outputs: Rows | None = None
    routed: Tensor | None = None
    sums: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    form: int = 0
    importance: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    def parts(self, tokens: Tensor) -> list[slice]:
        """Rows that are multiplied together, of ascending token numbers: at most 8192, and of one shard."""
        return parts_of(tokens, min(self.limits.shard_windows, len(self.hidden)) * self.hidden.shape[1])

    def flat(self) -> Tensor:
        """What the experts' outputs are added to, [N * T, D]: the hidden states, the same memory, or `sums`."""
        return self.hidden.view(-1, self.hidden.shape[2]) if self.sums is None else self.sums

    def before(self, rows: slice) -> Returned:
        """What the last layer returned for some windows, on the model's device."""
        hidden = self.hidden[rows].to(self.model.device)
        if not self.form:
            return hidden
        states = {place: state[rows].to(self.model.device) for place, state in self.states.items()}
        return (hidden, *(states.get(place) for place in range(1, self.form)))

    def put(self, rows: slice, returned: Returned) -> None:
        """Keep what a layer returned for some windows."""
        self.hidden[rows] = hidden_of(returned).to("cpu")
        self.form = len(returned) if isinstance(returned, tuple) else 0
        for place, value in enumerate(returned[1:] if isinstance(returned, tuple) else (), start=1):
            if isinstance(value, Tensor):
                if place not in self.states:
                    self.states[place] = torch.empty((len(self.hidden), *value.shape[1:]), dtype=value.dtype)
                self.states[place][rows] = value.to("cpu")
            else:
                self.states.pop(place, None)

    def kept(self, name: str = "hidden") -> list[Entry]:
        """What a resume needs of the stream after a layer, to be written: hidden states, and what layers hand on."""
        entries = [tensor_entry(name, self.hidden)]
        if self.form:
            entries.append(tensor_entry(f"{name}.form", torch.tensor([self.form])))
            entries += [tensor_entry(f"{name}.{place}", state) for place, state in sorted(self.states.items())]
        return entries

    def restore(self, stored: Mapping[str, Stored], name: str = "hidden") -> None:
        """The inverse of `kept`."""
        for window in range(self.hidden.shape[0]):
            self.hidden[window] = read_row(stored[name], window)
            self.touch(self.hidden.shape[1])
        form = stored.get(f"{name}.form")
        self.form = 0 if form is None else int(read_tensor(form))
        for place in range(1, self.form):
            if (state := stored.get(f"{name}.{place}")) is not None:
                self.states[place] = read_tensor(state)

    def touch(self, tokens: int) -> None:
        """Say that the buffers of so many tokens were gone over, so that mapped pages are given back in time."""
        rows = (self.inputs, self.residual, self.logits)
        width = sum(t.shape[1] * t.itemsize for t in (self.flat(), *rows) if t is not None)
        self.scratch.touch(tokens * width)

    def forget(self) -> None:
        """Give mapped pages back now."""
        self.scratch.forget()


def open_stream(
    model: StreamedModel,
    windows_NT: Tensor,
    scratch: Scratch,
    limits: Limits,
    *,
    observe: bool,
    logits: bool = False,
    embed: bool = True,
) -> Stream:
    """Allocate buffers and embed the windows.

    `observe` also keeps the residual stream and the router's logits, `logits` only these. Without `embed` the hidden
    states are undefined, for a walk that goes on from others; the process has settled then (`runs.memory.settle`).
    """
    if embed:
        settle(limits.memory_bytes)
    windows, length = windows_NT.shape
    tokens, shape = windows * length, model.shape
    routed = bool(model.moe_layers)
    rows = tokens if routed else 0
    stream = Stream(
        model=model,
        limits=limits,
        scratch=scratch,
        windows=windows_NT,
        hidden=scratch.tensor("hidden", (windows, length, *model.stream_shape), model.dtype),
        inputs=scratch.tensor("inputs", (rows, shape.hidden), model.dtype),
        chosen=scratch.tensor("chosen", (rows, shape.top_k), torch.int64),
        weights=scratch.tensor("weights", (rows, shape.top_k), torch.float32),
        residual=scratch.tensor("residual", (rows, shape.hidden), model.dtype) if observe else None,
        logits=scratch.tensor("logits", (rows, shape.experts), torch.float32) if observe or logits else None,
        sums=None if model.family.additive else scratch.tensor("sums", (rows, shape.hidden), torch.float32),
    )
    batches = torch.split(windows_NT, limits.batch_windows) if embed else ()
    start = 0
    for embedded in model.embed_all(iter(batches)):
        stream.hidden[start : start + embedded.shape[0]] = embedded.to("cpu")
        start += embedded.shape[0]
        stream.touch(embedded.shape[0] * length)
    stream.forget()
    return stream


def first_step(stream: Stream, layer: int) -> bool:
    """Run a loaded layer without its routed experts over all windows, in place; True when it has routed experts."""
    model, length = stream.model, stream.hidden.shape[1]
    routed = None
    flops = layer_flops(model.layer(layer), model.config, stream.tokens, length)
    with phase("forward", flops=flops):
        for batch in batches_of(stream):
            for rows, returned, routed in in_halves(batch, functools.partial(_run_windows, stream, layer), "windows"):
                store(stream, rows, returned, routed)
    if routed is not None and stream.sums is not None:
        stream.sums.zero_()
    stream.forget()
    return routed is not None


def batches_of(stream: Stream) -> list[range]:
    """Windows that go through a layer together: none of two shards."""
    limits, size = stream.limits, stream.limits.batch_windows
    return [
        range(start, min(start + size, shard.stop))
        for shard in shards_of(len(stream.hidden), limits.shard_windows)
        for start in range(shard.start, shard.stop, size)
    ]


def shards_of(windows: int, shard_windows: int) -> list[range]:
    """So many windows in shards; the last may be smaller."""
    size = min(shard_windows, max(windows, 1))
    return [range(start, min(start + size, windows)) for start in range(0, windows, size)]


def parts_of(tokens: Tensor, shard_tokens: int) -> list[slice]:
    """See `Stream.parts`; shards have so many tokens."""
    if not len(tokens):
        return []
    edges = torch.arange(1, int(tokens[-1]) // shard_tokens + 1) * shard_tokens
    ends = [*torch.searchsorted(tokens.contiguous(), edges).tolist(), len(tokens)]
    starts = [0, *ends[:-1]]
    return [
        slice(start, min(start + _ROWS_AT_ONCE, stop))
        for first, stop in zip(starts, ends, strict=True)
        for start in range(first, stop, _ROWS_AT_ONCE)
    ]


def _run_windows(stream: Stream, layer: int, windows: Sequence[int]) -> list[tuple[slice, Returned, Routed | None]]:
    """Some windows, and what a layer gives for them."""
    rows = slice(windows[0], windows[-1] + 1)
    return [(rows, *stream.model.run_layer(layer, stream.before(rows), stream.windows[rows]))]


def last_step(stream: Stream, layer: int) -> None:
    """Run a loaded layer once more, with what its experts gave, where that was not added to the hidden states yet.

    Of layers without experts nothing is left to do.
    """
    if stream.sums is None or not stream.model.has_experts(layer):
        return
    length = stream.hidden.shape[1]
    with phase("forward", flops=layer_flops(stream.model.layer(layer), stream.model.config, stream.tokens, length)):
        for batch in batches_of(stream):
            rows = slice(batch.start, batch.stop)
            given = stream.sums[rows.start * length : rows.stop * length].to(stream.model.device)
            returned, _ = stream.model.run_layer(layer, stream.before(rows), stream.windows[rows], given_TD=given)
            stream.put(rows, returned)
    stream.forget()


def store(stream: Stream, windows: slice, returned: Returned, routed: Routed | None) -> None:
    """Put what a layer returned for some windows, and what reached its experts, into the stream's buffers.

    Args:
        stream: whose buffers.
        windows: which.
        returned: of the layer; where experts are to come into it later (`last_step`) it is of no use.
        routed: of a layer with experts.
    """
    if routed is None or stream.sums is None:
        stream.put(windows, returned)
    if routed is not None:
        first = windows.start * stream.hidden.shape[1]
        rows = slice(first, first + routed.inputs.shape[0])
        stream.inputs[rows] = routed.inputs.to("cpu")
        stream.chosen[rows] = routed.chosen.to("cpu")
        stream.weights[rows] = routed.weights.to("cpu", torch.float32)
        if stream.residual is not None:
            stream.residual[rows] = routed.residual.to("cpu")
        if stream.logits is not None:
            experts = routed.logits.shape[1]  # another layer may have more
            stream.logits[rows, :experts] = routed.logits.to("cpu", torch.float32)
            stream.logits[rows, experts:] = float("-inf")
    stream.touch((windows.stop - windows.start) * stream.hidden.shape[1])


def read_ahead(
    model: StreamedModel, layer: int, experts: Sequence[int], dtype: torch.dtype | None = None
) -> Generator[tuple[int, Expert], None, None]:
    """Experts in order, the next one being read from disk and sent to the device while the present one is used.

    Close it, if not exhausted.
    """
    lane = Lane(model.device)

    def read(expert: int) -> tuple[Expert, torch.cuda.Event | None]:
        with beside("read beside", size=stored_expert_bytes(model.source, layer, expert)):
            return lane.send(lambda: model.read_expert(layer, expert, dtype))

    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = [(e, pool.submit(read, e)) for e in experts[:1]]
        for following in [*experts[1:], None] if experts else []:
            expert, future = pending.pop(0)
            if following is not None:
                pending.append((following, pool.submit(read, following)))
            with phase("read"):
                matrices = lane.take(future.result())
            yield expert, matrices


def add_experts(stream: Stream, layer: int) -> None:
    """Second step of a plain forward: add every expert's weighted output for its own tokens, in expert order."""
    model = stream.model
    positions = tokens_of(stream.chosen, model.shape.experts)
    wanted = [e for e in range(model.shape.experts) if len(positions[e][0])]
    with on_card(stream):
        for expert, weights in read_ahead(model, layer, wanted):
            tokens, slots = positions[expert]
            add_output(stream, stream.flat(), weights, tokens, slots, layer)


def add_output(
    stream: Stream,
    flat: Tensor,
    expert: Expert,
    tokens: Tensor,
    slots: Tensor,
    layer: int,
    middle: Tensor | None = None,
) -> None:
    """Add one expert's weighted output to the rows of `flat` that chose it.

    `middle`, where known, is what its gate and up give these tokens, [T, F].
    """
    model = stream.model
    flops = expert_flops(expert, len(tokens)) if middle is None else 2.0 * len(tokens) * expert.down.numel()
    with phase("forward", flops=flops):
        for part in stream.parts(tokens):
            rows, columns = tokens[part], slots[part]
            if middle is None:
                output = apply_expert(expert, stream.inputs[rows].to(model.device), model.gating(layer))
            else:
                output = model.gating(layer).output(expert, middle[part])
            weighted = output.float() * stream.weights[rows, columns, None].to(model.device)
            flat.index_add_(0, rows.to(flat.device), weighted.to(flat.device, flat.dtype))
            stream.touch(len(rows))


def forward(
    model: StreamedModel,
    windows_NT: Tensor,
    scratch: Scratch,
    limits: Limits,
    *,
    title: str = "forward",
    chose: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Hidden states before the final norm, [N, T, D], of a whole streamed forward pass.

    `chose` is called with each MoE layer and what its tokens chose, int64 [N * T, K], which does not outlive the call.
    """
    stream = open_stream(model, windows_NT, scratch, limits, observe=False)
    with track(title, model.shape.layers, unit="layers") as advance, torch.inference_mode():
        for layer in range(model.shape.layers):
            go_through(stream, layer, chose)
            advance(1)
    return stream.hidden


def go_through(stream: Stream, layer: int, chose: Callable[[int, Tensor], None] | None = None) -> None:
    """One layer of `forward`, loaded and given back: the stream's hidden states become those behind it."""
    model = stream.model
    model.load_layer(layer)
    if first_step(stream, layer):
        if chose is not None:
            chose(layer, stream.chosen)
        add_experts(stream, layer)
        last_step(stream, layer)
    model.unload_layer(layer)
    require_finite_hidden(stream.hidden, layer)
    stream.forget()
    release_memory()
