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

from moepress.converters.onnx.runtime import require_onnx
from moepress.errors import InvalidInputError
from moepress.models.storage.folder import load_config, read_json
from moepress.models.storage.inside import in_hub_cache

MODEL, GENAI_CONFIG, SUMMARY = "model.onnx", "genai_config.json", "moepress.json"
_FLOAT, _FLOAT16, _EXTERNAL = 1, 10, 1
_GENAI_LENGTH = 4096  # default of max_length: genai allocates the whole cache before the first token
_MOST_DIGITS = 18  # of a place in a file
_MOST_HEADS = 1 << 20  # heads of a cache, and values of a head: far above any model
_INT32, _FLOAT32 = 1 << 31, 3.4e38  # what genai's numbers end at
_GENERATION = "generation_config.json"


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
        """Tokens that a sequence may have: the rows of the rotary tables where they were noted, or fewer by config."""
        noted = _whole(self.folder / SUMMARY, self.summary, "context")
        stated = _whole(self.folder / "config.json", self.config, "max_position_embeddings")
        return min((length for length in (noted, stated) if length), default=2048)

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
    require_onnx()
    config = load_config(folder)
    file = folder / MODEL
    model = read_model(file)
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
    if not (0 < heads <= _MOST_HEADS and 0 < size <= _MOST_HEADS):
        raise InvalidInputError(
            f"{file}: layer {layer}'s cache has {heads} heads of {size} values, which is no size; export it again."
        )
    return heads, size


def read_model(file: Path) -> Any:
    """A graph without its weights; every name in it is text, which protobuf alone does not see to.

    Raises:
        InvalidInputError: it is no graph.
        UnsupportedError: onnx is not installed.
    """
    onnx = require_onnx()
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf and onnx have many exception types
        raise InvalidInputError(f"{file} is not a readable ONNX model ({_line(error)}); export it again.") from error
    if not _is_text(model):
        raise InvalidInputError(f"{file} is not a readable ONNX model (a name is not UTF-8); export it again.")
    return model


def _is_text(message: Any) -> bool:
    """Whether what is to be text in a protobuf message is; of broken UTF-8, Python is given bytes."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            if not all(isinstance(text, str) for text in ([value] if isinstance(value, str | bytes) else value)):
                return False
        elif field.type == field.TYPE_MESSAGE and not all(
            map(_is_text, [value] if hasattr(value, "ListFields") else value)
        ):
            return False
    return True


def _external_bytes(folder: Path, graph: Any) -> int:
    """Size of the files of weights; refuses places outside of the folder and files that are too short."""
    ends: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.data_location != _EXTERNAL:
            continue
        place = {row.key: row.value for row in tensor.external_data}
        name = place.get("location", "")
        begin, length = (place.get(key) or "0" for key in ("offset", "length"))
        if not all(text.isdecimal() and len(text) <= _MOST_DIGITS for text in (begin, length)):
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
        if (file.is_symlink() or file.stat().st_nlink > 1) and not in_hub_cache(file):
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
    context: int,
    heads: int,
    cuda: bool,
    folder: Path,
) -> dict[str, Any]:
    """The JSON of genai_config.json: type `decoder`, head size and key heads as the cache has them.

    Args:
        config: config.json of the model.
        generation: generation_config.json, or empty.
        caches: (heads, size) per layer, all alike.
        context: tokens that the graph's rotary tables are made for.
        heads: attention heads, of queries.
        cuda: run on CUDA rather than the CPU.
        folder: that both files are from, for messages.

    Raises:
        InvalidInputError: a value of either file is none that onnxruntime-genai could work with.
    """
    special = _special_tokens(config, generation, folder)
    key_heads, size = caches[0]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{"cuda": {}}] if cuda else []},
        "filename": MODEL,
        "head_size": size,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "num_hidden_layers": len(caches),
        "num_key_value_heads": key_heads,
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
    model = {
        "type": "decoder",
        "context_length": context,
        "vocab_size": config["vocab_size"],
        "decoder": decoder,
        **special,
    }
    search = {
        **_sampling(generation, folder / _GENERATION, config["vocab_size"]),
        "max_length": min(context, _GENAI_LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model's folder; empty where there is none.

    Raises:
        InvalidInputError: it is no JSON object.
    """
    file = folder / _GENERATION
    return read_json(file) if file.is_file() else {}


def _sampling(generation: Mapping[str, Any], file: Path, vocabulary: int) -> dict[str, Any]:
    """How genai samples unless it is told: what generation_config.json states, else transformers' defaults."""
    sample = generation.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise InvalidInputError(f"{file}: do_sample is {sample!r}, but true or false is needed; mend the file.")
    temperature = _number(generation, "temperature", 1.0, file)
    # Temperature 0 means the likeliest token, which a division by it would not give.
    sample, temperature = (bool(sample), temperature) if temperature > 0 else (False, 1.0)
    top_k = generation.get("top_k")
    top_k = 50 if top_k is None else top_k
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k < _INT32:
        raise InvalidInputError(f"{file}: top_k is {top_k!r}, but a count is needed (0 for all); mend the file.")
    penalty = _number(generation, "repetition_penalty", 1.0, file)
    if penalty == 0:
        raise InvalidInputError(
            f"{file}: repetition_penalty is 0, but it divides, 1 leaves all as it is; mend the file."
        )
    return {
        "do_sample": sample,
        "temperature": temperature,
        "top_k": min(top_k, vocabulary),  # genai refuses more
        "top_p": _number(generation, "top_p", 1.0, file, most=1.0),
        "repetition_penalty": penalty,
    }


def _number(values: Mapping[str, Any], key: str, default: float, file: Path, *, most: float = _FLOAT32) -> float:
    found = values.get(key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= most:  # no NaN either
        raise InvalidInputError(
            f"{file}: {key} is {found!r}, but a number from 0 to {most:g} is needed; mend the file."
        )
    return float(found)


def _special_tokens(config: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """bos, eos and pad as numbers; eos may be a list of them. What is stated nowhere is left out."""
    found: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        stated = generation.get(name)
        value, file = (stated, _GENERATION) if stated is not None else (config.get(name), "config.json")
        if value is None or value in (-1, []):  # both stand for none in old folders
            continue
        several = isinstance(value, list) and name == "eos_token_id"
        below = config["vocab_size"] if name == "eos_token_id" else _INT32  # genai checks those it waits for
        if not all(_is_token(token, below) for token in (value if several else [value])):
            raise InvalidInputError(
                f"{folder / file}: {name} is {value!r}, which is no token of this model (they are numbers below "
                f"{config['vocab_size']}); mend the file."
            )
        found[name] = value
    end = found.get("eos_token_id")
    if end is not None:  # genai wants one to pad with, and a single sequence never shows it
        found.setdefault("pad_token_id", end[0] if isinstance(end, list) else end)
    return found


def _is_token(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights a model has when dense."""
    return sum(math.prod(shape) for shape in shapes.values())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
