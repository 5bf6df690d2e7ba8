"""`--end-weight`: tokens around the ends of reasoning and of answers count more than others in Hessians.

A pressed model that no longer ends its reasoning or its answer loops. Such ends are one token in many hundreds, so that
a mean over all tokens hardly sees what their logits hang on: the tokens around them get a weight W, all others 1.

Letters: N windows, T tokens of a window.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moepress.calibration.hessian import HessianOptions
from moepress.calibration.reasoning import MARKS

AROUND = 8
"""So many tokens before an end and behind it have its weight; what the token before it gives predicts it."""
_OPENS, _CLOSES = r"[<\[|｜]+", r"[>\]|｜]+"  # DeepSeek's have the wide bar
_THOUGHT = r"(?:think|thinking|thought|thoughts|reason|reasoning)"
_END_OF_THOUGHT = re.compile(
    rf"{_OPENS}(?:/(?:\w+:)?{_THOUGHT}|end[_▁ ](?:of[_▁ ])?{_THOUGHT}){_CLOSES}", re.IGNORECASE
)


def end_marks(tokenizer: Any, stop: Iterable[int]) -> tuple[int, ...]:
    """The tokens that end an answer, and those of the tokenizer's own that end reasoning, ascending.

    Args:
        tokenizer: of transformers.
        stop: end-of-text tokens, as a model's folder states them.
    """
    added: dict[str, int] = tokenizer.get_added_vocab()
    known = {end for _, end in MARKS}
    thought = (number for text, number in added.items() if text in known or _END_OF_THOUGHT.fullmatch(text))
    return tuple(sorted({*stop, *thought}))


def near_ends(windows_NT: Tensor, marks: Iterable[int]) -> Tensor:
    """Which tokens are ends or at most `AROUND` tokens from one in their window: bool [N, T]."""
    ends_NT = torch.isin(windows_NT, torch.tensor(sorted(marks), dtype=windows_NT.dtype))
    near_NT = ends_NT.clone()
    for step in range(1, min(AROUND, windows_NT.shape[1] - 1) + 1):
        near_NT[:, step:] |= ends_NT[:, :-step]
        near_NT[:, :-step] |= ends_NT[:, step:]
    return near_NT


def importance(windows_NT: Tensor, options: HessianOptions) -> Tensor | None:
    """How much each token counts in Hessians, with a mean of 1 over all of them.

    Args:
        windows_NT: int64, all windows of the text.
        options: its weight and its marks.

    Returns:
        fp32 [N * T]; None where all count alike, for want of a weight or of an end.
    """
    if options.end_weight == 1 or not options.end_marks:
        return None
    near_T = near_ends(windows_NT, options.end_marks).flatten()
    if not bool(near_T.any()):
        return None
    weights_T = torch.where(near_T, options.end_weight, 1.0)
    return weights_T / weights_T.double().mean().float()


def end_notes(windows_NT: Tensor, options: HessianOptions) -> tuple[str, ...]:
    """What is to be said of the ends in the text; nothing without a weight."""
    if options.end_weight == 1:
        return ()
    near = int(near_ends(windows_NT, options.end_marks).sum())
    if not near:
        return ("the text has no token that ends an answer or reasoning, so --end-weight changed nothing",)
    ends = int(torch.isin(windows_NT, torch.tensor(options.end_marks)).sum())
    text = f"{near:,} of {windows_NT.numel():,} tokens, around {ends:,} ends of answers or reasoning,"
    return (f"{text} count {options.end_weight:g} times in the Hessians",)
