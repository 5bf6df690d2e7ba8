"""The tables of gptq_speed.py: medians over rounds, and moepress's phases against the matmul rate of this machine."""

import statistics
from collections.abc import Sequence
from typing import Any

from quantizers import TOOLS

FIGURES = ("wall_seconds", "seconds_quantize", "cpu_seconds", "peak_rss_bytes")


def rows_of(name: str, samples: Sequence[dict[str, Any]], tools: Sequence[str]) -> list[dict[str, Any]]:
    """One row a tool: medians over rounds, and ratios to moepress of the same round (their medians)."""
    rows = []
    ours = {s["round"]: s for s in samples if s["tool"] == "moepress"}
    for tool in tools:
        own = [s for s in samples if s["tool"] == tool]
        row: dict[str, Any] = {"model": name, "tool": tool, "version": own[0]["version"], "rounds": len(own)}
        row["weight_error"] = statistics.median(s["weight_error"] for s in own)
        for figure in FIGURES:
            values = [s[figure] for s in own]
            row[figure] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
            if ours:
                ratios = [s[figure] / ours[s["round"]][figure] for s in own]
                row[figure] |= {"ratio": statistics.median(ratios), "ratios": ratios}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown; in brackets the ratio to moepress."""
    lines = [
        "| | whole process | quantization alone | CPU time | peak RSS |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = []
        for figure in FIGURES:
            value, ratio = row[figure]["median"], row[figure].get("ratio")
            said = f"{value / 2**20:,.0f} MiB" if figure == "peak_rss_bytes" else f"{value:.1f} s"
            cells.append(said if ratio is None or row["tool"] == "moepress" else f"{said} ({ratio:.1f}x)")
        lines.append(f"| {TOOLS[row['tool']].named(row['version'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def phases_of(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """moepress's phases: medians over rounds, and each phase's FLOP/s as a share of the matmul rate of its round."""
    own = [s for s in samples if s["tool"] == "moepress"]
    if not own:
        return []
    tables = [{(p["phase"], p["background"]): p for p in s["phases"]} for s in own]
    rows = []
    for name, background in tables[0]:
        found = [
            (t[name, background], s["fp32_flops"]) for t, s in zip(tables, own, strict=True) if (name, background) in t
        ]
        speeds = [(p["flops"] / p["seconds"], p["flops"] / p["seconds"] / rate) for p, rate in found if p["seconds"]]
        row = {"phase": name, "background": background, "flops": statistics.median(p["flops"] for p, _ in found)}
        row["seconds"] = statistics.median(p["seconds"] for p, _ in found)
        row["flops_per_second"] = statistics.median(speed for speed, _ in speeds) if speeds else None
        row["of_matmul"] = statistics.median(share for _, share in speeds) if speeds else None
        rows.append(row)
    whole = {"phase": "all", "background": False, "flops": sum(r["flops"] for r in rows)}
    whole["seconds"] = statistics.median(sum(p["seconds"] for p in t.values() if not p["background"]) for t in tables)
    whole["flops_per_second"] = whole["flops"] / whole["seconds"]
    whole["of_matmul"] = whole["flops_per_second"] / statistics.median(s["fp32_flops"] for s in own)
    ordered = sorted(rows, key=lambda row: (row["background"], -row["seconds"]))
    return [*ordered, whole]


def phases_table(rows: Sequence[dict[str, Any]]) -> str:
    """The phases in Markdown; the last row is all of them, less those that ran beside the others."""
    whole = rows[-1]["seconds"]
    lines = ["| phase | seconds | share | GFLOP | GFLOP/s | of fp32 matmul |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        cells = [f"{row['phase']} (beside)" if row["background"] else row["phase"], f"{row['seconds']:.2f}"]
        cells.append("" if row["background"] else f"{row['seconds'] / whole:.0%}")
        counted = [f"{row['flops'] / 1e9:,.1f}", f"{row['flops_per_second'] / 1e9:,.1f}", f"{row['of_matmul']:.0%}"]
        cells += counted if row["flops"] and row["flops_per_second"] else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
