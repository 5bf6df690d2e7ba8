"""Many prompts at once give the tokens of one at a time."""

from typing import Any

import every_family
import pytest
import torch

from moepress.errors import InvalidInputError
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import Checkpoint
from moepress.validation.quality.batched import seeded, write_batched
from moepress.validation.quality.decoding import Sampling, TorchDecoder, generate

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def one_by_one(
    model: Any, prompts: list[list[int]], room: int, stop: frozenset[int], sampling: Sampling
) -> list[list[int]]:
    return [
        list(generate(TorchDecoder(model), ids, max_new_tokens=room, stop=stop, sampling=seeded(sampling, number)))
        for number, ids in enumerate(prompts)
    ]


def some_prompts(vocabulary: int, count: int = 7) -> list[list[int]]:
    """Of 1 to 13 tokens, the longest not last."""
    drawn = torch.Generator().manual_seed(5)
    lengths = [5, 13, 1, 8, 8, 2, 11][:count]
    return [torch.randint(3, vocabulary, (length,), generator=drawn).tolist() for length in lengths]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=3)], ids=["greedy", "drawn"])
def test_the_demo_writes_the_same_alone_and_together(demo: Checkpoint, sampling: Sampling) -> None:
    model, prompts = load_dense(demo, **CPU), some_prompts(2048)
    stop = frozenset({1, 30, 31, 32, 33, 34, 35})  # some answers end early, by one of several end tokens
    alone = one_by_one(model, prompts, 16, stop, sampling)
    done = []
    together = write_batched(
        model, prompts, max_new_tokens=16, stop=stop, sampling=sampling, together=4, advance=done.append
    )
    assert together == alone
    assert done == [4, 3]
    assert write_batched(model, prompts, max_new_tokens=16, stop=stop, sampling=sampling) == alone
    if sampling.temperature:
        assert together != one_by_one(model, prompts, 16, stop, Sampling())


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_next", "minimax"])
def test_other_families_do_too(model_type: str) -> None:
    """Sinks, and layers that remember a state; those of MiniMax do not pass over padding."""
    model = every_family.build(model_type)
    prompts = some_prompts(model.config.get_text_config().vocab_size, 5)
    together = write_batched(model, prompts, max_new_tokens=8, stop=frozenset(), sampling=Sampling())
    assert together == one_by_one(model, prompts, 8, frozenset(), Sampling())
    assert {len(answer) for answer in together} == {8}


def test_numbers_that_are_none_are_refused(demo: Checkpoint) -> None:
    model = load_dense(demo, **CPU)
    model.lm_head.weight.data[5] = torch.nan
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(InvalidInputError, match="gives NaN"):
            write_batched(model, [[4, 5]], max_new_tokens=4, stop=frozenset(), sampling=sampling)
