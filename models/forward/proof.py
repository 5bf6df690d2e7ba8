"""A derived family proves itself before any work: a tiny random model of it, streamed, held against transformers'.

What `families.derive` asks of transformers may be wrong for an architecture that nobody tried. So a model of the same
features, small enough to take a second, is streamed as the large one would be; where its logits are not those of
transformers, the family is refused. The same model tells what no config does (`forward.probe`). All this is done once
per config and remembered.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepress.errors import UnsupportedError
from moepress.models.families import remembered
from moepress.models.families.family import Config, Family, Part, RouterRule
from moepress.models.families.shrunk import TEXT_VOCABULARY, random_model, shrunk
from moepress.models.families.skeleton import build_skeleton
from moepress.models.forward.probe import Groups, Layer, found_residual, groups_of, layers_of, rule_of
from moepress.models.forward.replay import hidden_of
from moepress.models.forward.scratch import Scratch
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, forward
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.runs.progress import silent
from moepress.runs.text import one_line

_TOLERANCE = 5e-5  # of the largest logit: sums in another order; what is wrong shows in the second digit
_WINDOWS, _LENGTH = 2, 24
_MEMORY = 1 << 28
_MOST_PARAMETERS = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """What a tiny model of a family told, in names of transformers' modules.

    Attributes:
        additive: experts' outputs may be added to what the rest of a layer gives.
        residual: the residual stream before the experts is known.
        rule: how the router chooses; None where no rule that moepress knows is that.
        correction: the tensor that is added for the choice, with `#` for its layer, or "".
        attention_groups, mlp_groups: leaf names of Linears in the order of the data, those with the same
            input together.
    """

    additive: bool
    residual: bool
    rule: RouterRule | None
    correction: str
    attention_groups: Groups
    mlp_groups: Groups


def proven_family(family: Family, config: Config) -> Family:
    """A family with what its proof told; a row of the table as it is.

    Args:
        family: of `table.family_of`.
        config: config.json that it was derived of.

    Raises:
        UnsupportedError: what moepress computes of that architecture is not what transformers does.
    """
    if not family.derived:
        return family
    file = remembered.place_of("proven", config)
    found = _recalled(remembered.recall(file))
    if found is None:
        found = prove(config)
        remembered.keep(file, asdict(found))
    correction = _pattern_of(family, found.correction) if found.correction else ""
    known = found.rule is not None and bool(correction) == found.rule.bias
    return replace(
        family,
        additive=found.additive,
        residual=found.residual,
        rule=found.rule if known else None,
        correction=correction,
        attention_groups=_on_disk(family, found.attention_groups, (Part.ATTENTION,)),
        mlp_groups=_on_disk(family, found.mlp_groups, (Part.SHARED, Part.DENSE)),
    )


def prove(config: Config) -> Proven:
    """Stream a tiny model with the features of a config, and hold it against transformers; once per such config.

    Raises:
        UnsupportedError: it can not be built or streamed, or its logits are others.
    """
    tiny = shrunk(config)
    file = remembered.place_of("proofs", tiny)
    found = _recalled(remembered.recall(file))
    if found is None:
        found = _proven(tiny)
        remembered.keep(file, asdict(found))
    return found


def _proven(tiny: dict[str, Any]) -> Proven:
    kind = tiny.get("model_type")
    try:
        with _quiet(), tempfile.TemporaryDirectory(prefix="moepress-proof-") as folder:
            _require_small(tiny)
            model = random_model(tiny)
            tokens = torch.randint(2, TEXT_VOCABULARY, (_WINDOWS, _LENGTH), generator=torch.Generator().manual_seed(1))
            with torch.inference_mode():
                truth = model(input_ids=tokens, use_cache=False).logits
            model.save_pretrained(folder)
            checkpoint = open_checkpoint(Path(folder))
            difference = _difference(_streamed(checkpoint, tokens), truth)
            streamed = StreamedModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
            layers = list(layers_of(streamed, tokens))
            if not difference <= _TOLERANCE:
                where = _first(model, checkpoint, layers, tokens)
                raise UnsupportedError(
                    f"Model type {kind!r} can not be pressed: a tiny model of it, computed layer by layer, differs "
                    f"from transformers by {difference:.1g} of the largest logit{where}; please report the model type."
                )
            return _told(checkpoint, streamed, layers, tokens, truth)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever transformers raises of a model of its own
        raise UnsupportedError(
            f"Model type {kind!r} can not be pressed: a tiny model of it can not be computed layer by layer "
            f"({one_line(error)}); please report the model type."
        ) from error


def _require_small(tiny: Config) -> None:
    """Refuse a model with a size whose key has a name that `shrunk` does not know, before it takes all memory."""
    skeleton = build_skeleton(tiny, attention="eager")
    count = sum(tensor.numel() for tensor in skeleton.parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"it has {count:,} parameters")


def _told(
    checkpoint: Checkpoint, streamed: StreamedModel, layers: list[Layer], tokens: Tensor, truth: Tensor
) -> Proven:
    family = checkpoint.family
    found = rule_of(streamed, layers)
    attention, others = groups_of(layers)
    rule, pattern = found if found is not None else (None, "")
    return Proven(
        additive=_is_additive(checkpoint, tokens, truth),
        residual=found_residual(layers),
        rule=rule,
        correction=_module_template(family, pattern) if pattern else "",
        attention_groups=attention,
        mlp_groups=others,
    )


def _streamed(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Logits by the walk that all stages take."""
    model = StreamedModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    with tempfile.TemporaryDirectory(prefix="moepress-proof-") as folder, torch.inference_mode():
        scratch = Scratch(Path(folder), _MEMORY)
        hidden = forward(model, tokens, scratch, Limits(memory_bytes=_MEMORY, batch_windows=_WINDOWS)).clone()
        scratch.close()
        return model.head()(hidden)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number; NaN where either has one."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.abs().max())


def _is_additive(checkpoint: Checkpoint, tokens: Tensor, truth: Tensor) -> bool:
    try:
        added = _streamed(replace(checkpoint, family=replace(checkpoint.family, additive=True)), tokens)
    except Exception:  # hidden states of several streams have another shape than what experts give
        return False
    return _difference(added, truth) <= _TOLERANCE


def _first(model: Any, checkpoint: Checkpoint, layers: list[Layer], tokens: Tensor) -> str:
    """Where the two begin to differ, as the end of a clause."""
    theirs: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: Any, returned: Any) -> None:
        theirs.append(hidden_of(returned))

    modules = model.get_submodule(checkpoint.family.module_layers_at.removesuffix("."))
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for number, (ours, truth) in enumerate(zip(layers, theirs, strict=False)):
        if ours.hidden.shape != truth.shape or not _difference(ours.hidden, truth) <= _TOLERANCE:
            return f", from layer {number} on"
    return ", behind the last layer"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and our walk say and show of a tiny model."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), silent():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _module_template(family: Family, pattern: str) -> str:
    """The module's name, numbers as `#`, of a pattern of `Family.router`."""
    wanted = pattern.replace("{layer}", "#")
    return next((module for disk, module, _ in family.templates if disk == wanted), "")


def _pattern_of(family: Family, module: str) -> str:
    """The inverse, in a family whose names on disk may be others."""
    return next((pattern for pattern in family.router if _module_template(family, pattern) == module), "")


def _on_disk(family: Family, groups: Groups, parts: tuple[Part, ...]) -> Groups:
    """Groups of leaf names on disk, of those in transformers' modules.

    Left out are Linears of which a converter makes the tensors, and leaves that stand for several on disk.
    """
    wanted = {part.value for part in parts}
    leaves: dict[str, set[str]] = {}  # on disk -> in modules
    for disk, module, part in family.templates:
        if part in wanted and disk.endswith(".weight") and module.endswith(".weight"):
            own = "" if disk in family.converted else module.split(".")[-2]
            leaves.setdefault(disk.split(".")[-2], set()).add(own)
    found = [tuple(leaf for name in group for leaf, names in leaves.items() if names == {name}) for group in groups]
    return tuple(group for group in found if group)


def _recalled(found: Mapping[str, Any] | None) -> Proven | None:
    """As it was remembered; None where that is not sound."""
    if found is None:
        return None
    try:
        groups = {key: tuple(map(tuple, found[key])) for key in ("attention_groups", "mlp_groups")}
        rule = found["rule"]
        return Proven(**{**found, **groups, "rule": None if rule is None else RouterRule(**rule)})
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
