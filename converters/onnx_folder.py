"""An ONNX model's folder: what is written beside the graph, and a folder opened and checked for running.

    model.onnx                      the graph, without weights
    model.embedding.data, model.layer-NNN.data, model.head.data
    genai_config.json               for onnxruntime-genai
    config.json, tokenizer.json, ... as in the Hugging Face folder, without its quantization_config
    moepress.json                   how it was made

Sources: onnxruntime-genai 0.18 `src/config.h` for genai_config.json; ../shared facts on external data are enforced in
`open_onnx`: weights lie under plain names in the model's own folder.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moepress.converters.onnx_runtime import require_onnx
from moepress.errors import InvalidInputError
from moepress.models.checkpoint import load_config, read_json

MODEL, GENAI_CONFIG, SUMMARY = "model.onnx", "genai_config.json", "moepress.json"
_FLOAT, _FLOAT16, _EXTERNAL = 1, 10, 1
_GENAI_LENGTH = 4096  # default of max_length: genai allocates the whole cache before the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFolder:
    """A decoder on disk that can be run.

    Attributes:
        folder: where it lies.
        config: config.json.
        summary: moepress.json; empty when another tool made the folder.
        inputs: names of the graph's inputs.
        caches: (heads, size) of each layer's cache.
        dtype: of activations and caches: `float32` or `float16`.
        vocabulary: number of logits.
        total_bytes: size of the graph and its weights.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    inputs: frozenset[str]
    caches: tuple[tuple[int, int], ...]
    dtype: str
    vocabulary: int
    total_bytes: int

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        return _whole(self.folder / "config.json", self.config, "max_position_embeddings") or 2048

    @property
    def parameters(self) -> int:
        """How many weights it has when dense; 0 where nobody noted it."""
        return _whole(self.folder / SUMMARY, self.summary, "parameters")

    @property
    def int8_activations(self) -> bool:
        """Whether the CPU rounds activations to int8 on the way."""
        return self.summary.get("accuracy_level") == 4


def is_onnx(folder: Path) -> bool:
    """Whether a folder holds an ONNX model."""
    return (folder / MODEL).is_file()


def open_onnx(folder: Path) -> OnnxFolder:
    """Open a decoder with KV cache that moepress, onnxruntime-genai or optimum wrote; reads no weights.

    Raises:
        InvalidInputError: the graph is not sound, is no such decoder, or its weights are missing or lie elsewhere.
        UnsupportedError: onnx is not installed.
    """
    onnx = require_onnx()
    config = load_config(folder)
    file = folder / MODEL
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf and onnx have many exception types
        raise InvalidInputError(f"{file} is not a readable ONNX model ({_line(error)}); export it again.") from error
    total = file.stat().st_size + _external_bytes(folder, model.graph)
    inputs = {value.name: value for value in model.graph.input}
    outputs = {value.name: value for value in model.graph.output}
    pasts = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in inputs)
    if not pasts or "input_ids" not in inputs or "logits" not in outputs:
        raise InvalidInputError(
            f"{file} is not a decoder with a KV cache (input_ids and past_key_values in, logits out); export it with "
            "`moepress export --to onnx`."
        )
    keys = [_cache(file, inputs, layer) for layer in range(pasts)]
    element = inputs["past_key_values.0.key"].type.tensor_type.elem_type
    if element not in (_FLOAT, _FLOAT16):
        raise InvalidInputError(f"{file} has a cache that is neither float32 nor float16; moepress runs these two.")
    opened = OnnxFolder(
        folder=folder,
        config=config,
        summary=read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {},
        inputs=frozenset(inputs),
        caches=tuple(keys),
        dtype="float32" if element == _FLOAT else "float16",
        vocabulary=_whole(folder / "config.json", config, "vocab_size"),
        total_bytes=total,
    )
    assert opened.context > 0  # refuses what is no number here, before anything is run
    return opened


def _whole(file: Path, values: Mapping[str, Any], key: str) -> int:
    """A number of a JSON file that is not negative; 0 where it is not stated."""
    found = values.get(key) or 0
    if not isinstance(found, int) or found < 0:
        raise InvalidInputError(f"{file}: {key} is {found!r}, which is no size; restore the file.")
    return found


def _cache(file: Path, inputs: Mapping[str, Any], layer: int) -> tuple[int, int]:
    try:
        dims = inputs[f"past_key_values.{layer}.key"].type.tensor_type.shape.dim
        heads, size = dims[1].dim_value, dims[3].dim_value
    except (KeyError, IndexError):
        heads = size = 0
    if not (heads and size):
        raise InvalidInputError(f"{file} does not state the shape of layer {layer}'s cache; export it again.")
    return heads, size


def _external_bytes(folder: Path, graph: Any) -> int:
    """Size of the files of weights; refuses places outside of the folder and files that are too short."""
    ends: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.data_location != _EXTERNAL:
            continue
        place = {row.key: row.value for row in tensor.external_data}
        name = place.get("location", "")
        begin, length = (place.get(key) or "0" for key in ("offset", "length"))
        if not (begin.isdecimal() and length.isdecimal()):
            raise InvalidInputError(f"{folder / MODEL}: {tensor.name} has no sound place; export it again.")
        ends[name] = max(ends.get(name, 0), int(begin) + int(length))
    total = 0
    for name, end in ends.items():
        plain = name not in {"", ".", ".."} and PurePosixPath(name).name == name == PureWindowsPath(name).name
        if not plain:
            raise InvalidInputError(f"{folder / MODEL} names {name!r}, which leads out of the folder; refused.")
        file = folder / name
        if not file.is_file():
            raise InvalidInputError(f"{folder / MODEL} names {name}, which is missing; copy or export it again.")
        if file.is_symlink() or file.stat().st_nlink > 1:
            raise InvalidInputError(f"{file} is a link, which ONNX refuses; copy the files themselves.")
        size = file.stat().st_size
        if size < end:
            raise InvalidInputError(f"{file} has {size} bytes and {MODEL} wants {end}; copy or export it again.")
        total += size
    return total


def genai_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    caches: Sequence[tuple[int, int]],
    *,
    layers: int,
    cuda: bool,
) -> dict[str, Any]:
    """The JSON of genai_config.json: type `decoder`, head size and key heads as the cache has them.

    Args:
        config: config.json of the model.
        generation: generation_config.json, or empty.
        caches: (heads, size) per layer, all alike.
        layers: number of decoder layers.
        cuda: run on CUDA rather than the CPU.
    """
    context = int(config.get("max_position_embeddings") or 2048)
    special = {name: _token(name, config, generation) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = special["eos_token_id"]
    if special["pad_token_id"] is None:  # genai wants one, and a single sequence never shows it
        special["pad_token_id"] = end[0] if isinstance(end, list) else end
    heads, size = caches[0]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{"cuda": {}}] if cuda else []},
        "filename": MODEL,
        "head_size": size,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "temperature": float(generation.get("temperature") or 1.0),
        "top_k": int(generation.get("top_k") or 50),
        "top_p": float(generation.get("top_p") or 1.0),
        "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
        "max_length": min(context, _GENAI_LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
    }
    known = {name: value for name, value in special.items() if value is not None}
    model = {
        "type": "decoder",
        "context_length": context,
        "vocab_size": config["vocab_size"],
        "decoder": decoder,
        **known,
    }
    return {"model": model, "search": search}


def _token(name: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Any:
    found = generation.get(name)
    return config.get(name) if found is None else found


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights a model has when dense."""
    return sum(math.prod(shape) for shape in shapes.values())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
