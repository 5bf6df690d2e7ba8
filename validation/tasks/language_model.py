"""A `TextModel` as lm-evaluation-harness's `LM`."""

from collections.abc import Sequence
from typing import Any

from moepress.errors import UsageError
from moepress.validation.tasks.harness import DEFAULT_ROOM
from moepress.validation.tasks.text_model import TextModel, Writing


def language_model(model: TextModel) -> Any:
    """The model as an `LM`; lm-eval is imported here, so that the class can be one of its own."""
    from lm_eval.api.model import LM

    class AskedModel(LM):  # type: ignore[misc]  # lm-eval has no types, and may not be there
        """What lm-eval asks, handed on."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return model.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return model.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return model.write([(request.args[0], _writing(request.args[1])) for request in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return model.chat(chat_history, opened=add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            return model.label

    return AskedModel()


def _writing(wanted: dict[str, Any]) -> Writing:
    """A task's generation_kwargs, as lm-eval's own models read them.

    Raises:
        UsageError: answers are to be drawn.
    """
    if wanted.get("do_sample") or float(wanted.get("temperature") or 0) > 0:
        raise UsageError("A task asks for answers that are drawn; moepress compares the likeliest ones: leave it out.")
    until = wanted.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    room = next((int(wanted[name]) for name in names if wanted.get(name) is not None), DEFAULT_ROOM)
    return Writing(until=tuple([until] if isinstance(until, str) else until), room=room)
