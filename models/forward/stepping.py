"""One layer's forward pass over all windows, standing still before chosen Linears.

Linears of a layer are quantized one after the other, each on what the quantized ones before it give. Running the layer
from its start for each of them costs a forward pass per Linear. Here every batch of windows runs in a thread of its own
that waits before a Linear until its weight has been replaced: all of them together cost one. Only one thread works at a
time; what the waiting ones hold is the price, see `held_bytes`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from moepress.models.forward.inventory import AttentionShape, attention_of
from moepress.models.forward.recorder import Routed
from moepress.models.forward.replay import Returned
from moepress.models.forward.walk import Stream, batches_of, store


class _StoppedError(Exception):
    """The walk is given up."""


class _Walker:
    """One batch on its way through the layer."""

    def __init__(self, stream: Stream, layer: int, rows: slice) -> None:
        self.stream, self.layer, self.rows = stream, layer, rows
        self.next_stop, self.inputs = 0, torch.empty(0)
        self.result: tuple[Returned, Routed | None] | None = None
        self.error: BaseException | None = None
        self.stopped = False
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def advance(self) -> None:
        """Let it run until it waits again, or is through. In the main thread.

        Raises:
            BaseException: what the layer raised.
        """
        self._go.release()
        self._waits.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End it, wherever it waits. In the main thread."""
        self.stopped = True
        self._go.release()
        self.thread.join()

    def reach(self, stop: int, inputs: Tensor) -> None:
        """Called before each Linear of a stop: the first of them waits."""
        if stop < self.next_stop:
            return
        if stop > self.next_stop:
            raise RuntimeError(f"layer {self.layer}: stop {stop} was reached before stop {self.next_stop}")
        self.next_stop, self.inputs = stop + 1, inputs
        self._wait()
        self.inputs = torch.empty(0)

    def _wait(self) -> None:
        self._waits.release()
        self._go.acquire()
        if self.stopped:
            raise _StoppedError

    def _run(self) -> None:
        self._go.acquire()
        if self.stopped:
            return
        stream, rows = self.stream, self.rows
        try:
            with torch.inference_mode():
                self.result = stream.model.run_layer(self.layer, stream.before(rows), stream.windows[rows])
        except _StoppedError:
            return
        except BaseException as error:  # it is raised again in the main thread
            self.error = error
        self._waits.release()


class Stepping:
    """A loaded layer on its way over all windows of a stream. Use it as a context manager.

    Args:
        stream: before the layer's first step.
        layer: a layer that `load_layer` has made ready.
        stops: per stop the Linears that share an input, as named inside of the layer, in the order in which the data
            meets the stops.
    """

    def __init__(self, stream: Stream, layer: int, stops: Sequence[Sequence[str]]) -> None:
        self._stream, self._stops, self._at = stream, stops, -1
        self._module: nn.Module = stream.model.layer(layer)
        self._walkers = [_Walker(stream, layer, slice(b.start, b.stop)) for b in batches_of(stream)]
        owners = {walker.thread.ident: walker for walker in self._walkers}
        self._hooks = [
            self._module.get_submodule(name).register_forward_pre_hook(_reaches(owners, stop))
            for stop, names in enumerate(stops)
            for name in names
        ]

    def __enter__(self) -> "Stepping":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for walker in self._walkers:
            walker.stop()

    def inputs(self) -> Iterator[Tensor]:
        """Bring every batch to the next stop: the inputs of its Linears, [B * T, I] or [B, T, I], batch by batch."""
        self._at += 1
        for walker in self._walkers:
            walker.advance()
            if walker.next_stop != self._at + 1:
                raise RuntimeError(f"{self._stops[self._at]} did not run")
            yield walker.inputs

    def replace(self, name: str, weight: Tensor) -> None:
        """Give a Linear of the present stop another weight, [O, I], on the model's device in its compute dtype."""
        linear = self._module.get_submodule(name)
        linear.load_state_dict({"weight": weight}, strict=False, assign=True)

    def finish(self) -> bool:
        """Bring every batch to the layer's end, as `walk.first_step` would; True where the layer has experts."""
        stream, routed = self._stream, None
        for walker in self._walkers:
            walker.advance()
            assert walker.result is not None
            (returned, routed), walker.result = walker.result, None
            store(stream, walker.rows, returned, routed)
        if routed is not None and stream.sums is not None:
            stream.sums.zero_()
        stream.forget()
        return routed is not None


def held_bytes(stream: Stream) -> int:
    """`waiting_bytes` of a stream's tokens."""
    model = stream.model
    return stream.tokens * waiting_bytes(attention_of(model.config), model.shape.hidden, model.dtype)


def waiting_bytes(attention: AttentionShape, hidden: int, dtype: torch.dtype) -> int:
    """About what a waiting token of a layer holds: a few activations of the hidden size, queries, keys, values."""
    wide = attention.heads * (2 * attention.key_width + 2 * attention.value_width)
    return dtype.itemsize * (4 * hidden + wide)


def _reaches(owners: dict[int | None, _Walker], stop: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        owners[threading.get_ident()].reach(stop, arguments[0])

    return hook
