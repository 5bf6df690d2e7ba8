"""What a tiny model tells of its architecture besides what it computes, read off one streamed pass over its layers.

How its router makes weights of logits is searched among the rules that `families.routing` can compute; one counts if it
gives every token of every layer its experts and their weights. The order of a layer's Linears, and which of them see
the same input, is watched.
"""

import graphlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from moepress.models.families.family import Family, Part, RouterRule, numbered
from moepress.models.families.router import Router
from moepress.models.families.routing import choice_scores, combine_weights, scores
from moepress.models.forward.recorder import Routed
from moepress.models.forward.replay import hidden_of
from moepress.models.forward.streamed import StreamedModel, apply_expert, tokens_of

_TOLERANCE = 1e-5
_EXACT = 2e-6
_SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a Linear in a layer: its path inside of it, its part, and what it got."""

    path: str
    part: Part
    inputs: Tensor

    @property
    def leaf(self) -> str:
        """The last piece of its path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What was seen of one layer.

    Attributes:
        hidden: what it returned.
        calls: of its Linears, in order.
        late: paths of Linears that the routed experts' outputs reach.
        routed: what its experts got; None where it has none.
        biases: tensors of the router with one number per expert, by their pattern in `Family.router`.
        weighs_inputs: the router's weights are on the experts' inputs.
    """

    hidden: Tensor
    calls: tuple[Call, ...]
    late: frozenset[str]
    routed: Routed | None
    biases: Mapping[str, Tensor]
    weighs_inputs: bool


class _Watch:
    """Keeps the calls of a layer's Linears that are neither router nor experts."""

    def __init__(self, family: Family, layer: nn.Module, number: int) -> None:
        parts = {module: Part(part) for _, module, part in family.templates}
        self.calls: list[Call] = []
        self._linears = [
            (path, module, part)
            for path, module in layer.named_modules()
            if isinstance(module, nn.Linear)
            and type(module).forward is nn.Linear.forward
            and (part := parts.get(numbered(f"{family.module_layers_at}{number}.{path}.weight")[0])) in _PARTS
        ]
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        for path, module, part in self._linears:
            self._hooks.append(module.register_forward_pre_hook(self._hook(path, part)))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, path: str, part: Part) -> Any:
        def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.calls.append(Call(path=path, part=part, inputs=arguments[0]))

        return keep


_PARTS = (Part.ATTENTION, Part.SHARED, Part.DENSE)  # in the order in which they are quantized


@torch.inference_mode()
def layers_of(model: StreamedModel, tokens_BT: Tensor) -> Iterator[Layer]:
    """Run a model over some tokens, layer by layer, and tell what is seen."""
    returned: Any = model.embed(tokens_BT)
    for number in range(model.shape.layers):
        module = model.load_layer(number)
        before = returned
        with _Watch(model.family, module, number) as watch:
            returned, routed = model.run_layer(number, before, tokens_BT)
        late = frozenset[str]()
        if routed is not None:
            with _Watch(model.family, module, number) as again:
                sums = _experts(model, number, routed)
                returned, _ = model.run_layer(number, before, tokens_BT, given_TD=sums)
            pairs = zip(watch.calls, again.calls, strict=True)
            late = frozenset(a.path for a, b in pairs if not torch.equal(a.inputs, b.inputs))
        yield Layer(
            hidden=hidden_of(returned),
            calls=tuple(watch.calls),
            late=late,
            routed=routed,
            biases={} if routed is None else _biases(model, number),
            weighs_inputs=routed is not None and model.weighs_inputs(number),
        )
        model.unload_layer(number)


def _experts(model: StreamedModel, layer: int, routed: Routed) -> Tensor:
    """The weighted sum of the experts' outputs, fp32 [T, D]."""
    sums = torch.zeros(routed.inputs.shape, dtype=torch.float32)
    for expert, (tokens, slots) in enumerate(tokens_of(routed.chosen, model.shape.experts)):
        if len(tokens):
            output = apply_expert(model.read_expert(layer, expert), routed.inputs[tokens], model.gating(layer))
            sums.index_add_(0, tokens, output.float() * routed.weights[tokens, slots, None].float())
    return sums


def _biases(model: StreamedModel, layer: int) -> dict[str, Tensor]:
    found = {}
    for pattern in model.family.router[1:]:
        name = model.family.at(pattern, layer)
        if name in model.source.shapes and (bias := model.source.read(name)).numel() == model.shape.experts:
            found[pattern] = bias.float().reshape(-1)
    return found


def rule_of(model: StreamedModel, layers: Sequence[Layer]) -> tuple[RouterRule, str] | None:
    """The rule by which the router of a model chooses and weighs, and the pattern of its correction bias, or "".

    None where no rule that moepress computes gives all of what was seen.
    """
    seen = [layer for layer in layers if layer.routed is not None]
    if not seen or model.family.router_extra or any(layer.weighs_inputs for layer in seen):
        return None
    shape = model.shape
    plain = Router(
        scoring="softmax",
        group_score=None,
        groups=shape.groups,
        top_groups=shape.top_groups,
        top_k=shape.top_k,
        renormalise=False,
        scale=1.0,
    )
    patterns = ["", *(p for p in model.family.router[1:] if all(p in layer.biases for layer in seen))]
    ranked: tuple[str | None, ...] = (None, "top2", "max") if shape.groups > 1 else (None,)
    for scoring, pattern, group_score in itertools.product(_SCORINGS, patterns, ranked):
        router = replace(plain, scoring=scoring, group_score=group_score)
        if not all(_chooses(router, layer, pattern) for layer in seen):
            continue
        for renormalise in (False, True):
            scale = _scale(replace(router, renormalise=renormalise), seen)
            if scale is not None:
                rule = RouterRule(
                    scoring=scoring,
                    bias=bool(pattern),
                    group_score=group_score,
                    renormalise=renormalise,
                    scale=scale,
                )
                return rule, pattern
    return None


def _chooses(router: Router, layer: Layer, pattern: str) -> bool:
    """Whether a rule gives every token of a layer the experts that it got."""
    assert layer.routed is not None
    choice = choice_scores(router, scores(router, layer.routed.logits), layer.biases[pattern] if pattern else None)
    chosen = choice.topk(router.top_k, dim=-1).indices
    return torch.equal(chosen.sort(dim=-1).values, layer.routed.chosen.sort(dim=-1).values)


def _scale(router: Router, layers: Sequence[Layer]) -> float | None:
    """The factor that makes the weights of a rule those that were seen; None where there is no such."""
    ours, theirs = [], []
    for layer in layers:
        assert layer.routed is not None
        ours.append(combine_weights(router, scores(router, layer.routed.logits), layer.routed.chosen).flatten())
        theirs.append(layer.routed.weights.float().flatten())
    made, seen = torch.cat(ours), torch.cat(theirs)
    exact = float((seen @ made) / (made @ made))
    # As a config would state it, where that is as good as what was read off.
    short = (float(f"{exact:.{digits}g}") for digits in range(1, 8))
    scale = next((value for value in short if abs(value - exact) <= _EXACT * exact), exact)
    close = bool(((made * scale - seen).abs() <= _TOLERANCE * seen.abs().max()).all())
    return scale if close and scale > 0 else None


def groups_of(layers: Sequence[Layer]) -> tuple[Groups, Groups]:
    """Leaf names of attention's Linears and of those of shared experts and dense MLPs, in the order of the data.

    Those with the same input are together. Left out are Linears that run twice, that the routed experts' outputs reach,
    that share their leaf name with another one of the same part of a layer, or that do not come in one order.
    """
    attention = [_order(layer, (Part.ATTENTION,)) for layer in layers]
    others = [_order(layer, (part,)) for layer in layers for part in (Part.SHARED, Part.DENSE)]
    out_of_order = {leaf for layer in layers for leaf in _out_of_order(layer)}
    bad = {part: {leaf for layer in layers for leaf in _unfit(layer, part)} for part in _PARTS}
    return (
        _merged(attention, bad[Part.ATTENTION]),
        _merged(others, bad[Part.SHARED] | bad[Part.DENSE] | out_of_order),
    )


def _order(layer: Layer, parts: Sequence[Part]) -> list[list[str]]:
    """The leaves of a layer's part, those with the same input together, by the first call."""
    groups: list[tuple[Tensor, list[str]]] = []
    for call in layer.calls:
        if call.part not in parts:
            continue
        same = next((leaves for inputs, leaves in groups if _same(inputs, call.inputs)), None)
        if same is None:
            groups.append((call.inputs, [call.leaf]))
        elif call.leaf not in same:
            same.append(call.leaf)
    return [leaves for _, leaves in groups]


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.shape[-1] == other.shape[-1]
    )


def _unfit(layer: Layer, part: Part) -> set[str]:
    """Leaves of a part that do not stand for one Linear, called once and before the experts have given anything."""
    calls = [call for call in layer.calls if call.part is part]
    leaves = [call.leaf for call in calls]
    return {call.leaf for call in calls if leaves.count(call.leaf) > 1 or call.path in layer.late}


def _out_of_order(layer: Layer) -> set[str]:
    """Leaves of MLPs that run before a part that is quantized before them."""
    found = set()
    for place, call in enumerate(layer.calls):
        rank = _PARTS.index(call.part)
        if any(_PARTS.index(later.part) < rank for later in layer.calls[place + 1 :]):
            found.add(call.leaf)
    return found


def _merged(orders: Sequence[list[list[str]]], left_out: set[str]) -> Groups:
    """One order of groups that all layers' orders agree with."""
    left_out = set(left_out)
    while True:
        kept = [[[leaf for leaf in group if leaf not in left_out] for group in order] for order in orders]
        kept = [[group for group in order if group] for order in kept]
        home = _homes(kept)
        wrong = _torn(kept, home)
        if not wrong:
            edges: dict[str, set[str]] = {}
            for order in kept:
                names = [home[group[0]] for group in order]
                for place, name in enumerate(names):
                    edges.setdefault(name, set()).update(names[max(place - 1, 0) : place])
            try:
                sequence = tuple(graphlib.TopologicalSorter(edges).static_order())
            except graphlib.CycleError as error:
                wrong = {leaf for leaf, name in home.items() if name in error.args[1]}
            else:
                return tuple(tuple(leaf for leaf in home if home[leaf] == name) for name in sequence)
        left_out |= wrong


def _homes(orders: Sequence[list[list[str]]]) -> dict[str, str]:
    """Leaf -> the leaf that its group is called by: leaves that are together in any layer are in one group."""
    home: dict[str, str] = {}
    for group in itertools.chain.from_iterable(orders):
        names = {home.setdefault(leaf, leaf) for leaf in group}
        first = next(leaf for leaf in home if home[leaf] in names)
        home |= {leaf: home[first] for leaf, name in home.items() if name in names}
    return home


def _torn(orders: Sequence[list[list[str]]], home: Mapping[str, str]) -> set[str]:
    """Leaves of a group that see different inputs in some layer."""
    wrong = set()
    for order in orders:
        names = [home[group[0]] for group in order]
        wrong |= {leaf for group in order for leaf in group if names.count(home[leaf]) > 1}
    return wrong


def found_residual(layers: Sequence[Layer]) -> bool:
    """Whether what the residual stream was before the experts is known, in every layer that has some."""
    routed = [layer.routed for layer in layers if layer.routed is not None]
    return all(one.residual.data_ptr() != one.inputs.data_ptr() for one in routed)
