"""A model behind OpenAI's completions API, which vLLM, SGLang and llama-server offer, through lm-eval's own class.

Prompts go as token ids, split by the tokenizer of the model's folder. Multiple choice needs the log-probabilities of
the prompt (`echo` with `logprobs`), which not every server gives: it is asked before, for one that leaves them out
would be scored wrong.
"""

import os
from collections.abc import Sequence
from typing import Any

from moepress.errors import MoepressError, UnsupportedError, UsageError
from moepress.runs.text import one_line
from moepress.validation.tasks.names import require_harness

_SECONDS = 30  # for what is asked before the tasks


def served_model(url: str) -> str:
    """The one model that the server at this address has.

    Raises:
        MoepressError: it does not answer.
        UsageError: it has several, or none.
    """
    answer = _asked("GET", f"{url}/models")
    named = [str(one.get("id")) for one in answer.get("data") or [] if isinstance(one, dict) and one.get("id")]
    if len(named) != 1:
        has = " and ".join(named) or "no model"
        raise UsageError(f"The server at {url} has {has}; start it with just the one that is to be asked.")
    return named[0]


def endpoint_model(url: str, tokenizer: Any, *, longest: int) -> Any:
    """An `LM` of lm-eval that asks a server.

    Args:
        url: from `check_endpoint`.
        tokenizer: of transformers, as `read_tokenizer` gives it.
        longest: tokens of a prompt and what follows it; the server needs room for one more.

    Raises:
        MoepressError: the server does not answer.
        UnsupportedError: lm-eval or what it needs for servers is not installed.
    """
    require_harness("--endpoint")
    model = served_model(url)
    from lm_eval.api.registry import get_model

    class AskedServer(get_model("local-completions")):  # type: ignore[misc]  # lm-eval is imported here alone
        """lm-eval's own, which would take log-probabilities that are not there for something else."""

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            if requests:
                require_echo(url, model, [*requests[0][1], *requests[0][2]][-longest:])
            return super()._loglikelihood_tokens(requests, **kwargs)

    try:
        made = AskedServer(
            base_url=f"{url}/completions",
            model=model,
            tokenizer_backend="none",
            max_length=longest + 1,
            add_bos_token=_begins_with_bos(tokenizer),
            max_retries=2,
        )
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"--endpoint needs more of lm-eval ({one_line(error)}).") from error
    # Set here and not made by lm-eval: ours has the ids of the folder's own file, and runs no code of it.
    made.tokenizer, made.tokenizer_backend, made.tokenized_requests = tokenizer, "huggingface", True
    return made


def _begins_with_bos(tokenizer: Any) -> bool:
    return bool(list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id])


def require_echo(url: str, model: str, tokens: Sequence[int]) -> None:
    """Refuse a server that gives no log-probabilities of a prompt.

    Args:
        url: from `check_endpoint`.
        model: from `served_model`.
        tokens: of a prompt.

    Raises:
        UnsupportedError: it gives none, or not one for each token.
    """
    wanted = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    found = _asked("POST", f"{url}/completions", {"model": model, **wanted})
    choices = found.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    given = (first.get("logprobs") or {}).get("token_logprobs") if isinstance(first.get("logprobs"), dict) else None
    if not isinstance(given, list) or len(given) != len(tokens) + 1:
        raise UnsupportedError(
            f"The server at {url} gives no log-probabilities of the prompt (`echo` with `logprobs`), which multiple "
            "choice needs; vLLM gives them. Ask for tasks that let the model write alone, or leave --endpoint out."
        )


def _asked(method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    import requests

    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    try:
        answer = requests.request(method, url, json=body, headers=headers, timeout=_SECONDS)
        answer.raise_for_status()
        found = answer.json()
    except (requests.RequestException, ValueError) as error:
        raise MoepressError(
            f"The server at {url} does not answer as one of OpenAI's API ({one_line(error)}); see that it runs, "
            "and that the address ends with /v1."
        ) from error
    if not isinstance(found, dict):
        raise MoepressError(f"The server at {url} does not answer as one of OpenAI's API; see that it is one.")
    return found
