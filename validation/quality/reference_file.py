"""A saved reference as a file: tensors of `quality.reference` in safetensors, what they are of in its metadata."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor

from moepress.calibration.corpus import EvaluationCorpus
from moepress.errors import InvalidInputError
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.runs.files import put, sha256_of
from moepress.runs.parsing import parse_json
from moepress.runs.text import printable
from moepress.validation.quality.reference import TOP, Kept, compare_kept, keep_top
from moepress.validation.quality.results import Saved
from moepress.validation.quality.scores import ChunkScores, Comparer

KIND = "moepress reference"
_DTYPES = {"ids": "I32", "log_probabilities": "F32", "rest": "F32", "nll": "F32", "top1": "I32", "top5": "I32"}
_ROUNDING = 1e-3  # log-probabilities of fp32 may exceed 0 by less


_Words = Annotated[str, AfterValidator(printable)]
"""Text that is shown: nothing in it that a terminal would obey."""


class About(BaseModel):
    """What a reference is of.

    Attributes:
        tool_version: of moepress.
        created: ISO 8601 time with its zone.
        model: name of the model's folder, or owner/name@commit of the hub.
        runtime: what computed it, in words.
        versions: of packages.
        digest: SHA-256 of the windows.
        tokenizer: SHA-256 of the tokenizer's vocabulary.
        vocabulary: number of token ids.
        window, windows: tokens of a window; how many windows.
        max_windows: windows of each domain that were asked for.
        domains: names.
        embedded: whether any of the text is the default text of moepress.
        context: tokens that the model was made for.
        stored_bytes, parameters, parts, experts_per_layer: of the model, as in the report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["1.0"] = "1.0"
    tool_version: _Words
    created: _Words
    model: _Words | None
    runtime: _Words
    versions: dict[str, str]
    digest: str
    tokenizer: str
    vocabulary: int
    window: int
    windows: int
    max_windows: int | None
    domains: tuple[_Words, ...]
    embedded: bool
    context: int
    stored_bytes: int
    parameters: int
    parts: dict[_Words, int] = {}
    experts_per_layer: int | tuple[int, int] | None = None


class Keeper:
    """Gathers what is kept while a model is measured."""

    def __init__(self, top: int = TOP) -> None:
        self.top, self._parts = top, list[Kept]()

    def __call__(self, log_probabilities_RV: Tensor, wanted_R: Tensor) -> None:
        """See the next positions."""
        self._parts.append(keep_top(log_probabilities_RV, wanted_R, self.top))

    def kept(self) -> Kept:
        """All of them."""
        return Kept(**{f.name: torch.cat([getattr(part, f.name) for part in self._parts]) for f in fields(Kept)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedReference:
    """A model that is only known by what was kept of its predictions."""

    file: Path
    sha256: str
    about: About
    kept: Kept

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.about.vocabulary

    @property
    def nll(self) -> Tensor:
        """fp32 [N, T - 1], nats."""
        return self.kept.nll.view(self.about.windows, self.about.window - 1)

    def comparer(self) -> Comparer:
        """Compares a model's predictions with those kept; begins at the first position, each time it is called."""
        start = 0

        def compare(log_probabilities_RV: Tensor, _wanted_R: Tensor) -> ChunkScores:
            nonlocal start
            rows = slice(start, start + len(log_probabilities_RV))
            start = rows.stop
            part = Kept(**{f.name: getattr(self.kept, f.name)[rows] for f in fields(Kept)})
            return compare_kept(part, log_probabilities_RV)

        return compare

    @property
    def runtime(self) -> str:
        """What computed it, and that it was not computed now."""
        return f"{self.about.runtime} (saved by moepress {self.about.tool_version}, {self.about.created})"

    @property
    def summary(self) -> Saved:
        """What the report says of it."""
        return Saved(
            file=self.file.name,
            model=self.about.model,
            sha256=self.sha256,
            tool_version=self.about.tool_version,
            created=self.about.created,
            top=self.kept.ids.shape[1],
            rest=float(self.kept.rest.double().exp().mean()),
        )

    def require_same(self, corpus: EvaluationCorpus, tokenizer: str) -> None:
        """Refuse windows that are not those of the reference.

        Args:
            corpus: the windows at hand.
            tokenizer: digest of the tokenizer that made them.

        Raises:
            InvalidInputError: with what is likely to be the reason.
        """
        about = self.about
        if corpus.digest == about.digest:
            return
        windows, length = corpus.windows.shape
        here = f"{windows} windows of {length} tokens ({', '.join(corpus.domains)})"
        there = f"{about.windows} windows of {about.window} tokens ({', '.join(about.domains)})"
        reason = (
            "give the same --data, --data-domain and --max-windows"
            if tokenizer == about.tokenizer
            else "the tokenizer of this model is another one, too"
        )
        raise InvalidInputError(
            f"{self.file} was made on other text: {there}, here are {here}, and their tokens differ; {reason}."
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of a transformers tokenizer's vocabulary."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def write_reference(file: Path, kept: Kept, about: About) -> None:
    """Write a reference: temporary name, rename; what is there of that name is replaced."""
    from safetensors.torch import save

    metadata = {"kind": KIND, "about": about.model_dump_json()}
    put(file, save({name: getattr(kept, name).contiguous() for name in _DTYPES}, metadata=metadata), sync=True)


def read_reference(file: Path) -> SavedReference:
    """Open a reference, and check that it is one.

    Raises:
        InvalidInputError: it is none, is damaged, or was written by another version in another form.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("kind") != KIND:
                raise InvalidInputError(f"{file} is no reference of moepress; give a file made with --save-reference.")
            about = About.model_validate(parse_json(metadata.get("about", "")))
            found = {name: (header[name].dtype, header[name].shape) for name in header}
            if found != _layout(about, header):
                raise _broken(file, "its tensors are not those that belong there")
            kept = Kept(**{name: opened.get_tensor(name) for name in _DTYPES})
    except (SafetensorError, ValidationError, ValueError, RecursionError, OSError) as error:
        raise _broken(file, " ".join(str(error).split())[:200]) from error
    _check(file, kept, about.vocabulary)
    return SavedReference(file=file, sha256=sha256_of(file), about=about, kept=kept)


def _layout(about: About, header: Mapping[str, Stored]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes that belong to windows of that number and length; K is the file's own."""
    positions = about.windows * (about.window - 1)
    top = header["ids"].shape[-1] if "ids" in header and len(header["ids"].shape) == 2 else 0
    top = min(top, about.vocabulary)
    wide = {"ids": top, "log_probabilities": top, "top5": min(5, about.vocabulary)}
    return {name: (dtype, (positions, wide[name]) if name in wide else (positions,)) for name, dtype in _DTYPES.items()}


def _check(file: Path, kept: Kept, vocabulary: int) -> None:
    for name in ("ids", "top1", "top5"):
        ids = getattr(kept, name)
        if not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise _broken(file, f"its {name} are no tokens of a vocabulary of {vocabulary}")
    sound = bool(torch.isfinite(kept.nll).all()) and float(kept.nll.min()) > -_ROUNDING
    for values in (kept.log_probabilities, kept.rest):
        sound &= not bool(torch.isnan(values).any()) and float(values.max()) < _ROUNDING
    if not sound:
        raise _broken(file, "it holds numbers that are no log-probabilities")


def _broken(file: Path, why: str) -> InvalidInputError:
    return InvalidInputError(f"{file} is not a sound reference: {why}; download or make it again.")
