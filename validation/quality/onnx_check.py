"""The self-check after an export: is the graph sound, and does a session give the artifact's own logits?"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from moepress.converters.onnx.folder import MODEL, OnnxFolder, open_onnx, read_model
from moepress.converters.onnx.runtime import installed_version, require_onnx
from moepress.converters.safetensors.artifact import Artifact
from moepress.errors import MoepressError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, forward
from moepress.models.storage.checkpoint import Checkpoint, Source
from moepress.runs.files import put, temporary_for
from moepress.validation.quality.onnx_session import Decoding, OnnxModel, open_session

PREFILL, DECODE = 24, 8  # tokens
EXACT_LIMIT = 1e-3  # relative error of fp32 with fp32 activations; tests ask for less
HALF_LIMIT = 0.02  # median relative error of a token in an fp16 graph, which gives a tenth of it
INT8_LIMIT = 0.05  # the same with 2-bit experts, whose CPU kernel rounds activations to int8
LEAST_SAME = 0.7  # share of tokens with the same top-1, where activations are rounded: near ties may fall otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the check found.

    Attributes:
        providers: that the session really got.
        compared_with: what the logits were held against.
        tokens: (prefill, decode).
        prefill_error, decode_error: largest difference of a logit over the largest logit.
        median_error: the same token by token, the median.
        same_top1: share of tokens with the same most likely next token.
        genai_same: greedy tokens of onnxruntime-genai equal ours; None: it is not installed.
        notes: what was not checked, and why.
    """

    providers: tuple[str, ...]
    compared_with: str
    tokens: tuple[int, int]
    prefill_error: float
    decode_error: float
    median_error: float
    same_top1: float
    genai_same: bool | None
    notes: tuple[str, ...] = ()


def check_export(source: Checkpoint | Artifact, folder: Path, device: str = "cpu") -> Checked | str:
    """Check an exported folder against the folder it was made of.

    Args:
        source: what was exported.
        folder: with model.onnx and its weights.
        device: where the session runs.

    Returns:
        The findings, or a sentence that says why there was no session.

    Raises:
        MoepressError: the graph is not sound, or its logits are not the artifact's.
    """
    checker = require_onnx().checker
    try:
        checker.check_model(str(folder / MODEL))
    except checker.ValidationError as error:
        raise MoepressError(f"The exported graph is not valid ({error}); please report it.") from error
    opened = open_onnx(folder)
    free = psutil.virtual_memory().available
    if opened.total_bytes > free:
        return (
            f"the session was not tried: the model has {opened.total_bytes / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB of memory are free"
        )
    tokens = torch.randint(0, opened.vocabulary, (PREFILL + DECODE,), generator=torch.Generator().manual_seed(0))
    tokens = tokens[: max(2, min(len(tokens), opened.context))]
    prefill = max(1, len(tokens) - DECODE)
    model, notes = _exact_session(opened, device)
    found = _compare(_decoded(model, tokens, prefill), own_logits(source, tokens), prefill)
    genai_same, why_not = _genai_same(opened, model, tokens[:prefill])
    checked = Checked(
        providers=model.providers,
        compared_with="the artifact's logits",
        tokens=(prefill, len(tokens) - prefill),
        genai_same=genai_same,
        notes=(*notes, *why_not),
        **found,
    )
    _judge(checked, _limit(opened))
    return checked


def _exact_session(folder: OnnxFolder, device: str) -> tuple[OnnxModel, tuple[str, ...]]:
    """A session with fp32 activations wherever the CPU can: what int8 rounds away would hide faults."""
    if not folder.int8_activations:
        return open_session(folder, device), ()
    twin = temporary_for(folder.folder / "check.onnx")  # fp32 activations, beside what is checked
    model = read_model(folder.folder / MODEL)
    for attribute in (a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"):
        attribute.i = 0
    try:
        put(twin, model.SerializeToString())
        session = open_session(folder, device, file=twin.name)
    finally:
        twin.unlink(missing_ok=True)
    return session, ("checked with accuracy level 0, the same weights; `moepress validate` tells what int8 costs",)


def own_logits(source: Source, tokens_T: Tensor) -> Tensor:
    """fp32 logits [T, V] of a folder by our streamed forward, codes multiplied out in fp32 as ONNX Runtime does."""
    if isinstance(source, Artifact):
        source = dataclasses.replace(source, exact=True)
    limits = Limits(memory_bytes=psutil.virtual_memory().available // 4, batch_windows=1)
    with tempfile.TemporaryDirectory(prefix="moepress-") as name, torch.inference_mode():
        scratch = Scratch(Path(name), limits.memory_bytes)
        model = StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32)
        try:
            hidden = forward(model, tokens_T[None], scratch, limits, title="the artifact's own logits")
            return model.head()(hidden)[0]
        finally:
            scratch.close()


def _decoded(model: OnnxModel, tokens_T: Tensor, prefill: int) -> Tensor:
    """Logits [T, V]: the first tokens at once, the others one by one."""
    decoding = Decoding(model)
    parts = [decoding.step(tokens_T[None, :prefill])[0]]
    parts += [decoding.step(token[None, None])[0] for token in tokens_T[prefill:]]
    return torch.cat(parts)


def _compare(logits_TV: Tensor, reference_TV: Tensor, prefill: int) -> dict[str, Any]:
    error = (logits_TV - reference_TV).abs().amax(dim=1) / reference_TV.abs().max()
    same = logits_TV.argmax(dim=1) == reference_TV.argmax(dim=1)
    return {
        "prefill_error": float(error[:prefill].max()),
        "decode_error": float(error[prefill:].max()) if len(error) > prefill else 0.0,
        "median_error": float(error.median()),
        "same_top1": float(same.float().mean()),
    }


def _limit(folder: OnnxFolder) -> float | None:
    """The median error that is allowed where activations are rounded whatever one does; None: they are exact."""
    if folder.dtype != "float32":
        return HALF_LIMIT
    two_bits = 2 in folder.summary.get("experts_bits", {}).values()
    return INT8_LIMIT if folder.summary.get("kernel") == "qmoe" and two_bits else None


def _judge(checked: Checked, limit: float | None) -> None:
    """Refuse an export whose logits are not the artifact's.

    Raises:
        MoepressError: with the differences.
    """
    exact = max(checked.prefill_error, checked.decode_error) <= EXACT_LIMIT
    near = limit is not None and checked.median_error <= limit and checked.same_top1 >= LEAST_SAME
    if not (exact or near):
        raise MoepressError(
            f"The exported model's logits differ from {checked.compared_with} (prefill {checked.prefill_error:.2g}, "
            f"decode {checked.decode_error:.2g} of the largest logit), so the export was not kept; please report it."
        )
    if checked.genai_same is False and limit is None:
        raise MoepressError(
            "onnxruntime-genai goes on with other tokens than ONNX Runtime, so the export was not kept; please report "
            "it."
        )


def _genai_same(folder: OnnxFolder, model: OnnxModel, prompt_T: Tensor) -> tuple[bool | None, tuple[str, ...]]:
    """Whether onnxruntime-genai goes on with the same greedy tokens; None, and why, where that can not be told."""
    if installed_version("onnxruntime-genai") is None or folder.summary.get("for") != "cpu" or folder.int8_activations:
        return None, ()
    try:
        theirs = genai_greedy(folder.folder, prompt_T.tolist(), DECODE)
    except Exception as error:  # a wheel without its libraries, or one that knows less
        why = " ".join(str(error).split())[:200] or type(error).__name__
        return None, (f"onnxruntime-genai was not compared: {why}",)
    decoding, ours = Decoding(model), []
    logits = decoding.step(prompt_T[None])
    for _ in range(len(theirs)):
        ours.append(int(logits[0, -1].argmax()))
        logits = decoding.step(torch.tensor([[ours[-1]]]))
    return ours == theirs, ()


def genai_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from onnxruntime-genai; fewer than `count` where it meets an end-of-text token."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(_int32(prompt))
    found: list[int] = []
    while len(found) < count and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def _int32(tokens: list[int]) -> Any:
    """Token numbers as genai takes them."""
    import numpy as np

    return np.array(tokens, dtype=np.int32)
