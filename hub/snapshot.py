"""Models by their id on the Hugging Face hub: from the cache, or downloaded into it.

    owner/name[@revision] ──snapshot──▶ HF_HUB_CACHE/models--owner--name/snapshots/<commit>/

huggingface_hub transfers, and its variables count: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. Only
what moepress reads is fetched: safetensors (those that the index names), or an ONNX model where there are none,
config, tokenizer, licence and card; never pickles or code. Files come one after another in the main thread, so that
Ctrl-C works at once and an interruption costs at most one of them.
"""

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, MoepressError
from moepress.hub.headers import without_weights
from moepress.runs.byte_sizes import size_text
from moepress.runs.progress import note

INDEX, SINGLE, GRAPH = "model.safetensors.index.json", "model.safetensors", "model.onnx"
BESIDE = (
    *("config.json", "generation_config.json", "genai_config.json", "moepress.json"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "adapter_config.json"),
    *("tokenizer*.json", "*.model", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*"),
)
_NEVER = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".zip")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WORD = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_headers_only: ContextVar[bool] = ContextVar("headers_only", default=False)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model's id, and a branch, tag or commit; None for the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A commit of a repository, and the bytes of the files at its root."""

    commit: str
    sizes: Mapping[str, int]


def hub_model(name: str) -> HubModel | None:
    """What `owner/name` or `owner/name@revision` stands for; None for anything else. Asks nobody."""
    found = _ID.fullmatch(name)
    return HubModel(found["repo"], found["revision"]) if found else None


def origin_of(folder: Path) -> HubModel | None:
    """The id and commit of a folder that lies in the hub's cache, or None."""
    parts = folder.resolve().parts
    for place in range(len(parts) - 1, -1, -1):
        found = _CACHED.fullmatch(parts[place])
        if found:
            inside = parts[place + 1 :]
            return HubModel(f"{found[1]}/{found[2]}", inside[1] if len(inside) > 1 else None)
    return None


@contextmanager
def headers_only(*, when: bool = True) -> Iterator[None]:
    """In this block models of the hub that are not in the cache come without their weights, for dry runs and
    `inspect`: shards have their header and are empty behind it.
    """
    before = _headers_only.set(when)
    try:
        yield
    finally:
        _headers_only.reset(before)


def snapshot(model: HubModel) -> Path:
    """The folder of a model, downloaded where it is not in the cache; the same one for as long as the process lives,
    even if the branch moves.

    Raises:
        InvalidInputError: there is no such model or revision, it may not be had, or it holds no weights to read.
        MoepressError: the hub cannot be reached, or the disk is too small.
    """
    return _snapshot(model, _headers_only.get())


@functools.cache
def _snapshot(model: HubModel, headers: bool) -> Path:
    try:
        listing = _listing(model)
    except library_errors() as error:
        found = _cached(model)
        if found is None or _named(error, "RevisionNotFoundError"):
            raise refusal(model, error) from error
        if not _named(error, "OfflineModeIsEnabled"):
            note(f"{model} is taken from the cache, for the hub can not be asked ({reason_of(error)}).")
        return found
    try:
        return _fetch(model, listing, headers=headers)
    except library_errors() as error:
        raise refusal(model, error) from error


def _listing(model: HubModel) -> Listing:
    from huggingface_hub import HfApi

    info = HfApi().model_info(model.repo, revision=model.revision, files_metadata=True)
    assert info.sha is not None, "the hub names the commit"
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Listing(commit=info.sha, sizes={name: size for name, size in files.items() if "/" not in name})


def needed_files(repo: str, names: Mapping[str, Any], index: Path | None, *, where: str = " on the hub") -> list[str]:
    """The files at a repository's root that moepress reads.

    Args:
        repo: for messages.
        names: what is there.
        index: the downloaded index of a sharded model.
        where: for messages, behind `repo`.

    Raises:
        InvalidInputError: there are no safetensors and no ONNX model, or two sets of safetensors.
    """
    beside = [name for name in names if any(fnmatch(name, pattern) for pattern in BESIDE)]
    if index is not None:
        shards = _shards(index)
        if SINGLE in names and shards != {SINGLE}:
            raise InvalidInputError(
                f"{repo}{where} holds two sets of weights, {SINGLE} and the shards that {INDEX} names: "
                "transformers loads the one, vLLM and SGLang the other; download the right one and give its folder."
            )
        weights = [INDEX, *(name for name in shards if name in names)]
    elif SINGLE in names:
        weights = [SINGLE]
    elif GRAPH in names:
        weights = [name for name in names if name.endswith((".onnx", ".data", ".onnx_data"))]
    else:
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        files = sorted(name for name in names if name.endswith(".gguf"))
        what = f"only GGUF files ({files[0]})" if files else "no weights"
        what = f"only pickles ({pickles[0]}), which can run code and are refused" if pickles else what
        raise InvalidInputError(
            f"{repo}{where} has {what}; name a repository or a folder with {SINGLE}, {INDEX} or {GRAPH} at its root."
        )
    return sorted({name for name in (*beside, *weights) if not name.endswith(_NEVER)})


def _shards(index: Path) -> set[str]:
    """The files that an index names; what is wrong with it is said when the folder is opened."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {name for name in names if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _fetch(model: HubModel, listing: Listing, *, headers: bool) -> Path:
    """Whatever is missing in the cache, then the branch's commit for those who are offline later."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    def get(name: str, revision: str) -> Path:
        return Path(hf_hub_download(model.repo, name, revision=revision))

    with _quiet():
        index = get(INDEX, listing.commit) if INDEX in listing.sizes else None
    wanted = needed_files(model.repo, listing.sizes, index)
    there = {name for name in wanted if try_to_load_from_cache(model.repo, name, revision=listing.commit)}
    missing = {name: listing.sizes[name] for name in wanted if name not in there}
    shards = [name for name in missing if name.endswith(".safetensors")]
    if headers and shards:
        size = sum(missing[name] for name in shards)
        note(f"{model.repo} at {listing.commit[:7]}: reading headers alone; {size_text(size)} are not downloaded.")
        return without_weights(model.repo, listing.commit, {name: listing.sizes[name] for name in wanted})
    if missing:
        _announce(model, listing, missing, len(wanted))
    with library_bars():
        for name in missing:
            get(name, listing.commit)
    with _quiet():
        last = "config.json" if "config.json" in wanted else wanted[0]
        if model.revision is None or not _COMMIT.fullmatch(model.revision):
            get(last, model.revision or "main")  # notes the commit in refs/
        return get(last, listing.commit).parent


def _announce(model: HubModel, listing: Listing, missing: Mapping[str, int], files: int) -> None:
    """Say what is downloaded, and refuse what the disk can not hold."""
    from huggingface_hub import constants

    size, cache = sum(missing.values()), Path(constants.HF_HUB_CACHE)
    place = next(p for p in (cache, *cache.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise MoepressError(
            f"{model.repo} needs {size_text(size)} more in the hub's cache {cache} and {size_text(free)} are free; "
            "make room, or name another place with HF_HOME."
        )
    note(
        f"{model.repo} at {listing.commit[:7]}: downloading {len(missing)} of {files} files, {size_text(size)}, to "
        f"{cache}."
    )


def _cached(model: HubModel) -> Path | None:
    """The model's folder in the cache, where it is whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                model.repo, revision=model.revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
    except library_errors():
        return None
    names = {file.name for file in folder.iterdir() if file.exists()}
    if INDEX in names:
        return folder if _shards(folder / INDEX) <= names else None
    return folder if names & {SINGLE, GRAPH} else None


def refusal(model: HubModel, error: Exception) -> MoepressError:
    """What the hub's library raised, in one sentence that says what to do."""
    from huggingface_hub import constants

    place = f"{constants.ENDPOINT}/{model.repo}"
    if _named(error, "RevisionNotFoundError"):
        return InvalidInputError(f"{model.repo} has no revision {model.revision} on the hub; see {place}/tree/main.")
    if _named(error, "GatedRepoError"):
        return InvalidInputError(
            f"{model.repo} is gated: accept its terms on {place}, and log in here with `hf auth login`."
        )
    if _named(error, "RepositoryNotFoundError"):
        return InvalidInputError(
            f"{model} is not a folder here, and not a model on the hub that this machine may see; correct the name, or "
            "log in with `hf auth login` if it is private."
        )
    if _named(error, "OfflineModeIsEnabled"):
        return InvalidInputError(
            f"{model} is not a folder here, nor whole in the hub's cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
            "forbids to download it; unset that, or copy the model here."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return InvalidInputError(f"The hub does not take this machine's token for {model}; run `hf auth login`.")
    if status is None and isinstance(error, ValueError):
        return InvalidInputError(f"{model} is not a folder here, nor a valid id on the hub ({reason_of(error)}).")
    return MoepressError(
        f"{model} is not a folder here and can not be downloaded ({reason_of(error)}); repeat the command to go on: "
        "files that are whole stay in the cache."
    )


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or of the one below it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None)
    if status is not None:
        return f"HTTP {status}{f': {said.strip()}' if said else ''}".rstrip(".")
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".:")


def library_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises; the bases hold the errors of its HTTP client, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _named(error: BaseException, name: str) -> bool:
    """Whether an error, or one that it was raised from, is of that class: the library wraps some."""
    seen: BaseException | None = error
    while seen is not None:
        if any(base.__name__ == name for base in type(seen).__mro__):
            return True
        seen = seen.__cause__
    return False


@contextmanager
def library_bars(*, shown: bool = True) -> Iterator[None]:
    """The library's own bars, where a person watches."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:  # the user has decided
        yield
        return
    before = are_progress_bars_disabled()
    watched = shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    (enable_progress_bars if watched else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


def _quiet() -> Any:
    return library_bars(shown=False)
