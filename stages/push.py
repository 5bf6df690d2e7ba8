"""`--push`: what was made, uploaded to the Hugging Face hub once it is whole.

A push that can not succeed is refused before any work. One that fails afterwards leaves the output as it is, and says
how to repeat the upload alone.
"""

import re
import shlex
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from moepress import __version__
from moepress.errors import MoepressError, UsageError
from moepress.hub.snapshot import hub_model, library_bars, library_errors, reason_of
from moepress.runs.files import JOURNAL, LOCK, TEMPORARY, write_atomically
from moepress.runs.progress import note
from moepress.stages.places import model_folder
from moepress.validation.report.model_card import CARD_NAME, plain_card

# Of a model that was in the repository before: beside the new one's, loaders would take them for its own.
_STALE = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json|onnx|data)|(quantize|genai)_config\.json")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Where to.

    Attributes:
        repo: owner/name on the hub.
        private: of a repository that has to be made.
    """

    repo: str
    private: bool = False

    def command(self, folder: Path) -> str:
        """What uploads the folder without moepress."""
        return shlex.join(["hf", "upload", self.repo, str(folder), *(["--private"] if self.private else [])])


def check_push(repo: str | None, *, private: bool) -> Push | None:
    """Refuse a push that can not succeed, as far as the hub tells: the name, the token, what the token may do.

    Args:
        repo: what --push says, None without it.
        private: what --private says.

    Raises:
        UsageError: with what to do instead.
        MoepressError: the hub cannot be asked.
    """
    if repo is None:
        if private:
            raise UsageError("--private goes with --push only.")
        return None
    model = hub_model(repo)
    if model is None or model.revision is not None:
        raise UsageError(f"--push {repo} is not of the form OWNER/NAME.")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UsageError(f"--push {repo} needs a token of the hub, and there is none; {_LOG_IN}.")
    try:
        person = HfApi().whoami()
    except library_errors() as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise UsageError(f"--push {repo}: the hub does not take this machine's token; {_LOG_IN}.") from error
        if status is None:
            raise MoepressError(
                f"--push {repo}: the hub can not be asked ({reason_of(error)}); leave --push out and upload later."
            ) from error
        return Push(repo=repo, private=private)  # some kinds of tokens may push and not ask who they are
    _check_rights(repo, person)
    return Push(repo=repo, private=private)


def _check_rights(repo: str, person: Any) -> None:
    """Hold the answer of whoami against the repository; fine-grained tokens are left to the upload."""
    role = ((person.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UsageError(f"--push {repo}: this machine's token may only read; {_LOG_IN} with one that may write.")
    owners = [person.get("name"), *(org.get("name") for org in person.get("orgs") or ())]
    owner = repo.split("/")[0]
    if role == "write" and owner.lower() not in [str(name).lower() for name in owners]:
        raise UsageError(
            f"--push {repo}: {person.get('name')} does not belong to {owner}; name one of "
            f"{', '.join(map(str, owners))}."
        )


def push_folder(push: Push, folder: Path, base: str) -> str:
    """Upload a finished folder and return the repository's address; the repository is made where there is none.

    A folder without a model card gets a short one first. Weights of another model in the repository go in the same
    commit.

    Args:
        push: `check_push` has allowed it.
        folder: the output of a stage, whole.
        base: the model that it was made of, for the card.

    Raises:
        MoepressError: the upload failed; the folder stays, and the message has the command that repeats the upload.
    """
    if not (folder / CARD_NAME).exists():
        write_atomically(folder / CARD_NAME, plain_card(folder, model_folder(base)))
    failures: tuple[type[Exception], ...] = (*library_errors(), RuntimeError)
    try:
        return _upload(push, folder)
    except KeyboardInterrupt:
        note(f"{folder} is whole. To repeat only the upload: {push.command(folder)}")
        raise
    except failures as error:
        raise MoepressError(
            f"{folder} is whole, but its upload to {push.repo} failed ({_reason(error)}); to repeat only that: "
            f"{push.command(folder)}"
        ) from error


def _upload(push: Push, folder: Path) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    with library_bars():
        url = api.create_repo(push.repo, private=push.private or None, exist_ok=True)
        there = set(api.list_repo_files(push.repo))
        stale = [name for name in there if _STALE.fullmatch(name) and not (folder / name).exists()]
        api.upload_folder(
            repo_id=push.repo,
            folder_path=folder,
            commit_message=f"Made with moepress {__version__}",
            delete_patterns=[escape(name) for name in stale] or None,
            ignore_patterns=[JOURNAL, LOCK, f"*{TEMPORARY}"],
        )
    return str(url)


def _reason(error: BaseException) -> str:
    """That of what lies below: the library wraps what failed into an error that names the file alone."""
    below = error.__cause__ if isinstance(error, RuntimeError) else None
    return reason_of(error) if below is None else f"{reason_of(error)}: {reason_of(below)}"
