"""README.md of a folder that was made: a model card as the Hugging Face hub reads it.

Front matter as in https://huggingface.co/docs/hub/model-cards; the hub knows four relations to a base model, and of
these `quantized` is a pressed model's; one that was only pruned is a `finetune` there, for want of a nearer word.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from moepress import __version__
from moepress.converters.gguf.file import gguf_file
from moepress.converters.mlx.folder import is_mlx
from moepress.converters.onnx.folder import is_onnx
from moepress.converters.safetensors.compressed_tensors_config import stated_codes
from moepress.converters.safetensors.scheme import Codes
from moepress.hub.snapshot import origin_of
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.folder import read_json
from moepress.models.storage.foreign import BLOCKS_METHOD
from moepress.runs.parsing import parse_yaml
from moepress.validation.quality.results import QualityRow
from moepress.validation.report.cells import number_text, percent_text, share_text, size_text
from moepress.validation.report.generation import generation_sentence
from moepress.validation.report.markdown import plain_text
from moepress.validation.report.schema import Report, SubjectInfo
from moepress.validation.report.task_card import model_index, task_lines
from moepress.validation.speed.projection import interval_text

CARD_NAME = "README.md"
Format = Literal["compressed-tensors", "gptq", "onnx", "gguf", "gguf-blocks", "mlx"]

_CARRIED = ("license", "license_name", "license_link", "language")
_LARGEST_CARD = 1 << 20

_LOADING: dict[Format | Literal["plain"], str] = {
    "plain": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```""",
    "compressed-tensors": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

This needs `transformers`, `accelerate` and `compressed-tensors`. vLLM takes the folder as well:
`vllm serve path/to/this/folder`.""",
    "gptq": """```python
from gptqmodel import GPTQModel

model = GPTQModel.load("path/to/this/folder")
```

transformers alone does not load this layout of a Mixture-of-Experts model: it makes the experts up,
without an error.""",
    "onnx": """```python
import onnxruntime_genai as og

model = og.Model("path/to/this/folder")
tokenizer = og.Tokenizer(model)
```

ONNX Runtime runs `model.onnx` without onnxruntime-genai too.""",
    "gguf": """```sh
llama-server -m path/to/this/folder/NAME.gguf
```

llama.cpp, LM Studio, Ollama and others that are built on llama.cpp load the file; of several parts give the first.""",
    "gguf-blocks": """```sh
moepress export path/to/this/folder --to gguf -o FILE.gguf
```

The folder holds blocks of GGUF in safetensors files, which moepress reads and other runtimes do not; the export is a
copy of the same blocks, for llama.cpp and what is built on it.""",
    "mlx": """```python
from mlx_lm import generate, load

model, tokenizer = load("path/to/this/folder")
print(generate(model, tokenizer, prompt="Hello"))
```""",
}
_FILE = "NAME.gguf"
_LIBRARIES = {"onnx": "onnx", "gguf": "gguf", "mlx": "mlx", "gguf-blocks": "moepress"}
_MIXED = (
    "Its bits differ by layer: vLLM and SGLang take that. **transformers loads such a folder wrong, without an "
    "error.**\n\n"
    "```sh\nvllm serve path/to/this/folder\n```"
)
_DIVIDED = (
    "vLLM loads it. **transformers leaves the divisor of experts' scales out: it loads such a folder wrong, without an "
    "error.**\n\n"
    "```sh\nvllm serve path/to/this/folder\n```"
)
_OF_CODES = {Codes.NVFP4: _DIVIDED}
"""In the place of a layout's text, where not all of its loaders know the codes."""


def model_card(
    report: Report,
    source: Checkpoint,
    layout: Format,
    *,
    stored_bytes: int | None = None,
    mixed: bool = False,
    codes: Codes = Codes.INT,
    file: str = "",
) -> str:
    """The card of a pressed model; the same report gives the same text, and nothing in it depends on the clock.

    Args:
        report: of the run.
        source: the original, whose licence is carried over.
        layout: of the folder; the table ends with the folder's own row.
        stored_bytes: of its weights; None for what the report says.
        mixed: bits differ by layer.
        codes: of the folder in compressed-tensors layout.
        file: of a folder with GGUF, the one to load.
    """
    front = _front_matter(report, source, layout)
    front |= model_index(report.tasks, _own(report, layout).label, report.title or source.folder.resolve().name)
    name = source_link(source.folder)
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {plain_text(report.title or source.folder.resolve().name)}, pressed with moepress",
        f"{name}, made smaller with moepress {report.tool_version}. " + _made(report),
        "## Before and after",
        _table(report, layout, stored_bytes),
        _remark(report, layout) + _measured(report),
        *map(plain_text, generation_sentence(report.generation, _own(report, layout).label)),
        *task_lines(report.tasks),
        "Perplexity alone misses damage: test it on your own task.",
        "## How to load it",
        _MIXED if mixed and layout == "compressed-tensors" else _loading(layout, file, codes),
        *(_behind_the_card(report, file) if layout == "gguf" else ()),
        "## Licence",
        _licence(front, source.folder),
    ]
    return "\n\n".join(parts) + "\n"


def _loading(layout: Format | Literal["plain"], file: str, codes: Codes) -> str:
    if layout == "compressed-tensors" and codes in _OF_CODES:
        return _OF_CODES[codes]
    return _LOADING[layout].replace(_FILE, shlex.quote(file) if file else _FILE)


def _behind_the_card(report: Report, file: str) -> Iterator[str]:
    """llama.cpp's options where the run aimed at a card with memory behind it, and experts have to lie there."""
    found = report.targets
    if found is None or not found.loads:
        return
    subject = found.loads[-1].subject
    row = next((row for row in found.rows if (row.target, row.subject) == (found.chosen, subject)), None)
    if row is None or row.tg128 is None or not row.cpu_moe:
        return
    speed = interval_text(row.tg128.low, row.tg128.high)
    disk = f", {size_text(row.disk_bytes)} of them on the disk," if row.disk_bytes else ""
    yield (
        f"On {plain_text(row.name)} the experts of {row.ram_layers} layers lie in RAM{disk} and all else on the card "
        f"(projected: {speed} tokens/s):"
    )
    model = f"path/to/this/folder/{shlex.quote(file or _FILE)}"
    yield f"```sh\nllama-server -m {model} -ngl 999 --n-cpu-moe {row.cpu_moe}\n```"


def plain_card(folder: Path, base: Path) -> str:
    """The card of a folder that was made without a report: what it is and of what, and that nothing was measured.

    Args:
        folder: pruned, quantized or exported.
        base: the folder that it was made of, whose licence is carried over.
    """
    layout = _layout(folder)
    config = read_json((base if layout == "gguf" else folder) / "config.json")
    named = card_metadata(base)
    origin = origin_of(base)
    original = named.get("base_model") if origin is None else origin.repo
    front: dict[str, Any] = {"base_model": original} if isinstance(original, str) else {}
    front["base_model_relation"] = "finetune" if layout is None else "quantized"
    front |= _carried({"license": config.get("license")} | named)
    front |= {"library_name": _LIBRARIES.get(layout or "", "transformers"), "pipeline_tag": "text-generation"}
    front["tags"] = ["moepress", "moe", layout or "pruned"]
    how = "Pruned" if layout is None else f"In {layout} layout"
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {plain_text(folder.resolve().name)}",
        f"{how}, made of {source_link(base)} with moepress {__version__}; `moepress.json` says how.",
        "What it lost was not measured here: test it on your own task.",
        "## How to load it",
        _loading(layout or "plain", "" if layout != "gguf" else getattr(gguf_file(folder), "name", ""), _codes(config)),
        "## Licence",
        _licence(front, base),
    ]
    return "\n\n".join(parts) + "\n"


def _layout(folder: Path) -> Format | None:
    """Of the codes in a folder; None for a folder without."""
    if is_onnx(folder):
        return "onnx"
    if gguf_file(folder) is not None:
        return "gguf"
    quantization = read_json(folder / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if is_mlx(folder):
        return "mlx"
    return method if method in ("compressed-tensors", "gptq", BLOCKS_METHOD) else None  # a pruned fp8 model stays one


def _codes(config: Mapping[str, Any]) -> Codes:
    """What a compressed-tensors folder's config says that codes are."""
    quantization = config.get("quantization_config")
    return stated_codes(quantization) if isinstance(quantization, dict) else Codes.INT


def source_link(folder: Path) -> str:
    """The original in a sentence: a link to the hub, with the commit, where its folder lies in the hub's cache."""
    origin = origin_of(folder)
    if origin is None:
        return f"`{folder.resolve().name}`"
    link = f"[{origin.repo}](https://huggingface.co/{origin.repo})"
    return link if origin.revision is None else f"{link} (revision `{origin.revision}`)"


def card_metadata(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's README.md; empty where there is none that can be read."""
    file = folder / CARD_NAME
    if not file.is_file() or file.stat().st_size > _LARGEST_CARD:
        return {}
    found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = parse_yaml(found[1]) if found else {}
    except ValueError:  # somebody else's file; the card says that it is unknown
        return {}
    return front if isinstance(front, dict) else {}


def _front_matter(report: Report, source: Checkpoint, layout: Format) -> dict[str, Any]:
    origin = origin_of(source.folder)
    front: dict[str, Any] = {} if origin is None else {"base_model": origin.repo}
    front["base_model_relation"] = "quantized" if report.quantization is not None else "finetune"
    front |= _carried({"license": source.config.get("license")} | card_metadata(source.folder))
    front["library_name"] = _LIBRARIES.get(layout, "transformers")
    front["pipeline_tag"] = "text-generation"
    tags = ["moepress", "moe", layout]
    front["tags"] = tags + (["pruned"] if report.pruning is not None else [])
    return front


def _carried(found: Mapping[str, Any]) -> dict[str, Any]:
    """Licence and language, where they are text or a list of text; other values are somebody's mistake."""
    kept = {}
    for key in _CARRIED:
        value = found.get(key)
        if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
            kept[key] = value if isinstance(value, str) else list(value)
    return kept


def _made(report: Report) -> str:
    steps = []
    pruning, quantized, text = report.pruning, report.quantization, report.calibration
    if pruning is not None:
        share = f"{pruning.kept} of {pruning.total} routed experts stay in each layer"
        steps.append(f"{share}, chosen by `{pruning.criterion}`.")
    if quantized is not None:
        steps.append(f"The weights were quantized with GPTQ: {plain_text(quantized.scheme)}.")
    if text is not None:
        kind = "the small default text of moepress" if text.embedded else "text given by its maker"
        seed = "" if text.seed is None else f", seed {text.seed}"
        steps.append(f"Calibration: {kind}, {text.tokens:,} tokens{seed}, SHA-256 of the windows `{text.digest}`.")
    return " ".join(steps)


def _remark(report: Report, layout: Format) -> str:
    """What stands in the folder's row that was not measured on the folder itself."""
    if layout == "gptq":
        return (
            "This folder holds the codes and scales of the `compressed-tensors` folder of the same run in another "
            "layout; its quality was measured there. "
        )
    if layout == "onnx" and not any(subject.onnx for subject in report.subjects):
        return "The quality was measured on the folder that this one was exported from. "
    return ""


def _table(report: Report, layout: Format, stored_bytes: int | None) -> str:
    rows = ["| Model | Size | Change | Perplexity | KL divergence | Same top-1 |", "|---|---:|---:|---:|---:|---:|"]
    first, plain, own = report.subjects[0], _plain(report), _own(report, layout)
    for subject in (*plain[:-1], own):
        size = stored_bytes if subject is own and stored_bytes is not None else subject.stored_bytes
        change = "–" if subject is first else percent_text(size / first.stored_bytes - 1, digits=0)
        name = plain_text(subject.label) + (", this folder" if subject is own else "")
        cells = [name, size_text(size), change, *_quality(report.overall(subject.label))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _plain(report: Report) -> list[SubjectInfo]:
    return [subject for subject in report.subjects if not (subject.onnx or subject.gguf)]


def _own(report: Report, layout: Format) -> SubjectInfo:
    """The row of the folder that the card lies in."""
    exported = [s for s in report.subjects if (s.onnx and layout == "onnx") or (s.gguf and layout == "gguf")]
    return (exported or _plain(report))[-1]


def _quality(row: QualityRow) -> list[str]:
    perplexity = number_text(row.perplexity, 2)
    if row.paired is None:
        return [perplexity, "–", "–"]
    change = percent_text(row.paired.perplexity_ratio.value - 1)
    return [f"{perplexity} ({change})", number_text(row.paired.kl, 4), share_text(row.paired.same_top1.value)]


def _measured(report: Report) -> str:
    quality = report.quality
    text = "the small default text of moepress" if quality.embedded else "text of its maker"
    digest = f"SHA-256 of the windows `{quality.digest}`"
    legend = "Perplexity: lower is better; ± is one standard error over windows."
    return f"{legend} Measured on {text}: {quality.windows} windows of {quality.window} tokens, {digest}."


def _licence(front: Mapping[str, Any], folder: Path) -> str:
    if "license" in front:
        return "That of the original model, carried over from its card."
    files = [f.name for f in folder.iterdir() if f.name.upper().startswith(("LICENSE", "LICENCE"))]
    beside = f"; see {', '.join(f'`{name}`' for name in sorted(files))} beside this file" if files else ""
    return f"That of the original model, whose folder has no card that names it{beside}."
