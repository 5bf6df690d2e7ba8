"""Ideas tried beside the solver's own loss: the end of the network, the layer's end, the routers, rotation.

    python benchmarks/end_losses.py [--model bench|wide|demo] [--bits 4 3 2] [--seeds 0 1 2] [--trials NAME ...]

What the solver minimises counts all outputs of a matrix alike. A trial changes that (`ends` finds what outputs cost,
the solver rounds by it), or turns the model before (`rotation`). Setting and figures are those of gptq_quality.py:
every Linear but router, kv_b_proj and lm_head, group size 64, 64 windows of 512 tokens, KL against the model as it was.
Needs native loops, and memory for the whole model in fp32 with its gradients. --quick is the demo with little text.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ends import Ends, gather_ends, layer_key
from gptq_quality import Setting, figures, full, original, quick, scores, subject, summary, table
from layer_ends import gather_layers
from quantizers import INCLUDE, Task, calibration_corpus
from rotation import rotate
from setting import RESULTS, TRAINED, machine, trained_model
from sided import Loss, sided

from moepress.calibration.hessian import HessianOptions
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.options import EFFORTS
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import Machine, Output
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.validation.quality.measure import Subject

KINDS = frozenset(Include(part) for part in INCLUDE)
FIRST = "match original"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A row of the table.

    Attributes:
        match: original, or own (`--match`).
        loss: what is added to the loss.
        of: which factor `loss.end` takes: `network`, of the network's end; `few`, the same from a quarter of the
            windows and one label for each token; `layer`, of the layer's end (gate and up alone); `metrics`, the same
            with one metric for each layer's output, taken from `few`; `last`, with that of the last layer for all.
        only: parts of names of the matrices that have a factor; all without.
        turned: the model is rotated before.
        effort: `--effort`.
    """

    match: str = "original"
    loss: Loss = field(default_factory=Loss)
    of: str = "network"
    only: tuple[str, ...] = ("",)
    turned: bool = False
    effort: str = "normal"


END = Loss(end=1.0, floor=0.3)
TRIALS = {
    FIRST: Trial(),
    "match own": Trial(match="own"),
    "end": Trial(loss=END),
    "effort high": Trial(effort="high"),
    "end, effort high": Trial(loss=END, effort="high"),
    "end, match own": Trial(loss=END, match="own"),
    "end, floor 0.1": Trial(loss=replace(END, floor=0.1)),
    "end, floor 1": Trial(loss=replace(END, floor=1.0)),
    "end of MLPs, match own": Trial(loss=END, match="own", only=("gate_proj", "down_proj")),
    "end of gate and up, match own": Trial(loss=END, match="own", only=("gate_proj",)),
    "layer's end, match own": Trial(loss=END, match="own", of="layer"),
    "end by a quarter of the windows, match own": Trial(loss=END, match="own", of="few"),
    "layer's end by metrics, match own": Trial(loss=END, match="own", of="metrics"),
    "layer's end by the last metric, match own": Trial(loss=END, match="own", of="last"),
    "layer's end by the last metric": Trial(loss=END, of="last"),
    "token weights": Trial(loss=Loss(power=0.5)),
    "token weights, match own": Trial(loss=Loss(power=0.5), match="own"),
    "end and token weights": Trial(loss=replace(END, power=0.5)),
    "routers": Trial(loss=Loss(routers=1.0, floor=1.0)),
    "routers 0.3": Trial(loss=Loss(routers=0.3, floor=1.0)),
    "end and routers": Trial(loss=replace(END, routers=0.3)),
    "rotated": Trial(turned=True),
    "rotated, match own": Trial(match="own", turned=True),
}
UNQUANTIZED = "rotated, not quantized"  # what storing the turned weights in the model's dtype costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a model before it is quantized: the routers' factors, and those of `Trial.of`."""

    routers: Ends
    ends: Mapping[str, Ends]

    def chosen(self, trial: Trial) -> Ends:
        """Those of the matrices that a trial is about."""
        ends = self.ends.get(trial.of, Ends())
        sides = {k: v for k, v in ends.sides.items() if any(part in name for part in trial.only for name in k)}
        return Ends(sides=sides, tokens=ends.tokens)


def known_of(setting: Setting, trials: Sequence[str], seed: int) -> Known:
    """As much as trials need, from forward and backward passes over the calibration windows of a seed."""
    scheme = Scheme(bits=4, group_size=setting.group_size)
    given = Task(model=setting.model, scheme=scheme, calibration=setting.calibration(seed), threads=setting.threads)
    source, windows, folder = open_checkpoint(setting.model), calibration_corpus(given).windows, str(setting.model)
    wanted = {t.of for t in (TRIALS[name] for name in trials if name != UNQUANTIZED) if t.loss != Loss()}
    routers, ends = Ends(), dict[str, Ends]()
    if "network" in wanted:
        ends["network"], routers = gather_ends(source, folder, windows, KINDS)
    if "layer" in wanted:
        ends["layer"] = gather_layers(source, folder, windows)
    if wanted & {"few", "metrics", "last"}:
        ends["few"], _ = gather_ends(source, folder, windows[: len(windows) // 4], KINDS, samples=1)
        sides = [ends["few"].sides[layer_key(layer)] for layer in range(source.shape.layers)]
        metrics = [side_DD / side_DD.diagonal().mean() for side_DD in sides]
        for name, own in (("metrics", metrics), ("last", metrics[-1:] * len(metrics))):
            if name in wanted:
                ends[name] = gather_layers(source, folder, windows[: len(windows) // 2], dict(enumerate(own)))
    return Known(routers=routers, ends=ends)


def runs_of(setting: Setting, known: Known, trials: Sequence[str], bits: int, seed: int, work: Path) -> list[Any]:
    """All trials at so many bits on the windows of a seed."""
    subjects: list[Subject] = []
    turned = work / "turned"
    if not turned.exists():
        rotate(setting.model, turned)
    for name in trials:
        if name == UNQUANTIZED:
            subjects.append(replace(original(replace(setting, model=turned)), label=name))
            continue
        trial, out = TRIALS[name], work / f"{bits}-{seed}-{len(subjects)}"
        request = QuantizeRequest(
            scheme=Scheme(bits=bits, group_size=setting.group_size),
            include=KINDS,
            solver=EFFORTS[trial.effort],
            hessian=HessianOptions(asymmetry=float(trial.match == "original")),
        )
        model = str(turned if trial.turned else setting.model)
        with sided(trial.loss, known.chosen(trial), known.routers):
            quantize_stage(model, Output(folder=out), None, request, setting.calibration(seed), Machine())
        subjects.append(subject(name, out))
    found = scores([original(setting), *subjects], setting.evaluation(), work)
    return [{"trial": one.label, "bits": bits, "seed": seed, **figures(found, one)} for one in subjects]


def write(file: Path, model: str, runs: Sequence[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Put runs beside those of the file; the rows of this model over all of them."""
    document = json.loads(file.read_text()) if file.exists() else {}
    new = {(run["trial"], run["bits"], run["seed"]) for run in runs}
    before = document.get(model, {}).get("runs", [])
    whole = [run for run in before if (run["trial"], run["bits"], run["seed"]) not in new] + list(runs)
    whole.sort(key=lambda run: (-run["bits"], [*TRIALS, UNQUANTIZED].index(run["trial"]), run["seed"]))
    rows = summary(whole, "trial", FIRST)
    document[model] = {"machine": {**machine(), "model": model}, **about, "rows": rows, "runs": whole}
    file.write_text(json.dumps(document, indent=2) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TRAINED, help="of ../shared (default: bench)")
    parser.add_argument("--trials", nargs="+", choices=[*TRIALS, UNQUANTIZED], default=[FIRST, "end"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the demo with little text")
    parser.add_argument("--json", type=Path, help="file (default: benchmarks/results/end_losses.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = (quick if options.quick else full)(options.threads)
    if options.model is not None and not options.quick:
        setting = replace(setting, model=trained_model(options.model))
    about = {"group_size": setting.group_size, "calibration_tokens": setting.windows * setting.window}
    about |= {"window": setting.window, "evaluation_windows": setting.evaluation_windows}
    with tempfile.TemporaryDirectory(prefix="end-losses-") as name:
        file = options.json or (Path(name) / "runs.json" if options.quick else RESULTS / "end_losses.json")
        rows: list[dict[str, Any]] = []
        for seed in options.seeds:
            known = known_of(setting, options.trials, seed)
            for bits in options.bits:
                runs = runs_of(setting, known, options.trials, bits, seed, Path(name))
                rows = write(file, setting.model.name, runs, about)
                print(f"{bits} bits, seed {seed}: {len(runs)} trials", file=sys.stderr, flush=True)
        print(table(rows, "trial", FIRST))


if __name__ == "__main__":
    main()
