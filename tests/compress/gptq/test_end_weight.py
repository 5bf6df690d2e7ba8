"""`--end-weight`: Hessians in which tokens near ends of answers count more, held against sums by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from stage_runs import CPU, LIMITS, content, quantized_folder
from torch import Tensor

from moepress.calibration.answer_ends import importance, near_ends
from moepress.calibration.hessian import HessianOptions, hessian_for
from moepress.compress.gptq import counting
from moepress.compress.gptq import layer as gptq_layer
from moepress.compress.gptq.coded import Coded
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.linears import _captured_moments, _moments
from moepress.compress.gptq.moments import (
    Inputs,
    down_moments,
    input_moments,
    originals_of,
    picked_tokens,
    pooled_hessian,
    pooled_inputs,
    pooled_rows,
    token_weights,
)
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.forward.streamed import StreamedModel, tokens_of
from moepress.models.forward.walk import Scratch, Stream, add_experts, first_step, open_stream
from moepress.models.storage.checkpoint import open_checkpoint

WINDOWS, END, TIMES = tiny_models.windows(256, count=6, length=40), 255, 3.0
WINDOWS[WINDOWS == END] = 0
WINDOWS[1, 20] = WINDOWS[4, 0] = WINDOWS[4, 39] = END
OPTIONS = HessianOptions(end_weight=TIMES, end_marks=(END,), pooled_tokens=32, shrinkage_tokens=40.0)
COUNTS = torch.where(near_ends(WINDOWS, (END,)).flatten(), TIMES, 1.0).double()
"""How often each token counts: whole numbers, without the mean."""
LAYER = 1


def stream_at(folder: Path, scratch: Path, *, through: bool) -> Stream:
    """A stream before a layer, or with `through` behind its first step."""
    model = StreamedModel(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    stream = open_stream(model, WINDOWS, Scratch(scratch, LIMITS.memory_bytes), LIMITS, observe=False)
    stream.importance = importance(WINDOWS, OPTIONS)
    for number in range(LAYER + through):
        model.load_layer(number)
        if first_step(stream, number) and number < LAYER:
            add_experts(stream, number)
    model.load_layer(LAYER)
    return stream


def summed(left: Tensor, right: Tensor, counts: Sequence[float]) -> Tensor:
    """Mean of outer products of tokens that count so often: each is added so many times, one after the other."""
    total, mass = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64), 0
    for one, other, count in zip(left.double(), right.double(), counts, strict=True):
        for _ in range(int(count)):
            total, mass = total + torch.outer(one, other), mass + 1
    return total / max(mass, 1)


def near(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("key", ["deepseek_v3", "qwen3_moe"])
def test_hessians_of_experts_are_those_of_tokens_that_come_several_times(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    with torch.inference_mode():
        stream = stream_at(tiny_model(key), tmp_path, through=True)
        noise = torch.randn(stream.inputs.shape, generator=torch.Generator().manual_seed(0))
        originals = originals_of(stream, replace(stream, inputs=stream.inputs + 0.1 * noise), OPTIONS)
        inputs, others = stream.inputs, originals.stream.inputs
        pooled = summed(inputs, inputs, COUNTS.tolist())
        near(pooled_hessian(stream), pooled)
        pooled_cross = summed(others - inputs, inputs, COUNTS.tolist())
        near(originals.pooled, pooled_cross)
        given = Inputs(stream=stream, originals=originals, options=OPTIONS)
        sample, gating = pooled_inputs(stream, OPTIONS), stream.model.gating(LAYER)
        sampled = pooled_rows(stream, OPTIONS)
        seen = 0
        for expert, position in enumerate(tokens_of(stream.chosen, stream.model.shape.experts)):
            tokens = position[0]
            share = len(tokens) / (len(tokens) + OPTIONS.shrinkage_tokens)
            counts = COUNTS[tokens].tolist()
            seen += len({*counts}) > 1
            moments = input_moments(given, position, pooled_hessian(stream))
            assert moments.cross is not None
            near(moments.hessian, share * summed(inputs[tokens], inputs[tokens], counts) + (1 - share) * pooled)
            own_cross = summed(others[tokens] - inputs[tokens], inputs[tokens], counts)
            near(moments.cross, share * own_cross + (1 - share) * pooled_cross)
            weights = stream.model.read_expert(LAYER, expert, torch.float32)
            coded = tuple(None if m is None else as_codes(m) for m in (weights.gate, weights.up))
            given_up = coded[0], as_codes(weights.up)
            down, _ = down_moments(given, LAYER, position, sample, given_up, weights, chose=len(tokens), keep=False)
            few = sampled[picked_tokens(len(sample), len(tokens))]
            middle = gating.intermediate(weights, inputs)
            expected = share * summed(middle[tokens], middle[tokens], counts)
            expected += (1 - share) * summed(middle[few], middle[few], COUNTS[few].tolist())
            near(down.hessian, expected)
        assert seen, "no expert has both kinds of tokens"


def as_codes(weight: Tensor) -> Coded:
    """Any matrix as codes 1 and a scale per element, so that its dense form is itself."""
    return Coded(codes=torch.ones(weight.shape, dtype=torch.int8), scales=weight)


def test_combine_weights_are_multiplied_by_it(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with torch.inference_mode():
        stream = stream_at(tiny_model("mixtral"), tmp_path, through=True)
        position = tokens_of(stream.chosen, stream.model.shape.experts)[0]
        found = token_weights(stream, position, replace(OPTIONS, weight_power=2))
        assert found is not None
        assert stream.importance is not None
        expected = [stream.weights[t, s] ** 2 * stream.importance[t] for t, s in zip(*position, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected))
        stream.importance = None
        assert token_weights(stream, position, OPTIONS) is None


@pytest.mark.parametrize("key", ["deepseek_v3", "qwen3_moe"])
def test_hessians_of_linears_are_those_of_tokens_that_come_several_times(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    """Watched in one pass over all windows; asked for in batches of four of the six."""
    with torch.inference_mode():
        stream = stream_at(tiny_model(key), tmp_path, through=False)
        layer = stream.model.layer(LAYER)
        linears = [n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear) and "experts" not in n]
        assert len(linears) > 2
        caught: dict[str, Tensor] = {}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _module, given, name=name: caught.update({name: given[0].flatten(0, -2)})
            )
            for name in linears
        ]
        stream.model.run_layer(LAYER, stream.before(slice(None)), stream.windows)
        for hook in hooks:
            hook.remove()
        assert len(stream.hidden) > LIMITS.batch_windows
        for name, inputs in caught.items():
            found = _captured_moments(stream, None, LAYER, name).over(stream.tokens).hessian
            near(found, summed(inputs, inputs, COUNTS.tolist()))


def test_rows_of_a_token_that_has_several_count_alike_and_others_are_not_guessed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with torch.inference_mode():
        stream = stream_at(tiny_model("qwen3_moe"), tmp_path, through=False)
        assert stream.importance is not None
        own = stream.importance[2 * 40 : 4 * 40]
        part, draw = slice(2, 4), torch.Generator().manual_seed(0)
        for shape in ((2, 40, 8), (80, 8)):
            found = counting.of_rows(stream, part, torch.zeros(shape))
            assert found is not None
            assert torch.equal(found, own)
        found = counting.of_rows(stream, part, torch.zeros(2, 3, 40, 8))  # heads before tokens
        assert found is not None
        assert torch.equal(found.view(2, 3, 40), own.view(2, 1, 40).expand(-1, 3, -1))
        heads = torch.randn(2, 40, 3, 8, generator=draw)
        found = counting.of_rows(stream, part, heads)
        assert found is not None
        assert torch.equal(found.view(80, 3), own[:, None].expand(-1, 3))
        expected = torch.einsum("tsi,tsj,t->ij", heads.flatten(0, 1), heads.flatten(0, 1), own)
        torch.testing.assert_close(_moments(stream, part, [heads]).hessian, expected)
        assert counting.of_rows(stream, part, torch.zeros(2, 10, 8)) is None  # four tokens made one
        assert counting.of_rows(stream, part, torch.zeros(2, 40, 40, 8)) is None
        assert counting.of_rows(stream, slice(4, 8), torch.zeros(2, 40, 8)) is not None  # the last batch is short


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("match", ["own", "original"])
def test_every_matrix_changes_and_one_pass_that_waits_gives_the_bytes_of_several(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match: str
) -> None:
    folder = tiny_model("deepseek_v3")
    plain = replace(hessian_for(match, 4, {}), end_marks=(END,))
    weighed = replace(plain, end_weight=TIMES)
    options = {"include": tuple(Include), "scheme": Scheme(bits=4, group_size=16)}
    quantized_folder(folder, WINDOWS, tmp_path / "plain", hessian=plain, **options)
    quantized_folder(folder, WINDOWS, tmp_path / "weighed", hessian=weighed, **options)
    monkeypatch.setattr(gptq_layer, "steps_fit", lambda _stream, _reference: False)
    quantized_folder(folder, WINDOWS, tmp_path / "again", hessian=weighed, **options)
    assert shards(tmp_path / "weighed") == shards(tmp_path / "again")
    before, after = (tiny_models.load_tensors(tmp_path / name) for name in ("plain", "weighed"))
    codes = [name for name in before if name.endswith("weight_packed")]
    same = [name for name in codes if torch.equal(before[name], after[name])]
    assert len(same) < len(codes) / 4, same
    assert any("lm_head" in name for name in set(codes) - set(same))


def test_text_without_ends_and_a_weight_of_one_change_no_byte(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, marks = tiny_model("qwen3_moe"), {"include": tuple(Include), "scheme": Scheme(bits=4, group_size=16)}
    for name, options in {
        "default": HessianOptions(),
        "no ends": HessianOptions(end_weight=TIMES, end_marks=(300,)),
        "one": HessianOptions(end_marks=(END,)),
    }.items():
        quantized_folder(folder, WINDOWS, tmp_path / name, hessian=options, **marks)
    assert shards(tmp_path / "default") == shards(tmp_path / "no ends") == shards(tmp_path / "one")
