"""Click options that commands share by name, and the parsing of their values. Imports nothing heavy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moepress.commands.attempt import Attempt
from moepress.commands.completers import complete_list, complete_models, complete_targets
from moepress.compress.gptq.block_choice import GRIDS, PRESETS
from moepress.errors import UsageError
from moepress.runs.byte_sizes import parse_bytes, parse_share
from moepress.validation.rules.findings import Runtime

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
CRITERIA = ("reap", "reap-sum", "easy-ep", "frequency", "gate", "ean", "man", "loo")
PARTS = ("attention", "shared", "dense", "lm_head")
NOTHING = "none"
MOST_END_WEIGHT = 1000
"""As in `calibration.hessian`, which needs torch."""
INCLUDES = ("auto", NOTHING, *PARTS)


def parse_weights(pairs: tuple[str, ...]) -> dict[str, float]:
    """`NAME=NUMBER` pairs of --domain-weight.

    Raises:
        UsageError: a pair is not of that form.
    """
    weights = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise UsageError(f"--domain-weight {pair!r} is not of the form NAME=NUMBER; write for example python=3.")
    return weights


def protected_names(values: tuple[str, ...]) -> tuple[str, ...]:
    """The domains of --protect, each once: with commas between them, or the option again."""
    names = [name.strip() for value in values for name in value.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def _stack(*options: Decorator) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_PATH = click.Path(path_type=Path)

json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def _level(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def told(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            from moepress.runs.progress import Level, set_level

            set_level(Level(level))

    return told


_flag: dict[str, Any] = {"is_flag": True, "expose_value": False}
talk_options: Decorator = _stack(
    click.option("-q", "--quiet", **_flag, callback=_level(0), help="No progress and no notes; errors alone."),
    click.option("-v", "--verbose", **_flag, callback=_level(2), help="In a log, a line for every step, however fast."),
)
dry_run_option: Decorator = click.option(
    "--dry-run", is_flag=True, help="Check everything and print the time, memory and disk it would take; write nothing."
)
timings_option: Decorator = click.option(
    "--timings", type=_PATH, metavar="FILE", help="Write to FILE, as JSON, where the time went by layer and phase."
)
targets_file_option: Decorator = click.option(
    "--targets-file",
    type=_PATH,
    metavar="FILE",
    help="Your own GPUs, TOML in the form of `moepress targets -h`; a row with an id of the table takes its place.",
)
force_option: Decorator = click.option("--force", is_flag=True, help="Replace a file of that name.")
nonfinite_option: Decorator = click.option(
    "--allow-nonfinite", is_flag=True, help="Go on with NaN or Inf in the weights."
)


def model_argument(name: str = "model", *, required: bool = True) -> Decorator:
    """The folder of a model, or `demo`, which shells complete."""
    return click.argument(name, required=required, shell_complete=complete_models)


def onnx_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--for, --experts, --accuracy-level and --no-check of `export --to onnx`."""
    return _stack(
        click.option(
            "--for",
            "preset",
            type=click.Choice(["cpu", "cuda"]),
            default="cpu",
            help="cpu: an fp32 graph; cuda: an fp16 graph. The codes are the same.",
        ),
        click.option(
            "--experts",
            "kernel",
            type=click.Choice(["qmoe", "loop"]),
            default="qmoe",
            help="qmoe: a layer's experts as one fused node; loop: as matrices of their own, for providers without it.",
        ),
        click.option(
            "--accuracy-level",
            type=click.Choice(["0", "4"]),
            default="0",
            help="On the CPU: 0 keeps activations in fp32; 4 rounds them to int8, faster and less exact.",
        ),
        click.option("--no-check", is_flag=True, help="Leave out the self-check in ONNX Runtime."),
    )(function)


grid_option: Decorator = click.option(
    "--grid",
    type=click.Choice([*GRIDS, *PRESETS]),
    help="Solve on a grid of GGUF in place of --bits: a type (lower case) for what is quantized, or a mix (capitals) "
    "for the whole model, embeddings and head too, as llama-quantize mixes them. The result is for --to gguf.",
)
gguf_options: Decorator = _stack(
    click.option(
        "--outtype",
        type=click.Choice(["auto", "f32"]),
        default="auto",
        help="auto: codes as they are, the rest in its own dtype; f32: everything multiplied out, to compare with.",
    ),
    click.option(
        "--split-max-size",
        metavar="SIZE",
        callback=lambda _context, _parameter, value: parse_bytes(value, "--split-max-size"),
        help="Most that a file may hold, such as 48GB; without it there is one file.",
    ),
)
push_options: Decorator = _stack(
    click.option(
        "--push",
        metavar="OWNER/NAME",
        help="Upload the result to this repository on the Hugging Face hub once it is whole; made if there is none.",
    ),
    click.option("--private", is_flag=True, help="Where --push has to make the repository, make it private."),
)


def _remember(context: click.Context, _parameter: click.Parameter, folder: Path) -> Path:
    """Let the last resort for bugs know where the work is done."""
    if isinstance(context.obj, Attempt):
        context.obj.output = folder
    return folder


def output_options(what: str) -> Decorator:
    """-o, --resume and --force."""
    return _stack(
        click.option("-o", "--output", required=True, type=_PATH, help=what, callback=_remember),
        click.option("--resume", is_flag=True, help="Go on with a run that was interrupted."),
        click.option("--force", is_flag=True, help="Replace an output that is there; throw an unfinished run away."),
    )


calibration_options: Decorator = _stack(
    click.option(
        "--calibration",
        multiple=True,
        metavar="FILE|DIR|DATASET",
        help="Text the experts are judged by: .txt, .json(l), .csv, .parquet, a folder, or a hub data set. Repeatable. "
        "Without it the embedded demo text is used, and the result says so.",
    ),
    click.option(
        "--domain", multiple=True, metavar="NAME=FILE", help="Calibration text of a named domain. Repeatable."
    ),
    click.option(
        "--tokens", type=click.IntRange(1), help="Calibration tokens in all.  [default: 131072; embedded: 32768]"
    ),
    click.option("--window", type=click.IntRange(2), help="Tokens per sequence.  [default: the context, at most 2048]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Chooses the windows."),
)

device_options: Decorator = _stack(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda|mps",
        shell_complete=complete_list("auto", "cpu", "cuda", "mps"),
        help="Where the layers run.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Compute dtype: auto is float32 on the CPU and bfloat16 elsewhere.",
    ),
)

machine_options: Decorator = _stack(
    device_options,
    click.option(
        "--max-memory", metavar="SIZE", help="Memory to work in, such as 8GiB.  [default: half of what is free]"
    ),
)


class _Share(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click alone
    """A share, as a number or in per cent."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """0.75 and 75% are the same."""
        if isinstance(value, float):
            return value
        try:
            return parse_share(str(value))
        except ValueError:
            self.fail(f"{value!r} is no share; write 0.75 or 75%.", param, ctx)


selection_options: Decorator = _stack(
    click.option("--keep", type=_Share(), metavar="SHARE", help="Share of experts that stay, such as 0.75 or 75%."),
    click.option("--experts", type=int, metavar="N", help="Number of experts that stay in every layer."),
    click.option(
        "--criterion",
        type=click.Choice(CRITERIA),
        help="What an expert is worth.  [default: reap; easy-ep when domain weights differ]",
    ),
    click.option("--domain-weight", multiple=True, metavar="NAME=NUMBER", help="How much a domain counts. Repeatable."),
    click.option(
        "--protect",
        multiple=True,
        metavar="NAMES",
        help="Domains that must not lose more than --max-domain-loss: their weights are raised until they do not, and "
        "where that is not enough there is no plan. With commas between them; repeatable.",
    ),
    click.option(
        "--max-domain-loss",
        metavar="LIMIT",
        help="What they may lose: 2x, twice the mean damage of the other domains, or 10%, of their experts' weighted "
        "output.  [default: 2x]",
    ),
    click.option(
        "--groups",
        type=click.Choice(["balanced", "degroup"]),
        default="balanced",
        show_default=True,
        help="For grouped routers: keep as many in every group, or drop the groups.",
    ),
)

budget_options: Decorator = _stack(
    click.option(
        "--budget",
        metavar="SIZE",
        help="Choose experts and bits so that the weights take no more, such as 12GiB, at the least estimated loss. "
        "--keep or --experts leave it the bits alone, --bits the experts alone.",
    ),
    click.option(
        "--target",
        metavar="GPU",
        shell_complete=complete_targets,
        help="The same for a GPU of `moepress targets`, such as rtx-4060-ti-16gb.",
    ),
    click.option(
        "--context",
        type=click.IntRange(1),
        help="Tokens in the KV cache beside the weights.  [default: 8192 with --target, else no cache]",
    ),
    click.option(
        "--runtime",
        type=click.Choice([runtime.value for runtime in Runtime]),
        help="What is to load the result: no other bits are chosen than it takes.  [default: with --target 4 and 8 "
        "bits, which vLLM, SGLang and llama.cpp load; with --budget any]",
    ),
    click.option(
        "--mixed-bits",
        is_flag=True,
        help="Let the bits differ by layer. vLLM and SGLang take that; transformers loads it wrong without an error.",
    ),
)


def _take_bits(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """The experts' bits; those of other parts become `part_bits`, an option that nobody types."""
    try:
        bits, parts = parse_bits(value)
    except UsageError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    context.params["part_bits"] = parts
    if bits is None and parameter.name is not None:  # named were parts alone: the experts' are as open as without it
        context.set_parameter_source(parameter.name, click.core.ParameterSource.DEFAULT)
    return bits or 4


def parse_bits(text: str) -> tuple[int | None, dict[str, int]]:
    """`4`, `4,attention=8` or `attention=8`: the experts' bits, and those of other parts.

    Raises:
        UsageError: it is none of these.
    """
    bits, parts = None, dict[str, int]()
    for word in text.split(","):
        part, equals, number = word.strip().rpartition("=")
        if (
            not number.strip().isdecimal()
            or (equals and part.strip() not in PARTS)
            or (not equals and bits is not None)
        ):
            known = f"one of {', '.join(PARTS)}, an equals sign and its bits"
            raise UsageError(f"{word.strip()!r} is not a number of bits, nor {known}; write for example 4,attention=8.")
        if equals:
            parts[part.strip()] = int(number)
        else:
            bits = int(number)
    return bits, parts


scheme_options: Decorator = _stack(
    click.option(
        "--bits",
        metavar="BITS",
        default="4",
        show_default=True,
        callback=_take_bits,
        help="Bits per weight: 2, 3, 4 or 8. Parts besides the routed experts may have others: 4,attention=8,shared=4.",
    ),
    click.option(
        "--group-size", type=int, default=128, show_default=True, help="Input columns that share a scale; -1: all."
    ),
)

float_option: Decorator = click.option(
    "--scheme",
    type=click.Choice(["nvfp4", "mxfp4"]),
    help="4-bit floats in place of --bits: nvfp4, whose groups of 16 share an fp8 scale (4.5 bits a weight), or mxfp4, "
    "whose groups of 32 share a power of two (4.25 bits). Weights alone, of all parts that --include names or auto "
    "finds; activations stay as they are. For vLLM; experts that are MXFP4 already keep their bytes with mxfp4.",
)

include_option: Decorator = click.option(
    "--include",
    multiple=True,
    type=click.Choice(INCLUDES),
    default=("auto",),
    show_default=True,
    help="What is quantized besides the routed experts. auto: attention, shared experts and dense MLPs, at 8 bits; "
    "none: nothing; a part by its name, at --bits. Repeatable.",
)

match_option: Decorator = click.option(
    "--match",
    type=click.Choice(["auto", "own", "original"]),
    default="auto",
    show_default=True,
    help="What a quantized matrix's output is to meet: own, that of the exact matrix on the same inputs, which came "
    "through quantized layers; original, that of the exact matrix on the original model's inputs, which mends what "
    "the layers before did. original runs both models side by side: up to twice the time, and twice the token buffers. "
    "auto takes original for 4 bits and fewer, but with --effort fast.",
)

workers_option: Decorator = click.option(
    "--workers",
    type=click.IntRange(1),
    help="Quantize by so many processes of this machine, each with its share of the threads and of --max-memory. The "
    "bytes are the same. For several machines see `moepress plan-work -h`.",
)

store_option: Decorator = click.option(
    "--store", required=True, metavar="URL", help="A folder that all workers see, or s3://, gs://, az:// BUCKET/PATH."
)

independent_option: Decorator = click.option(
    "--independent-layers",
    is_flag=True,
    help="Solve every layer on what reaches it in the original model, so that no layer waits for another: for many "
    "machines (see docs/scale.md). What earlier layers lost is then not mended by later ones.",
)

effort_option: Decorator = click.option(
    "--effort",
    type=click.Choice(["fast", "normal", "high", "max"]),
    default="normal",
    show_default=True,
    help="How long codes are looked for. normal fits every scale to its codes once. fast does not, and --match auto is "
    "then own: half of the time or less, a fifth to a third more divergence. high lets codes leave what a descent ends "
    "in, by annealed sweeps: up to 1.5 times as long, a few per cent less. max asks what errors cost at the end of the "
    "network, by a backward pass through the model before: about twice as long, a fifth to a quarter less.",
)


def _end_weight(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if not 1 <= value <= MOST_END_WEIGHT:  # neither is NaN
        raise UsageError(f"--end-weight {value:g} is not possible; give a number from 1 (off) to {MOST_END_WEIGHT}.")
    return value


end_weight_option: Decorator = click.option(
    "--end-weight",
    type=float,
    default=1.0,
    show_default=True,
    callback=_end_weight,
    help="How many times tokens around the ends of reasoning and of answers in the calibration text count in the "
    "Hessians, from 1 (as any other) to 1000; give text with such ends, as `calibration make` writes. That it helps "
    "was not measured.",
)

positive_option: Decorator = click.option(
    "--positive-scales",
    is_flag=True,
    help="Scales of one sign, for readers that take no others. Codes reach one step further down than up; by default a "
    "negative scale turns that to where a group's largest weight is: less is lost, and all known loaders read it.",
)

asymmetric_option: Decorator = click.option(
    "--asymmetric",
    is_flag=True,
    help="A zero point beside every scale, so that codes lie where a group's weights are: a little less is lost at 4 "
    "bits, hardly less at 3 and 2. It costs as many bits a group as a code has, and fewer runtimes read it: `check` "
    "says which.",
)

mtp_option: Decorator = click.option(
    "--mtp",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Multi-token-prediction layers, which draft tokens for speculative decoding, of a model that has some: keep "
    "them with as many experts as the others, or drop them.",
)

repair_option: Decorator = click.option(
    "--repair",
    metavar="PARTS",
    shell_complete=complete_list("gain", "bias", "router", "down"),
    help="Mend what pruning changes, with calibration text: gain (a factor for every expert that stays), bias (the "
    "correction bias of sigmoid routers), router (the routers' rows), down (the down projections of the experts that "
    "stay; without gain), or several with commas.  [default: nothing]",
)

task_options: Decorator = _stack(
    click.option(
        "--tasks",
        metavar="NAME,FILE,...",
        help="Ask both models the same items of tasks: names and groups of lm-evaluation-harness (the extra `eval`), "
        "its YAML files, folders of them; or moepress_continuation and moepress_sums, over embedded text, which need "
        "no extra.",
    ),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N items of each task."),
    click.option("--chat", is_flag=True, help="Write the tasks' prompts with the tokenizer's chat template."),
    click.option(
        "--min-recovery", metavar="SHARE", help="Fail when a task keeps less of its score before, such as 95%."
    ),
)

endpoint_options: Decorator = _stack(
    click.option(
        "--endpoint",
        metavar="URL",
        help="Ask AFTER the tasks through a server that runs it (vLLM, SGLang, llama-server; OpenAI's completions), "
        "such as http://localhost:8000/v1. Everything else is measured on the folder.",
    ),
    click.option("--endpoint-before", metavar="URL", help="The same for BEFORE, which is loaded here otherwise."),
)

evaluation_options: Decorator = _stack(
    click.option(
        "--data",
        multiple=True,
        metavar="FILE|DIR|DATASET",
        help="Text the models are compared on. Repeatable. Without it the embedded evaluation text is used.",
    ),
    click.option("--data-domain", multiple=True, metavar="NAME=FILE", help="Evaluation text of a named domain."),
    click.option("--max-windows", type=click.IntRange(1), help="Evaluation windows per domain.  [default: all]"),
    click.option("--max-ppl-increase", metavar="SHARE", help="Fail when perplexity rises by more, such as 3%."),
    click.option("--max-kl", type=float, metavar="NATS", help="Fail when the mean KL divergence per token is larger."),
    click.option("--no-throughput", is_flag=True, help="Do not time prefill and decode, and write no sample text."),
)
