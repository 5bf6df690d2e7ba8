"""Which tokens count more: what ends answers and reasoning, and what lies around it."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from moepress.calibration.answer_ends import AROUND, end_marks, end_notes, importance, near_ends
from moepress.calibration.hessian import MOST_END_WEIGHT, HessianOptions

END = 3


def tokenizer(*added: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "<eos>": END}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>")
    found.add_tokens(list(added))
    return found


@pytest.mark.parametrize(
    "text",
    [
        *("</think>", "[/THINK]", "</seed:think>", "<|end|>", "</thinking>", "<｜end▁of▁thinking｜>"),
        *("<|end_of_thought|>", "</reasoning>", "<|/think|>"),
    ],
)
def test_a_token_that_ends_reasoning_is_found_beside_those_that_end_an_answer(text: str) -> None:
    own = tokenizer("<think>", text)
    assert end_marks(own, {END}) == (END, own.convert_tokens_to_ids(text))


@pytest.mark.parametrize(
    "text", ["<think>", "<|thinking|>", "<|end_of_text_part|>", "</tool_call>", "think", "<|im_start|>"]
)
def test_other_tokens_are_not_taken_for_such_ends(text: str) -> None:
    assert end_marks(tokenizer(text), {END}) == (END,)
    assert end_marks(tokenizer(text), ()) == ()


def by_hand(windows: list[list[int]], marks: set[int]) -> list[list[bool]]:
    return [
        [
            any(abs(here - there) <= AROUND and token in marks for there, token in enumerate(row))
            for here in range(len(row))
        ]
        for row in windows
    ]


@pytest.mark.parametrize("length", [1, 3, AROUND, AROUND + 1, 40])
def test_tokens_near_an_end_are_those_at_most_so_far_from_it_in_their_window(length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    windows = torch.randint(0, 60, (50, length), generator=draw)
    found = near_ends(windows, (END, 7))
    assert found.tolist() == by_hand(windows.tolist(), {END, 7})
    assert bool(found.any())


def test_what_is_near_counts_so_many_times_and_the_mean_is_one() -> None:
    windows = torch.ones(3, 100, dtype=torch.int64)
    windows[1, 50] = END
    found = importance(windows, HessianOptions(end_weight=4.0, end_marks=(END,)))
    assert found is not None
    near = near_ends(windows, (END,)).flatten()
    assert int(near.sum()) == 2 * AROUND + 1
    assert float(found.mean()) == pytest.approx(1)
    torch.testing.assert_close(found[near] / found[~near][0], torch.full((2 * AROUND + 1,), 4.0))
    assert len(set(found[~near].tolist())) == 1


def test_without_a_weight_or_an_end_all_count_alike() -> None:
    windows = torch.ones(3, 100, dtype=torch.int64)
    assert importance(windows, HessianOptions(end_weight=4.0, end_marks=(END,))) is None
    assert importance(windows, HessianOptions(end_weight=4.0)) is None
    assert importance(windows, HessianOptions(end_marks=(1,))) is None


def test_a_note_says_how_many_tokens_that_are() -> None:
    windows = torch.ones(3, 100, dtype=torch.int64)
    options = HessianOptions(end_weight=2.5, end_marks=(END,))
    (note,) = end_notes(windows, options)
    assert "no token that ends" in note
    windows[0, 0] = windows[1, 50] = END
    (note,) = end_notes(windows, options)
    assert note.startswith(f"{3 * AROUND + 2} of 300 tokens, around 2 ends of answers or reasoning, count 2.5 times")
    assert end_notes(windows, HessianOptions()) == ()


@pytest.mark.parametrize("given", [0.5, 0.0, -1.0, MOST_END_WEIGHT + 1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(given: float) -> None:
    with pytest.raises(ValueError, match="end_weight"):
        HessianOptions(end_weight=given)
