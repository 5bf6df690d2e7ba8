"""The decoding loop: transformers' tokens when greedy, the exact distribution when drawn, whole characters as text."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_runs import CPU
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moepress.converters.safetensors.artifact import open_source
from moepress.errors import InvalidInputError, UsageError
from moepress.models.forward.dense import load_dense
from moepress.stages.places import model_folder
from moepress.validation.quality.decoding import (
    Decoder,
    Sampling,
    TextStream,
    TorchDecoder,
    check_prompt,
    choose,
    generate,
    probabilities,
    why_stopped,
)

GREEDY = Sampling()
PROMPTS = ([7], [5, 9, 200, 3], [int(n) for n in torch.arange(2, 40)])


def decoder_of(folder: Path) -> TorchDecoder:
    return TorchDecoder(load_dense(open_source(folder), device=CPU, dtype=torch.float32))


def tokens(decoder: Decoder, prompt: Sequence[int], count: int = 24, sampling: Sampling = GREEDY) -> list[int]:
    return list(generate(decoder, prompt, max_new_tokens=count, stop=frozenset({1}), sampling=sampling))


def theirs(model: Any, prompt: Sequence[int], count: int = 24) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_greedy_tokens_are_those_of_transformers(tiny_model: Callable[..., Path], key: str) -> None:
    folder = tiny_model(key)
    reference, model = tiny_models.reference(folder), decoder_of(folder)
    for prompt in PROMPTS:
        assert tokens(TorchDecoder(model._model), prompt) == theirs(reference, prompt)


def test_greedy_text_of_the_demo_is_that_of_transformers() -> None:
    folder = model_folder("demo")
    tokenizer, reference = AutoTokenizer.from_pretrained(folder), tiny_models.reference(folder)
    for text in ("def main():", "Der Berg", "The sum of 3 and 4 is"):
        prompt = tokenizer(text)["input_ids"]
        assert tokens(decoder_of(folder), prompt, 48) == theirs(reference, prompt, 48)


class Table:
    """A `Decoder` of no runtime: the logits of the next token stand in a row of a table, by the last token."""

    def __init__(self, rows: Tensor, context: int = 100) -> None:
        self.rows, self.context, self.vocabulary = rows, context, rows.shape[1]
        self.steps: list[list[list[int]]] = []

    def step(self, tokens_BS: Tensor) -> Tensor:
        assert tokens_BS.dtype == torch.int64
        self.steps.append(tokens_BS.tolist())
        return self.rows[tokens_BS[:, -1]]


def counter(context: int = 100) -> Table:
    """n is followed by n + 1, of 50."""
    return Table(torch.eye(50).roll(1, dims=1), context)


def test_a_decoder_gets_the_prompt_once_and_then_every_token_but_the_last() -> None:
    decoder = counter()
    assert list(generate(decoder, [4, 7], max_new_tokens=3, stop=frozenset(), sampling=GREEDY)) == [8, 9, 10]
    assert decoder.steps == [[[4, 7]], [[8]], [[9]]]


def test_tokens_come_one_by_one() -> None:
    decoder = counter()
    stream = generate(decoder, [0], max_new_tokens=10, stop=frozenset(), sampling=GREEDY)
    assert (next(stream), len(decoder.steps)) == (1, 1)
    assert (next(stream), len(decoder.steps)) == (2, 2)


@pytest.mark.parametrize(
    ("options", "expected", "why"),
    [
        ({"max_new_tokens": 10, "stop": frozenset({6, 40})}, [4, 5, 6], "end"),
        ({"max_new_tokens": 3, "stop": frozenset({6})}, [4, 5, 6], "end"),
        ({"max_new_tokens": 2, "stop": frozenset({6})}, [4, 5], "length"),
        ({"max_new_tokens": 10, "stop": frozenset({3})}, [4, 5, 6, 7, 8], "context"),  # the prompt stops nothing
        ({"max_new_tokens": 5, "stop": frozenset()}, [4, 5, 6, 7, 8], "length"),
    ],
)
def test_it_ends_at_a_stop_token_at_the_limit_or_where_the_context_is_full(
    options: dict[str, Any], expected: list[int], why: str
) -> None:
    found = list(generate(counter(context=8), [1, 2, 3], sampling=GREEDY, **options))
    assert found == expected
    assert why_stopped(found, **options) == why


def test_a_torch_model_can_fill_its_context_to_the_last_place(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("olmoe", max_position_embeddings=16)
    decoder, reference = decoder_of(folder), tiny_models.reference(folder)
    assert (decoder.context, decoder.vocabulary) == (16, 256)
    found = list(generate(decoder, [9, 8, 7], max_new_tokens=99, stop=frozenset(), sampling=GREEDY))
    assert len(found) == 13
    assert found == theirs(reference, [9, 8, 7], 13)


def test_a_prompt_that_leaves_no_room_is_refused_at_once() -> None:
    for prompt, context, words in (([], 8, "is empty"), ([1] * 8, 8, "8 tokens"), ([1] * 9, 8, "has room for 8")):
        decoder = counter(context)
        with pytest.raises(UsageError, match=words):
            generate(decoder, prompt, max_new_tokens=1, stop=frozenset(), sampling=GREEDY)
        assert decoder.steps == []
    check_prompt([1] * 7, context=8, vocabulary=2)
    with pytest.raises(InvalidInputError, match="token id 2, but the model's vocabulary has 2"):
        check_prompt([2], context=8, vocabulary=2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "--top-p 1.1"),
        ({"temperature": 1.0, "top_p": math.nan}, "--top-p nan"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 1 << 63}, "--seed 9223372036854775808"),
        ({"top_k": 5}, "need sampling"),
        ({"top_p": 0.5}, "need sampling"),
    ],
)
def test_impossible_sampling_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampling(**values)


def test_greedy_takes_the_first_of_the_likeliest_and_leaves_chance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert choose(torch.tensor([0.0, 3.0, -1.0, 3.0]), GREEDY, generator) == 1
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        with pytest.raises(InvalidInputError, match="NaN or Inf"):
            choose(torch.tensor([0.0, value, 1.0]), sampling, torch.Generator())


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, top_k=3),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.3, top_k=5, top_p=0.8),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_p=1e-9),
]


def slow_probabilities(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """By the definition, in Python's own numbers: keep the likeliest k, then the fewest that reach top_p."""
    weights = {n: math.exp(value / sampling.temperature) for n, value in enumerate(logits)}
    order = sorted(weights, key=lambda n: -weights[n])[: sampling.top_k]
    total, kept, reached = sum(weights[n] for n in order), list[int](), 0.0
    for n in order:
        if reached >= (sampling.top_p or 1.0):
            break
        kept.append(n)
        reached += weights[n] / total
    total = sum(weights[n] for n in kept)
    return [weights[n] / total if n in kept else 0.0 for n in range(len(logits))]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_tokens_are_drawn_with_their_exact_probabilities(sampling: Sampling) -> None:
    logits = [0.3, 2.0, -1.0, 1.1, 0.0, 1.9, -3.0, 0.7]
    expected = slow_probabilities(logits, sampling)
    assert probabilities(torch.tensor(logits), sampling).tolist() == pytest.approx(expected, abs=1e-7)
    draws, generator = 20_000, torch.Generator().manual_seed(3)
    counts = [0] * len(logits)
    for _ in range(draws):
        counts[choose(torch.tensor(logits), sampling, generator)] += 1
    assert all(count == 0 for count, share in zip(counts, expected, strict=True) if share == 0)
    terms = [(c - draws * p) ** 2 / (draws * p) for c, p in zip(counts, expected, strict=True) if p]
    freedom = len(terms) - 1
    assert sum(terms) <= freedom + 4 * math.sqrt(2 * freedom)  # chi-square: its mean, and four deviations


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 1.0),
)
def test_the_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    other = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        other = TopKLogitsWarper(top_k)(None, other)
    if top_p is not None and top_p < 1:
        other = TopPLogitsWarper(top_p)(None, other)
    ours = probabilities(logits[0], Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(ours, other[0].softmax(0), rtol=1e-9, atol=1e-12)


def test_a_temperature_near_zero_is_greedy() -> None:
    sampling = Sampling(temperature=5e-324)
    assert probabilities(torch.tensor([1.0, 2.0, 1.9]), sampling).tolist() == [0.0, 1.0, 0.0]


def test_a_seed_gives_the_same_tokens_again_and_another_one_others(tiny_model: Callable[..., Path]) -> None:
    model = decoder_of(tiny_model("mixtral"))._model

    def drawn(seed: int) -> list[int]:
        return tokens(TorchDecoder(model), [3, 4], sampling=Sampling(temperature=1.5, top_k=50, seed=seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def byte_fallback() -> Any:
    """As in Mixtral and DeepSeek-V2's kind: words with a mark for the space, bytes where there is no word."""
    vocabulary = {f"<0x{n:02X}>": n for n in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "b": 259, "<unk>": 260}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZERS = {"byte level": lambda: AutoTokenizer.from_pretrained(model_folder("demo")), "fallback": byte_fallback}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@settings(deadline=None, max_examples=100)
@given(prompt=st.sampled_from(["", "ab", "a é"]), text=st.text("ab é€漢😀\u0301\n", max_size=12))
def test_text_comes_in_whole_characters_and_none_is_lost(tokenizer: Any, prompt: str, text: str) -> None:
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, before)
    pieces = [stream.push(token) for token in new]
    assert stream.flush() == ""  # text is never held back longer than it must be
    whole = tokenizer.decode([*before, *new])
    assert "".join(pieces) == whole[len(tokenizer.decode(before)) :]
    assert "\ufffd" not in "".join(pieces)


def test_a_space_before_the_first_new_word_is_kept() -> None:
    tokenizer = byte_fallback()
    assert TextStream(tokenizer, [257]).push(258) == " a"
    assert TextStream(tokenizer).push(258) == "a"


def test_bytes_that_are_no_text_come_at_the_end(tokenizer: Any) -> None:
    start = tokenizer("漢", add_special_tokens=False)["input_ids"][-1]  # the last byte, without the first two
    stream = TextStream(tokenizer)
    letter = tokenizer("b", add_special_tokens=False)["input_ids"][-1]
    assert stream.push(letter).strip() == "b"
    assert stream.push(start) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens_are_no_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("demo"))
    stream = TextStream(tokenizer, [0])
    assert [stream.push(token) for token in (0, 1, 2)] == ["", "", ""]
    assert stream.flush() == ""
