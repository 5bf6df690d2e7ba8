"""The table of docs/runtimes.md, of what `pytest tests/runtimes --record benchmarks/results/runtimes.json` measured.

python tests/runtimes/table.py        # prints it
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "runtimes.json"
ORDER = ("transformers", "vLLM", "GPTQModel", "mlx-lm", "ONNX Runtime", "onnxruntime-genai", "llama.cpp")
WRONG, ROUNDED = 0.3, 1e-3
"""Differences of log probabilities, above which a model is another one (mean), or something is rounded (largest)."""
Row = Mapping[str, Any]


def table(rows: list[Row]) -> str:
    """Markdown: a row for each layout, a column for each runtime that was run."""
    runtimes = [name for name in ORDER if any(row["runtime"] == name for row in rows)]
    layouts = list(dict.fromkeys(row["layout"] for row in sorted(rows, key=_place)))
    lines = ["| layout | " + " | ".join(runtimes) + " |", "|---" * (len(runtimes) + 1) + "|"]
    for layout in layouts:
        cells = [
            _cell([row for row in rows if row["layout"] == layout and row["runtime"] == name]) for name in runtimes
        ]
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    lines.append("| **version** | " + " | ".join(_once(rows, name, "version") for name in runtimes) + " |")
    lines.append("| **run on** | " + " | ".join(_once(rows, name, "date") for name in runtimes) + " |")
    return "\n".join(lines)


_LAYOUTS = ("original", "pruned", "CT", "NVFP4", "MXFP4", "GPTQ", "ONNX", "GGUF", "MLX")


def _place(row: Row) -> tuple[int, int, str]:
    first, _, rest = row["layout"].partition(" ")
    bits = int(rest[0]) if rest[:1].isdigit() else 0
    return _LAYOUTS.index(first), -10 if bits == 4 else bits, row["layout"]


def _cell(rows: Iterable[Row]) -> str:
    """Models by what came of them; the largest difference of those that load right."""
    right, other = list[Row](), dict[str, list[str]]()
    for row in rows:
        if row.get("refuses"):
            other.setdefault("refuses", []).append(row["model"])
        elif row["mean"] > WRONG:
            other.setdefault("**wrong**", []).append(row["model"])
        else:
            right.append(row)
    largest, mean = (max((row[key] for row in right), default=0.0) for key in ("largest", "mean"))
    parts = [f"{largest:.1g}" + (f" (mean {mean:.1g})" if largest > ROUNDED else "")] if right else []
    parts += [f"{said} ({', '.join(models)})" if right or len(other) > 1 else said for said, models in other.items()]
    return "; ".join(parts)


def _once(rows: Iterable[Row], runtime: str, key: str) -> str:
    return ", ".join(dict.fromkeys(row[key] for row in rows if row["runtime"] == runtime))


if __name__ == "__main__":
    print(table(json.loads(RESULTS.read_text())))
