"""What a family must show, on a tiny random model of it; and the table of what every family of transformers shows.

`python tests/family_criteria.py` tries all of them (some minutes) and writes the golden list, `python
tests/family_criteria.py TYPE ...` tries some and prints what they give, `python tests/family_criteria.py table`
writes the table in docs/families.md from the golden list.
"""

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import every_family
import tiny_models
import torch
from gradients import streamed_gradients, whole_gradients
from stage_runs import G32, keep_of, pruned_folder, quantized_folder, streamed_logits
from torch import Tensor, nn

from moepress.calibration.hessian import hessian_for
from moepress.compress.budget.sizes import included_linears, settled_parts
from moepress.compress.gptq.include import IN_LAYERS, Asked
from moepress.converters.safetensors.artifact import open_artifact
from moepress.errors import MoepressError
from moepress.models.families.attention import register
from moepress.models.families.places import Places
from moepress.models.families.skeleton import build_skeleton
from moepress.models.families.table import FAMILIES
from moepress.models.forward.proof import proven_family
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import cuts_of, prune_source, router_disk_names
from moepress.models.storage.safetensors_file import read_bytes

GOLDEN = Path(__file__).parent / "models" / "families_golden.json"
TOLERANCE = 1e-5  # of the largest logit
GRADIENT = 1e-4  # of their length
KEPT = 8  # of 12 experts
LEAST = 44  # types that show all; what keeps the others from it stands in the golden list
TEN = (
    *("glm4_moe", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe", "gpt_oss"),
    *("gemma4", "minimax_m2", "nemotron_h", "ernie4_5_moe", "llama4"),
)
"""The types that `make test` tries; the others are for `make test-families`."""


class Subject:
    """A tiny model of a type, its folder, and transformers' logits of it."""

    def __init__(self, model_type: str, work: Path, *, fused: bool = False) -> None:
        self.model_type, self.work, self.fused = model_type, work, fused
        self.folder = work / "model"
        every_family.save(every_family.build(model_type), self.folder, fused=fused)
        self.tokens = tiny_models.windows(every_family.TEXT_VOCAB, count=3, length=20)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @cached_property
    def reference(self) -> Any:
        return loaded(self.folder)[0]

    @cached_property
    def keep(self) -> dict[int, list[int]]:
        return keep_of(self.checkpoint, KEPT)

    def new(self, name: str) -> Path:
        """A folder that is not there yet."""
        return Path(tempfile.mkdtemp(dir=self.work, prefix=f"{name}-")) / name


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a folder with the attention that we run it with, and its loading report."""
    model, report = every_family.load_report(folder)
    if model._supports_sdpa:
        with suppress(KeyError, ValueError):
            model.set_attn_implementation(register())
    return model, report


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return every_family.logits(model, tokens).float()


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, f"logits differ by {error:.1e} of the largest"


def names(subject: Subject) -> None:
    """Every stored tensor has a part, experts and routers are found in every layer that transformers gives experts."""
    source = subject.checkpoint
    model = build_skeleton(source.config)
    places, state = Places(model, source.shapes), model.state_dict()
    for name in source.shapes:
        assert places.place(name)[0] in state, f"{name} has no place in transformers' model"
    assert source.outline.moe_layers, "no layer with experts"
    for layer in source.outline.moe_layers:
        assert router_disk_names(source, layer), f"layer {layer} has no router"


def streamed(subject: Subject) -> None:
    """Layer by layer gives transformers' logits."""
    assert_same(
        streamed_logits(subject.checkpoint, subject.tokens, subject.work), logits(subject.reference, subject.tokens)
    )


def keeps_bytes(subject: Subject) -> None:
    """Keeping all experts changes no byte."""
    source = subject.checkpoint
    pruned_folder(subject.folder, keep_of(source, source.shape.experts), out := subject.new("all"))
    again = open_checkpoint(out)
    assert {n: (e.dtype, e.shape) for n, e in again.stored.items()} == {
        n: (e.dtype, e.shape) for n, e in source.stored.items()
    }
    for name, entry in source.stored.items():
        assert read_bytes(entry) == read_bytes(again.stored[name]), name
    assert again.config == source.config


def pruned_is_masked(subject: Subject) -> None:
    """What `prune` writes loads cleanly, and is the original whose routers can not choose the experts that went."""
    pruned_folder(subject.folder, subject.keep, out := subject.new("pruned"))
    model, report = loaded(out)
    wrong = {key: sorted(found)[:3] for key, found in report.items() if key != "error_msgs" and found}
    assert not wrong, f"transformers loads it with {wrong}"
    with masked(subject, subject.keep):
        wanted = logits(subject.reference, subject.tokens)
    assert_same(logits(model, subject.tokens), wanted)
    seen = prune_source(subject.checkpoint, subject.keep)
    assert_same(streamed_logits(seen, subject.tokens, subject.work), wanted)


def quantized_loads(subject: Subject) -> None:
    """What `quantize` writes by default at 4 bits loads cleanly in transformers, and gives what its codes stand for."""
    windows, out = tiny_models.windows(every_family.TEXT_VOCAB, count=4, length=24), subject.new("q")
    linears = included_linears(subject.checkpoint, IN_LAYERS)
    include, _ = settled_parts(Asked(auto=True), linears, G32.group_size)
    options = {"include": include, "hessian": hessian_for("auto", G32.bits, {}), "scheme": G32}
    quantized_folder(subject.folder, windows, out, keep=subject.keep, **options)
    ours = streamed_logits(open_artifact(out), subject.tokens, subject.work)
    model, report = loaded(out)
    wrong = {key: sorted(found)[:3] for key, found in report.items() if key != "error_msgs" and found}
    assert not wrong, f"transformers loads it with {wrong}"
    assert_same(ours, logits(model, subject.tokens), 1e-4)


def router(subject: Subject) -> None:
    """The family proves itself, and how its router chooses and weighs is one of the rules that moepress knows."""
    family = proven_family(subject.checkpoint.family, subject.checkpoint.config)
    assert family.rule is not None, "how its router chooses, or weighs, is none of the rules that moepress knows"


def backward(subject: Subject) -> None:
    """Gradients layer by layer are transformers'."""
    source, tokens = subject.checkpoint, subject.tokens
    labels = torch.randint(0, every_family.TEXT_VOCAB, (tokens.numel(),), generator=torch.Generator().manual_seed(0))

    def loss(logits_RV: Tensor, rows: slice) -> Tensor:
        return nn.functional.cross_entropy(logits_RV, labels[rows], reduction="sum")

    ours = streamed_gradients(source, tokens, loss, subject.work)
    wanted = whole_gradients(subject.reference, source.family.module_layers_at, tokens, loss)
    for layer in range(1, len(ours)):  # what the first gets, others may get too
        found = ours[layer].view_as(wanted[layer])
        error = float((found - wanted[layer]).norm() / wanted[layer].norm().clamp(min=1e-9))
        assert error <= GRADIENT, f"gradients before layer {layer} differ by {error:.1e}"


CRITERIA: Mapping[str, Callable[[Subject], None]] = {
    "names": names,
    "streamed": streamed,
    "router": router,
    "keeps bytes": keeps_bytes,
    "pruned": pruned_is_masked,
    "quantized": quantized_loads,
    "backward": backward,
}


@contextmanager
def masked(subject: Subject, keep: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """The routers of transformers' model can not choose any expert but these, and hash tables name no other."""
    source, model = subject.checkpoint, subject.reference
    places = Places(model, source.shapes)
    experts = source.shape.experts
    state = dict((*model.named_parameters(), *model.named_buffers()))
    gone: dict[int, Tensor] = {}
    undo: list[tuple[Tensor, Tensor]] = []
    for layer, kept in keep.items():
        removed = torch.tensor(sorted(set(range(experts)) - set(kept)))
        routers = router_disk_names(source, layer)
        for name, cut in cuts_of(source, layer, kept).items():
            tensor = state.get(places.place(name)[0])
            if tensor is None or name in source.family.fused_names(layer):
                continue
            if cut.table:
                undo.append((tensor, tensor.clone()))
                tensor.data.copy_(torch.tensor(list(kept))[cut.of(tensor.data)])
            elif name == routers[0]:
                gone[id(tensor)] = removed
            elif "bias" in name and tensor.numel() in (experts, experts + source.family.router_extra):
                undo.append((tensor, tensor.clone()))
                tensor.data.view(-1)[removed] = -1e30
    plain = nn.functional.linear

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = plain(inputs, weight, bias)
        removed = gone.get(id(weight))
        return out if removed is None else out.index_fill(-1, removed, float("-inf"))

    nn.functional.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear = plain
        for tensor, before in undo:
            tensor.data.copy_(before)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one criterion: empty where it is met, else why not."""

    why: str
    seconds: float


def attempt(subject: Subject, criterion: str) -> Outcome:
    """Try one criterion."""
    start = time.monotonic()
    try:
        CRITERIA[criterion](subject)
    except (MoepressError, AssertionError) as error:
        return Outcome(str(error).split("\n")[0][:240], time.monotonic() - start)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = str(error).splitlines()[0][:160] if str(error) else ""
        why = f"{type(error).__name__}: {first} ({Path(where.filename).name})"
        return Outcome(why, time.monotonic() - start)
    return Outcome("", time.monotonic() - start)


def table(known: Mapping[str, Mapping[str, str]]) -> str:
    """The golden list as Markdown: a row a type, and below it why something is not shown."""
    rows = [f"| model type | {' | '.join(CRITERIA)} |", f"|---|{':---:|' * len(CRITERIA)}"]
    reasons: dict[str, list[str]] = {}
    for model_type, why in sorted(known.items()):
        told = " (row)" if model_type in FAMILIES else ""
        rows.append(f"| `{model_type}`{told} | {' | '.join('-' if why[name] else 'yes' for name in CRITERIA)} |")
        for name in CRITERIA:
            if why[name]:
                reasons.setdefault(_reason(why[name]), []).append(f"`{model_type}`")
    told = [f"- {reason}: {', '.join(dict.fromkeys(types))}" for reason, types in sorted(reasons.items())]
    whole = sum(not any(why.values()) for why in known.values())
    return "\n".join([f"{whole} of {len(known)} types show all.", "", *rows, "", "Why not:", "", *told])


def _reason(why: str) -> str:
    """A reason without what is only of one type."""
    for sign, reason in _REASONS:
        if sign in why:
            return reason
    return why.replace("|", "/")


_REASONS = (
    (
        "transformers loads it with",
        "transformers keeps the experts of a layer fused and loads no single quantized ones",
    ),
    ("automatic conversion of the weights", "transformers' converters of other tensors fail on any quantized folder"),
    ("source keys=", "transformers' converters of other tensors fail on any quantized folder"),
    (
        "has no routed experts",
        "the experts are not in one module that transformers keeps as such, or some compute nothing",
    ),
    ("none of the rules", "how the router chooses or weighs is no rule that moepress knows: no `loo`, no budgets"),
    ("can not be computed layer by", "the tiny model can not be computed layer by layer, which the proof refuses"),
    ("gradients before layer", "layers hand on more than hidden states, which `--effort max` takes no gradient of"),
    ("do not fit its config.json", "tensors of one layer are stored under the names of another"),
)
_BEGIN, _END = "<!-- made by tests/family_criteria.py table -->", "<!-- end -->"


def write_table() -> None:
    """Put the table into docs/families.md, between its marks."""
    text = PAGE.read_text()
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n{table(json.loads(GOLDEN.read_text()))}\n{_END}{after}")


PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def main() -> None:
    """Try families and write or print what they show."""
    torch.set_num_threads(1)
    if sys.argv[1:] == ["table"]:
        write_table()
        return
    asked = sys.argv[1:]
    found: dict[str, dict[str, str]] = {}
    for model_type in asked or every_family.moe_types():
        found[model_type] = {}
        with tempfile.TemporaryDirectory(prefix="moepress-families-") as name:
            try:
                subject = Subject(model_type, Path(name))
            except Exception as error:
                why = every_family.REFUSED.get(model_type, f"{type(error).__name__}: {error}")
                found[model_type] = dict.fromkeys(CRITERIA, why)
                print(f"{model_type:24} no tiny model: {why}", flush=True)
                continue
            for criterion in CRITERIA:
                outcome = attempt(subject, criterion)
                found[model_type][criterion] = outcome.why
                print(f"{model_type:24} {criterion:12} {outcome.seconds:5.1f} s {outcome.why or 'ok'}", flush=True)
    whole = sum(not any(why.values()) for why in found.values())
    print(f"{whole} of {len(found)} types show all")
    if not asked:
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
