"""Projected tokens per second, held against figures that were published for real GPUs."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from full_models import full_model
from hypothesis import given
from hypothesis import strategies as st

from moepress.compress.estimates.figures import figures_of
from moepress.models.families.family import Part, Shape
from moepress.models.forward.inventory import Weight, cache_bytes
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.validation.speed.projection import FORMULAS, Load, load_of, project
from moepress.validation.speed.targets import Target, Verdict, fit, target_of

Q4_0, Q6_K, Q8_0, MXFP4 = 4.5, 6.5625, 8.5, 4.25  # bits per weight of llama.cpp's formats


@dataclass(frozen=True, kw_only=True)
class Published:
    """Tokens per second that were measured with llama-bench."""

    gpu: str
    pp512: float | None = None
    tg128: float
    source: str


QWEN3 = Published(gpu="rtx-4090", tg128=205.87, source="llama.cpp pull request 15631, Q4_0, micro-batch 1")
V2_LITE = Published(
    gpu="rtx-3090", tg128=180.53, pp512=4260.97, source="llama.cpp pull request 15525, Q4_0, micro-batches 1 and 512"
)
GPT_OSS = Published(gpu="rtx-4090", tg128=173.33, source="llama.cpp pull request 16649, MXFP4, tg128")


def published_load(name: str, folder: Path) -> Load:
    """A model as llama.cpp's Q4_0 files hold it: the output matrix in Q6_K, all others in Q4_0."""
    checkpoint = open_checkpoint(full_model(name, folder))
    parts = {
        part: Weight(parameters=w.parameters, bytes=round(w.parameters * (Q6_K if part is Part.LM_HEAD else Q4_0) / 8))
        for part, w in figures_of(checkpoint).parts.items()
    }
    return load_of(parts, checkpoint.shape, cache_bytes(checkpoint.config, 1))


def gpt_oss_load() -> Load:
    """gpt-oss-20b, which is no family of ours: 24 layers of 2880, 32 experts of 2880, top-4, 64 heads of 64, 8 keys."""
    experts, attention, head = 24 * 32 * 3 * 2880 * 2880, 24 * 2 * 2880 * (64 + 8) * 64, 201_088 * 2880
    parts = {
        Part.ROUTED: Weight(parameters=experts, bytes=round(experts * MXFP4 / 8)),
        Part.ATTENTION: Weight(parameters=attention, bytes=round(attention * Q8_0 / 8)),
        Part.LM_HEAD: Weight(parameters=head, bytes=round(head * Q8_0 / 8)),
        Part.EMBEDDINGS: Weight(parameters=head, bytes=round(head * Q8_0 / 8)),
    }
    shape = Shape(
        layers=24,
        hidden=2880,
        experts=32,
        top_k=4,
        expert_width=2880,
        groups=1,
        top_groups=1,
        vocabulary=201_088,
        context=131_072,
    )
    return load_of(parts, shape, 24 * 2 * 8 * 64 * 2)


def check(load: Load, published: Published) -> None:
    found = fit(target_of(published.gpu), load.prefill_bytes, load)
    assert found.tg128 is not None
    assert found.pp512 is not None
    assert found.tg128.low < published.tg128 < found.tg128.high, published.source
    assert found.tg128.high < 2.5 * found.tg128.low, "an interval that holds everything says nothing"
    if published.pp512 is not None:
        assert found.pp512.low < published.pp512 < found.pp512.high, published.source
    assert (found.tg128.kind, found.pp512.kind) == ("projected", "projected")


def test_qwen3_30b_on_an_rtx_4090(tmp_path: Path) -> None:
    check(published_load("Qwen3-30B-A3B", tmp_path / "model"), QWEN3)


def test_deepseek_v2_lite_on_an_rtx_3090(tmp_path: Path) -> None:
    check(published_load("DeepSeek-V2-Lite", tmp_path / "model"), V2_LITE)


def test_gpt_oss_20b_on_an_rtx_4090() -> None:
    check(gpt_oss_load(), GPT_OSS)


def test_the_formulas_in_the_json_are_those_that_are_computed() -> None:
    load = Load(
        layers=10,
        decode_bytes=2 * 10**9,
        prefill_bytes=9 * 10**9,
        flops_per_token=4 * 10**9,
        cache_bytes_per_token=50_000,
    )
    prefill, decode = project(load, bandwidth=500e9, flops=100e12)
    names = {**{name: getattr(load, name) for name in Load.__slots__}, "bandwidth": 500e9, "fp16": 100e12}  # type: ignore[attr-defined]
    for test, interval in (("pp512", prefill), ("tg128", decode)):
        formula, *bounds = FORMULAS[test].split("; ")
        for bound in bounds:
            which, values = bound.split(": ")
            settings = dict(pair.split(" = ") for pair in values.replace(" us", "e-6").split(", "))
            terms = names | {name: float(value) for name, value in settings.items()}
            expected = eval(formula.removeprefix("tokens/s = "), {"__builtins__": {}}, terms)
            assert getattr(interval, which) == pytest.approx(expected)


def test_tied_embeddings_are_read_as_the_head_and_others_are_not() -> None:
    shape = Shape(
        layers=2,
        hidden=8,
        experts=4,
        top_k=1,
        expert_width=8,
        groups=1,
        top_groups=1,
        vocabulary=10,
        context=64,
    )
    parts = {
        Part.ROUTED: Weight(parameters=400, bytes=800),
        Part.EMBEDDINGS: Weight(parameters=80, bytes=160),
        Part.MTP: Weight(parameters=7, bytes=14),
    }
    tied = load_of(parts, shape, 1)
    assert (tied.decode_bytes, tied.prefill_bytes, tied.flops_per_token) == (360, 960, 360)
    untied = load_of(parts | {Part.LM_HEAD: Weight(parameters=80, bytes=40)}, shape, 1)
    assert (untied.decode_bytes, untied.prefill_bytes, untied.flops_per_token) == (240, 840, 360)


@given(
    layers=st.integers(1, 100), read=st.integers(1, 10**12), more=st.integers(0, 10**12), work=st.integers(1, 10**12)
)
def test_intervals_are_ordered_and_more_work_is_never_faster(layers: int, read: int, more: int, work: int) -> None:
    def load(extra: int) -> Load:
        return Load(
            layers=layers,
            decode_bytes=read + extra,
            prefill_bytes=2 * read + extra,
            flops_per_token=work + extra,
            cache_bytes_per_token=0,
        )

    plain, loaded = (project(load(extra), bandwidth=1e12, flops=1e14) for extra in (0, more))
    for small, large in zip(plain, loaded, strict=True):
        assert 0 < small.low < small.high
        assert large.low <= small.low
        assert large.high <= small.high


def test_what_does_not_fit_has_no_speed() -> None:
    load = Load(layers=1, decode_bytes=1, prefill_bytes=1, flops_per_token=1, cache_bytes_per_token=1)
    card = Target(id="a", name="A", kind="gaming", memory_gib=8, bandwidth_gb_per_second=100, fp16_tflops=10)
    found = fit(card, 9 << 30, load)
    assert (found.verdict, found.pp512, found.tg128) == (Verdict.NO, None, None)
    assert fit(card, 1 << 30).tg128 is None
