"""What a model thinks before it answers, told apart from the answer by the marks that models put around it."""

from collections.abc import Iterable

MARKS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM-4.5, MiniMax-M2 and most others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss (harmony)
)
"""Begin and end of reasoning."""
_FINAL = "<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"


def split_reasoning(text: str, prompt: str = "", special: Iterable[str] = ()) -> tuple[str | None, str]:
    """Reasoning (None where there is none) and the answer, which is empty where it was cut off before.

    Args:
        text: what the model wrote, with its special tokens.
        prompt: what it was given; a chat template may end it with the mark that begins reasoning.
        special: special tokens, which are taken out.
    """
    for begin, end in MARKS:
        opened = text.lstrip().startswith(begin) or prompt.rstrip().endswith(begin)
        if not opened and end not in text.partition(begin)[0]:
            continue
        if not opened and end not in (mark[1] for mark in MARKS[:3]):
            continue  # the end of harmony's reasoning is that of any message
        head, _, tail = text.partition(end)
        return _plain(head.lstrip().removeprefix(begin), special), _plain(tail, special)
    return None, _plain(text, special)


def _plain(text: str, special: Iterable[str]) -> str:
    for mark in (*_FINAL, *sorted(special, key=len, reverse=True)):
        text = text.replace(mark, "")
    return text.strip("\n")
