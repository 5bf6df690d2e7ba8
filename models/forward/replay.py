"""What a decoder layer is called with: the model's own code runs, with passages in the place of its layers.

A passage before the layer that is wanted gives back what the layer before it returned; the one of the wanted layer
calls that layer and ends the run. So masks, rotary embeddings, token numbers and what one layer hands to another come
to it as transformers has them. Several threads may be under way at a time, each in a layer (`forward.stepping`).
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moepress.models.families.skeleton import head_of

Returned = Tensor | tuple[Any, ...]
"""What a decoder layer returns: hidden states, perhaps with a state for the next layer behind them."""


class ReachedError(Exception):
    """The wanted layer, or the head, has run; nothing behind it need."""


@dataclass(slots=True, kw_only=True)
class _Call:
    """One run on its way: which layer is wanted, what the one before it returned, and what was found.

    `instead` is called in the place of that layer.
    """

    layer: int
    before: Returned
    instead: nn.Module | None = None
    first: bool = False
    seen: Tensor | None = None
    returned: Any = None


@dataclass(slots=True)
class Calls:
    """The calls under way, one a thread."""

    _local: threading.local = field(default_factory=threading.local)

    @property
    def now(self) -> _Call:
        """This thread's."""
        return self._local.call  # type: ignore[no-any-return]

    def start(self, call: _Call) -> None:
        """Begin one."""
        self._local.call = call


class Passage(nn.Module):
    """Stands where a decoder layer was."""

    def __init__(self, layer: nn.Module, number: int, calls: Calls) -> None:
        super().__init__()
        self.__dict__["own"] = (layer, number, calls)  # not as a child: its weights come and go

    def __getattr__(self, name: str) -> Any:
        """What the model's code asks of its layers, such as their kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["own"][0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Give back, or run the layer and end."""
        layer, number, calls = self.__dict__["own"]
        call = calls.now
        if number < call.layer:
            return call.before
        if call.first:
            call.seen = arguments[0] if arguments else keywords["hidden_states"]
            raise ReachedError
        if number == 0:  # what the embedding made was put away; the model made its stand-in's
            hidden = call.before[0] if isinstance(call.before, tuple) else call.before
            if arguments:
                arguments = (hidden, *arguments[1:])
            else:
                keywords = keywords | {"hidden_states": hidden}
        call.returned = (layer if call.instead is None else call.instead)(*arguments, **keywords)
        raise ReachedError


class StandIn(nn.Module):
    """Stands where the embedding was: zeros of its width while its table is not there."""

    def __init__(self, embedding: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.__dict__["own"] = (embedding, width, dtype, device)

    def __getattr__(self, name: str) -> Any:
        """What the model's code asks of the embedding."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["own"][0], name)

    def forward(self, ids: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """The embeddings, of the rows that were read, under their places in those; zeros where none are there now."""
        embedding, width, dtype, device = self.__dict__["own"]
        if "rows_read" in embedding.__dict__:
            places = torch.searchsorted(embedding.rows_read, ids.contiguous())
            return embedding(places, *arguments, **keywords)  # type: ignore[no-any-return]
        return torch.zeros(*ids.shape, width, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A skeleton whose layers and embedding have been put away.

    Attributes:
        model: transformers' model.
        layers: its decoder layers.
        embedding: its input embeddings.
        output: its output embeddings.
        calls: what is under way.
        behind: layers that the model does not have, by their numbers: in whose place each is called, and it.
    """

    model: Any
    layers: list[nn.Module]
    embedding: nn.Module
    output: nn.Module
    calls: Calls
    behind: dict[int, tuple[int, nn.Module]] = field(default_factory=dict)

    def module(self, number: int) -> nn.Module:
        """A layer, one of `behind` too."""
        return self.behind[number][1] if number in self.behind else self.layers[number]

    def embed(self, ids_BT: Tensor) -> Tensor:
        """What the first layer gets of tokens, whose rows of the table the embedding holds: [B, T, ...]."""
        call = _Call(layer=0, before=torch.empty(0), first=True)
        self._run(call, ids_BT)
        assert call.seen is not None
        return call.seen

    def layer(self, number: int, before: Returned, ids_BT: Tensor) -> Any:
        """What a layer returns, given what the one before it did."""
        place, instead = self.behind.get(number, (number, None))
        call = _Call(layer=place, before=before, instead=instead)
        self._run(call, ids_BT)
        return call.returned

    def logits(self, before: Returned, ids_BT: Tensor) -> Tensor:
        """What comes behind the last layer, [B, T, V]."""
        self.calls.start(_Call(layer=len(self.layers), before=before))
        return self.model(input_ids=ids_BT, use_cache=False).logits  # type: ignore[no-any-return]

    def before_head(self, before: Returned, ids_BT: Tensor) -> Tensor:
        """What the output embeddings get, [B, T, D]."""
        seen: list[Tensor] = []

        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0])
            raise ReachedError

        handle = self.output.register_forward_pre_hook(hook)
        try:
            self._run(_Call(layer=len(self.layers), before=before), ids_BT)
        finally:
            handle.remove()
        return seen[0]

    def _run(self, call: _Call, ids_BT: Tensor) -> None:
        self.calls.start(call)
        try:
            self.model(input_ids=ids_BT, use_cache=False)
        except ReachedError:
            return
        raise RuntimeError(f"layer {call.layer} was not called")


def put_away(model: Any, layers_at: str, *, dtype: torch.dtype, device: torch.device) -> Replay:
    """Take layers and embedding out of a skeleton, and passages in their place.

    Args:
        model: transformers' model on the meta device; changed.
        layers_at: the prefix of its layers' names.
        dtype: of hidden states.
        device: where they are.
    """
    calls = Calls()
    path = layers_at.removesuffix(".")
    layers = list(model.get_submodule(path))
    _put(model, path, nn.ModuleList(Passage(layer, number, calls) for number, layer in enumerate(layers)))
    embedding = model.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    place = next(name for name, module in model.named_modules() if module is embedding)
    _put(model, place, StandIn(embedding, width, dtype, device))
    return Replay(model=model, layers=layers, embedding=embedding, output=head_of(model), calls=calls)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def hidden_of(returned: Any) -> Tensor:
    """The hidden states among what a layer returned."""
    return returned[0] if isinstance(returned, tuple) else returned  # type: ignore[no-any-return]
