"""Experts that few tokens chose: which tokens they are topped up with, and what that leaves alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_runs import CPU, LIMITS, content, keep_of, quantized_folder
from torch import Tensor

from moepress.calibration.hessian import HessianOptions
from moepress.compress.estimates.figures import figures_of
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.gptq import balance, pieces
from moepress.compress.gptq.balance import next_ranked, topped_up
from moepress.compress.gptq.include import Include
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.router import router_of
from moepress.models.families.routing import scores
from moepress.models.forward.streamed import StreamedModel, tokens_of
from moepress.models.forward.walk import Limits, Scratch, Stream, add_experts, first_step, open_stream
from moepress.models.storage.checkpoint import Source, open_checkpoint
from moepress.models.storage.experts import prune_source

WINDOWS = tiny_models.windows(256, count=6, length=20)
ALL_BUT_HEAD = (Include.ATTENTION, Include.SHARED, Include.DENSE)
G16 = Scheme(bits=4, group_size=16)


def walked(source: Source, folder: Path, *, logits: bool = True, observe: bool = False) -> Stream:
    """A stream after the first step of layer 2."""
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    scratch = Scratch(folder, LIMITS.memory_bytes)
    stream = open_stream(model, WINDOWS, scratch, LIMITS, observe=observe, logits=logits)
    for layer in range(3):
        model.load_layer(layer)
        if first_step(stream, layer) and layer < 2:
            add_experts(stream, layer)
    return stream


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("pruned", [False, True])
def test_own_tokens_come_first_and_then_those_that_the_router_ranks_next(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, pruned: bool
) -> None:
    """Sigmoid with bias and groups, and softmax; against a loop over all tokens' scores."""
    checkpoint = open_checkpoint(tiny_model(key))
    source = prune_source(checkpoint, keep_of(checkpoint, checkpoint.shape.experts // 2)) if pruned else checkpoint
    with torch.inference_mode():
        stream = walked(source, tmp_path)
        count = stream.model.shape.experts
        positions = tokens_of(stream.chosen, count)
        own = [len(tokens) for tokens, _ in positions]
        least = sorted(own)[len(own) // 2]
        found = topped_up(stream, positions, range(count), least)
    assert list(found) == list(range(count))
    assert 0 < sum(n < least for n in own) < count
    assert stream.logits is not None
    assert stream.residual is None
    scored = scores(router_of(stream.model.family, source.config, source.outline.shape), stream.logits.clone())
    for expert, (tokens, slots) in found.items():
        if own[expert] >= least:
            assert found[expert] is positions[expert]
            continue
        assert len(tokens) == len(slots) == len(set(tokens.tolist())) == least
        assert torch.equal(tokens[: own[expert]], positions[expert][0])
        assert torch.equal(slots[: own[expert]], positions[expert][1])
        mine = set(positions[expert][0].tolist())
        others = sorted(set(range(stream.tokens)) - mine, key=lambda t: (-float(scored[t, expert]), t))
        expected = scored[others[: least - own[expert]], expert]
        torch.testing.assert_close(scored[tokens[own[expert] :], expert], expected, rtol=1e-5, atol=0)
        added = slice(own[expert], None)
        assert torch.equal(stream.weights[tokens[added], slots[added]], stream.weights[tokens[added]].amin(dim=1))


@given(data=st.data(), tokens=st.integers(1, 40), experts=st.integers(2, 6), sigmoid=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_token_twice_and_none_of_its_own(data: st.DataObject, tokens: int, experts: int, sigmoid: bool) -> None:
    """Equal and infinite logits too: the earlier of equals, and the same whatever parts the tokens are gone over in."""
    values = st.sampled_from([-2.0, 0.0, 0.5, 3.0, float("-inf")])
    rows = data.draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    logits = torch.tensor(rows)
    logits[:, 0] = 1.0  # so that a softmax is one
    own = torch.tensor(sorted(data.draw(st.sets(st.integers(0, tokens - 1)))), dtype=torch.int64)
    need = data.draw(st.integers(0, tokens - len(own)))
    expert = data.draw(st.integers(0, experts - 1))
    at_once, results = balance._ROWS_AT_ONCE, []
    try:
        for balance._ROWS_AT_ONCE in (8192, 7, 1):
            results.append(next_ranked(logits, [expert], [own], need, sigmoid=sigmoid)[:, 0].tolist())
    finally:
        balance._ROWS_AT_ONCE = at_once
    assert results[0] == results[1] == results[2]
    score = (logits if sigmoid else logits.log_softmax(dim=1))[:, expert].tolist()
    others = [t for t in range(tokens) if t not in own.tolist()]
    assert results[0] == sorted(others, key=lambda t: (-score[t], t))[:need]


def test_an_expert_cannot_get_more_tokens_than_there_are(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with torch.inference_mode():
        stream = walked(open_checkpoint(tiny_model("mixtral")), tmp_path)
        positions = tokens_of(stream.chosen, stream.model.shape.experts)
        found = topped_up(stream, positions, [1, 3], 10**6)
    assert list(found) == [1, 3]
    assert all(sorted(tokens.tolist()) == list(range(WINDOWS.numel())) for tokens, _ in found.values())


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral"])
def test_the_logits_are_those_that_observing_keeps(tiny_model: Callable[..., Path], tmp_path: Path, key: str) -> None:
    with torch.inference_mode():
        one = walked(open_checkpoint(tiny_model(key)), tmp_path)
        other = walked(open_checkpoint(tiny_model(key)), tmp_path, observe=True)
        plain = walked(open_checkpoint(tiny_model(key)), tmp_path, logits=False)
    assert one.logits is not None
    assert other.logits is not None
    assert torch.equal(one.logits, other.logits)
    assert [s.residual is None for s in (plain, one, other)] == [True, True, False]
    assert plain.logits is None
    assert torch.equal(one.hidden, plain.hidden)


def layer_weights(folder: Path, layer: int) -> dict[str, Tensor]:
    return {name: t for name, t in tiny_models.load_tensors(folder).items() if f"layers.{layer}." in name}


@pytest.mark.parametrize("power", [0, 1])
def test_only_experts_with_too_few_tokens_are_solved_otherwise(
    tiny_model: Callable[..., Path], tmp_path: Path, power: int
) -> None:
    """Layer 0 of Mixtral, whose inputs are the same in both runs."""
    folder = tiny_model("mixtral")
    model = StreamedModel(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        stream = open_stream(model, WINDOWS, Scratch(tmp_path, LIMITS.memory_bytes), LIMITS, observe=False)
        model.load_layer(0)
        first_step(stream, 0)
        own = [len(tokens) for tokens, _ in tokens_of(stream.chosen, model.shape.experts)]
    least = sorted(own)[len(own) // 2]
    results = {}
    for name, count in (("plain", 0), ("balanced", least)):
        hessian = HessianOptions(weight_power=power, least_tokens=count)
        results[name] = quantized_folder(folder, WINDOWS, tmp_path / name, hessian=hessian)
    assert results["plain"]["experts_without_tokens"] == results["balanced"]["experts_without_tokens"]
    before, after = (layer_weights(tmp_path / name, 0) for name in ("plain", "balanced"))
    assert before.keys() == after.keys()
    differ = {name.split(".experts.")[1].split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert 0 < len(differ) < len(own)
    assert differ == {str(expert) for expert, count in enumerate(own) if count < least}


def test_a_least_number_that_all_experts_have_changes_no_byte(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    windows = tiny_models.windows(256, count=12, length=24)
    for name, count in (("plain", 0), ("one", 1)):
        hessian = HessianOptions(least_tokens=count)
        result = quantized_folder(tiny_model("mixtral"), windows, tmp_path / name, hessian=hessian)
        assert result["experts_without_tokens"] == {}
    assert content(tmp_path / "plain") == content(tmp_path / "one")


def test_the_estimate_counts_the_logits_that_are_kept(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("deepseek_v3"))
    work = Workload(tokens=WINDOWS.numel(), window=WINDOWS.shape[1], device=CPU, dtype=torch.float32)
    figures, kept = figures_of(checkpoint), []
    for balanced in (False, True):
        found = estimate_quantize(checkpoint, figures, 16, G16, work, None, balanced=balanced)
        kept.append(found.memory["token buffers"])
    with torch.inference_mode():
        logits = walked(checkpoint, tmp_path).logits
    assert logits is not None
    assert kept[1] - kept[0] == logits.numel() * 4


def test_a_negative_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="need least_tokens >= 0"):
        HessianOptions(least_tokens=-1)


@pytest.mark.parametrize("asymmetry", [0.0, 1.0])
@pytest.mark.parametrize("include", [(), ALL_BUT_HEAD], ids=["experts", "everything"])
def test_a_run_in_sittings_ends_with_the_bytes_of_one(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asymmetry: float,
    include: tuple[Include, ...],
) -> None:
    """Of a pruned model; also where all buffers are in files, and one expert is solved at a time."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 6 * 7680 + 1)  # a sitting may end within a layer
    folder, hessian = tiny_model("deepseek_v3"), HessianOptions(least_tokens=60, asymmetry=asymmetry)
    common = {"keep": keep_of(open_checkpoint(folder), 8), "include": include, "scheme": G16, "hessian": hessian}
    quantized_folder(folder, WINDOWS, tmp_path / "whole", **common)  # type: ignore[arg-type]
    for _ in range(12):
        result = quantized_folder(folder, WINDOWS, tmp_path / "parts", max_pieces=1, **common)  # type: ignore[arg-type]
        if result["finished"]:
            break
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    limits = Limits(memory_bytes=1, batch_windows=LIMITS.batch_windows)
    quantized_folder(folder, WINDOWS, tmp_path / "files", limits=limits, **common)  # type: ignore[arg-type]
    found, expected = (tiny_models.load_tensors(tmp_path / name) for name in ("files", "whole"))
    same = [torch.equal(found[name], tensor) for name, tensor in expected.items() if "weight_packed" in name]
    assert sum(same) > 0.9 * len(same)  # batches of other sizes round differently in the last bits
