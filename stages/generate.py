"""`generate`: text from any folder that moepress reads or makes, so that a person can look at it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moepress.calibration.records import Conversation
from moepress.calibration.templates import ChatTemplate, Refused
from moepress.converters.gguf.file import gguf_file
from moepress.converters.gguf.runtime import llama_version
from moepress.converters.mlx.folder import is_mlx, mlx_version, open_mlx, require_mlx
from moepress.converters.onnx.folder import is_onnx, open_onnx
from moepress.converters.onnx.runtime import installed_version
from moepress.errors import InvalidInputError, MoepressError, UsageError
from moepress.models.families.hf_config import hf_config
from moepress.models.forward.dense import free_memory_bytes, load_dense
from moepress.models.forward.walk import choose_device, choose_dtype
from moepress.stages.groundwork import announce, load_tokenizer, opened_source
from moepress.stages.places import Machine, model_place
from moepress.validation.quality.decoding import (
    Decoder,
    Sampling,
    TextStream,
    TorchDecoder,
    check_prompt,
    generate,
    stop_tokens,
    why_stopped,
)
from moepress.validation.quality.llama_cpp import LlamaDecoder, open_llama
from moepress.validation.quality.mlx_session import MlxDecoder, MlxSession
from moepress.validation.quality.onnx_session import OnnxDecoder, cuda_number, open_session
from moepress.validation.rules.gguf_files import runnable_gguf


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of a model.

    Attributes:
        prompt: text to go on from, or with `chat` what the user says.
        chat: write the prompt with the tokenizer's chat template.
        max_new_tokens: at most so many.
        sampling: how tokens are chosen.
    """

    prompt: str
    chat: bool = False
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runnable:
    """A model that can be loaded, and what is known of it before.

    Attributes:
        context: tokens that a sequence may have.
        vocabulary: number of token ids.
        runtime: what runs it, with its version.
        device: where it is to run; of ONNX models the session decides.
        dtype: of its computation.
        load: reads the weights; what it gives makes decoders with nothing in their cache, one after the other.
    """

    context: int
    vocabulary: int
    runtime: str
    device: str
    dtype: str
    load: Callable[[], Callable[[], Decoder]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came out.

    Attributes:
        prompt: as it was given, without the chat template.
        prompt_tokens: how many tokens it has, with the chat template.
        text: the new text, without special tokens.
        token_ids: the new tokens; the last one is the end-of-text token where it stopped there.
        tokens: how many they are.
        seconds: for the prompt and all new tokens, without loading.
        stopped: `end` (of text), `length` (the limit) or `context` (it is full).
        sampling: how tokens were chosen.
        runtime, device, dtype: what ran the model.
    """

    prompt: str
    prompt_tokens: int
    text: str
    token_ids: tuple[int, ...]
    tokens: int
    seconds: float
    stopped: str
    sampling: Sampling
    runtime: str
    device: str
    dtype: str


def open_model(folder: Path, machine: Machine) -> Runnable:
    """The runtime for a folder: ONNX Runtime for ONNX, llama.cpp for GGUF, mlx-lm for MLX, else transformers.

    Raises:
        InvalidInputError, UnsupportedError: the folder is not sound, or not one that moepress runs.
    """
    if is_onnx(folder):
        return _open_onnx(folder, machine)
    file = gguf_file(folder)
    if file is not None:
        return _open_gguf(file, machine)
    if is_mlx(folder):
        return _open_mlx(folder, machine)
    import transformers

    device = choose_device(machine.device)
    dtype = choose_dtype(machine.dtype, device)
    source = opened_source(folder)
    announce(source)
    config = hf_config(source.config).get_text_config()

    def load() -> Callable[[], Decoder]:
        model = load_dense(source, device=device, dtype=dtype)
        return lambda: TorchDecoder(model)

    return Runnable(
        context=int(config.max_position_embeddings),
        vocabulary=int(config.vocab_size),
        runtime=f"transformers {transformers.__version__}",
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        load=load,
    )


def _require_memory(place: Path, size: int) -> None:
    """Refuse what a runtime would load as a whole into memory that is not free."""
    free = free_memory_bytes(torch.device("cpu"))
    if size > free:
        raise MoepressError(
            f"{place} has {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
            "close other programs or take a smaller model."
        )


def _open_onnx(folder: Path, machine: Machine) -> Runnable:
    if machine.dtype != "auto":
        raise UsageError("An ONNX model has its dtype in its graph; leave out --dtype.")
    cuda_number(machine.device)  # refuses other devices
    opened = open_onnx(folder)

    def load() -> Callable[[], Decoder]:
        _require_memory(folder, opened.total_bytes)
        session = open_session(opened, machine.device, exact=False)
        return lambda: OnnxDecoder(session)

    return Runnable(
        context=opened.context,
        vocabulary=opened.vocabulary,
        runtime=f"ONNX Runtime {installed_version('onnxruntime') or installed_version('onnxruntime-gpu')}",
        device=machine.device,
        dtype=opened.dtype,
        load=load,
    )


def _open_gguf(file: Path, machine: Machine) -> Runnable:
    if machine.dtype != "auto" or machine.device not in ("auto", "cpu"):
        raise UsageError("A GGUF file runs in llama.cpp on the CPU here; leave out --dtype and --device.")
    model = runnable_gguf(file)
    context = min(model.context, _LLAMA_CONTEXT)

    def load() -> Callable[[], Decoder]:
        _require_memory(file, model.total_bytes)
        session = open_llama(file, context=context)
        return lambda: LlamaDecoder(session)

    return Runnable(
        context=context,
        vocabulary=model.vocabulary,
        runtime=f"llama.cpp {llama_version()}",
        device="cpu",
        dtype="8-bit activations" if model.rounds_activations else "float32",
        load=load,
    )


def _open_mlx(folder: Path, machine: Machine) -> Runnable:
    if machine.dtype != "auto" or machine.device != "auto":
        raise UsageError("MLX chooses device and dtype itself; leave out --dtype and --device.")
    require_mlx()
    opened = open_mlx(folder)

    def load() -> Callable[[], Decoder]:
        session = MlxSession(opened)
        return lambda: MlxDecoder(session)

    return Runnable(
        context=opened.context,
        vocabulary=opened.vocabulary,
        runtime=f"mlx-lm {mlx_version()}",
        device="auto",
        dtype="float32",
        load=load,
    )


_LLAMA_CONTEXT = 8192  # tokens: llama.cpp makes room for the whole cache before the first


def generate_stage(
    model_name: str, request: Request, machine: Machine, *, write: Callable[[str], None] = lambda _piece: None
) -> Generated:
    """Generate text; nothing is written to disk.

    Args:
        model_name: a folder, or `demo`.
        request: prompt and how to go on from it.
        machine: device and dtype; its memory limit is not used, for the model is loaded as a whole.
        write: gets the text piece by piece as it comes, whole characters only.

    Raises:
        UsageError: the prompt is empty or too long, or there is no chat template.
        InvalidInputError: the folder, its tokenizer or its weights are not sound.
        MoepressError: the model does not fit into memory.
    """
    folder = model_place(model_name)
    if not request.prompt:
        raise UsageError("The prompt is empty; give some text to go on from.")
    model = open_model(folder, machine)
    tokenizer = load_tokenizer(folder)
    stop = stop_tokens(folder, tokenizer)
    prompt_ids = encode(tokenizer, request.prompt, chat=request.chat)
    check_prompt(prompt_ids, context=model.context, vocabulary=model.vocabulary)
    try:
        decoder = model.load()()
        started = time.perf_counter()
        pieces, ids = TextStream(tokenizer, before=prompt_ids), list[int]()
        text = ""
        limit = request.max_new_tokens
        for token in generate(decoder, prompt_ids, max_new_tokens=limit, stop=stop, sampling=request.sampling):
            ids.append(token)
            text += (piece := pieces.push(token))
            write(piece)
        seconds = time.perf_counter() - started
    except torch.OutOfMemoryError as error:
        raise MoepressError(
            f"The device ({model.device}) ran out of memory; give a shorter prompt, or use --device cpu."
        ) from error
    text += (piece := pieces.flush())
    write(piece)
    return Generated(
        prompt=request.prompt,
        prompt_tokens=len(prompt_ids),
        text=text,
        token_ids=tuple(ids),
        tokens=len(ids),
        seconds=seconds,
        stopped=why_stopped(ids, max_new_tokens=limit, stop=stop),
        sampling=request.sampling,
        runtime=model.runtime,
        device=decoder.provider if isinstance(decoder, OnnxDecoder | LlamaDecoder | MlxDecoder) else model.device,
        dtype=model.dtype,
    )


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """The tokens of a prompt, with the special tokens that the tokenizer, or its chat template, puts around it.

    Raises:
        UsageError: the prompt is not text, or a chat is asked for and there is no template.
        InvalidInputError: the chat template can not be used.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("The prompt is not valid UTF-8 text; give it in UTF-8.") from error
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    with ChatTemplate(tokenizer) as template:
        if not template.there:
            raise UsageError(
                "The model's tokenizer has no chat template; leave --chat out and write the prompt as text."
            )
        said = Conversation(messages=[{"role": "user", "content": prompt}])
        (text,) = template.render([said], add_generation_prompt=True)
    if isinstance(text, Refused):
        raise InvalidInputError(
            f"The tokenizer's chat template can not be used ({text.reason}); mend it, or leave --chat out."
        )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them
