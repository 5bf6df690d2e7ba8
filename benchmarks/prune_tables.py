"""Tables of prune_quality.py: seeds put together, rows held against each other, Markdown for docs/benchmarks.md."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

Row = Mapping[str, Any]
DEFAULT = "reap"


def flat(seeds: Mapping[str, Any]) -> list[Row]:
    """The rows of all seeds."""
    return [row for _, found in sorted(seeds.items()) for row in found["rows"]]


def means(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that agree in `names`, put together: one row each, in the order in which they first come."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in names), []).append(row)
    return [{**dict(zip(names, key, strict=True)), **together(some)} for key, some in cells.items()]


def together(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over seeds, and both errors of the change."""
    return {
        **{name: mean(r[name] for r in rows) for name in ("perplexity", "change", "kl")},
        "seed_error": error([r["change"] for r in rows]),
        "kl_seed_error": error([r["kl"] for r in rows]),
        "paired_error": math.sqrt(mean((r["paired_error"] or 0.0) ** 2 for r in rows)),
        "domains": {d: mean(r["domains"][d] for r in rows) for d in rows[0]["domains"]},
        "kl_by_domain": {d: mean(r["kl_by_domain"][d] for r in rows) for d in rows[0]["kl_by_domain"]},
    }


def error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def against(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """First rows held against second ones of the same seed: relative change of perplexity (as a logarithm) and KL."""
    logs = [math.log(a["perplexity"] / b["perplexity"]) for a, b in pairs]
    kls = [a["kl"] / b["kl"] - 1 for a, b in pairs]
    return {
        "cells": len(pairs),
        "perplexity": mean(logs),
        "perplexity_error": error(logs),
        "kl": mean(kls),
        "kl_error": error(kls),
        "better": sum(a["kl"] < b["kl"] for a, b in pairs),
    }


def paired(rows: Sequence[Row], chosen: Callable[[Row], Any], partner: Callable[[Row], Any]) -> list[dict[str, Any]]:
    """Rows by `chosen` (None: not among them), each with the row that `partner` names (criterion, repair) for it."""
    known = {(r["criterion"], r["repair"], r["keep"], r["seed"]): r for r in rows if r["criterion"] != "random"}
    groups: dict[Any, list[tuple[Row, Row]]] = {}
    for row in rows:
        key, other = chosen(row), known.get((*partner(row), row["keep"], row["seed"]))
        if key is not None and other is not None:
            groups.setdefault(key, []).append((row, other))
    return [{"keep": keep, "name": name, **against(pairs)} for (keep, name), pairs in groups.items()]


def criterion_effect(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every criterion, two rounds and chance against the default criterion, all without repair."""
    return paired(
        rows,
        lambda r: (r["keep"], r["criterion"]) if r["repair"] == "none" and r["criterion"] != DEFAULT else None,
        lambda r: (DEFAULT, "none"),
    )


def repair_effect(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every repair against the same keep set without it, over criteria and seeds."""
    return paired(
        rows,
        lambda r: (r["keep"], r["repair"]) if r["repair"] != "none" else None,
        lambda r: (r["criterion"], "none"),
    )


def rounds_effect(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Two rounds against one, by criterion."""
    return paired(
        rows,
        lambda r: (r["keep"], r["criterion"]) if "rounds" in r["criterion"] else None,
        lambda r: (r["criterion"].split(",")[0], "none"),
    )


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f" ± {value * 100:.{digits}f} %"


def changes(row: Row) -> str:
    """Cells of the change, its error over seeds, KL and its error over seeds."""
    seeds = "" if row["kl_seed_error"] is None else f" ± {row['kl_seed_error']:.4f}"
    change = f"{row['change'] * 100:+.2f}{percent(row['paired_error'])} | {percent(row['seed_error']).strip()}"
    return f"{change} | {row['kl']:.4f}{seeds} |"


def effects(rows: Sequence[Row], title: str) -> Iterator[str]:
    yield f"| experts | {title} | perplexity | KL | lower KL in |"
    yield "|---|---|---:|---:|---:|"
    for r in sorted(rows, key=lambda r: -r["keep"]):
        values = f"{r['perplexity'] * 100:+.2f}{percent(r['perplexity_error'])} | {r['kl'] * 100:+.1f}"
        cells = f"{values}{percent(r['kl_error'], 1)} | {r['better']} of {r['cells']} |"
        yield f"| {r['keep']:.0%} | {r['name']} | {cells}"
    yield ""


def pruning_table(original: Row, rows: Sequence[Row]) -> Iterator[str]:
    domains = list(original["domains"])
    yield "| experts | criterion | repair | " + " | ".join(domains) + " | overall | change | over seeds | KL |"
    yield "|---|---|---|" + "---:|" * (len(domains) + 4)
    cells = " | ".join(f"{value:.2f}" for value in original["domains"].values())
    yield f"| all | original |  | {cells} | {original['perplexity']:.2f} |  |  |  |"
    for r in sorted(rows, key=lambda r: (-r["keep"], r["kl"])):
        cells = " | ".join(f"{value:.2f}" for value in r["domains"].values())
        yield f"| {r['keep']:.0%} | {r['criterion']} | {r['repair']} | {cells} | {r['perplexity']:.2f} | {changes(r)}"
    yield ""


def bytes_table(original: Row, rows: Sequence[Row]) -> Iterator[str]:
    domains = list(original["domains"])
    yield "| MB | experts | criterion | bits | " + " | ".join(domains) + " | overall | change | over seeds | KL |"
    yield "|---:|---:|---|---:|" + "---:|" * (len(domains) + 4)
    for r in sorted(rows, key=lambda r: (-r["bytes"], -r["keep"])):
        what = f"| {r['bytes'] / 1e6:.2f} | {r['keep']:.0%} | {r['criterion']} | {r['bits']}"
        cells = " | ".join(f"{value:.2f}" for value in r["domains"].values())
        yield f"{what} | {cells} | {r['perplexity']:.2f} | {changes(r)}"
    yield ""


def markdown(parts: Mapping[str, Any]) -> Iterator[str]:
    """The results (part -> seed -> original and rows) as tables."""
    if found := parts.get("pruning"):
        rows, original = flat(found), next(iter(found.values()))["original"]
        cells = means(rows, ("keep", "criterion", "repair"))
        yield from pruning_table(original, [cell for cell in cells if cell["repair"] == "none"])
        yield from effects(criterion_effect(rows), f"criterion, against {DEFAULT}")
        mended = {cell["criterion"] for cell in cells if cell["repair"] != "none"}
        yield from pruning_table(original, [cell for cell in cells if cell["criterion"] in mended])
        yield from effects(repair_effect(rows), "repair, against none")
        yield from effects(rounds_effect(rows), "rounds, against one")
    if found := parts.get("bytes"):
        original = next(iter(found.values()))["original"]
        yield from bytes_table(original, means(flat(found), ("keep", "criterion", "bits", "bytes")))
