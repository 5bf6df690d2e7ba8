"""From options that several commands have to the requests that stages take. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.options import parse_weights, protected_names
from moepress.errors import UsageError
from moepress.runs.byte_sizes import parse_bytes

if TYPE_CHECKING:
    from moepress.calibration.profile import Profile
    from moepress.compress.gptq.include import Asked
    from moepress.compress.pruning.domains import Protection
    from moepress.compress.pruning.plan import Plan
    from moepress.compress.pruning.repair import Repair
    from moepress.converters.safetensors.scheme import Scheme
    from moepress.models.storage.mtp import Mtp
    from moepress.stages.places import Calibration, Machine
    from moepress.stages.plan import BudgetRequest
    from moepress.stages.push import Push


def thresholds_of(options: Mapping[str, Any]) -> dict[str, float]:
    """The limits that --max-ppl-increase, --max-kl and --max-loop-increase set; nothing where none is given."""
    from moepress.validation.quality.thresholds import parse_threshold

    given = {}
    for name, option in (("max_ppl_increase", "--max-ppl-increase"), ("max_loop_increase", "--max-loop-increase")):
        if options[name] is not None:
            given[name] = parse_threshold(options[name], option)
    if options["max_kl"] is not None:
        given["max_kl"] = float(options["max_kl"])
        if not 0 <= given["max_kl"] < float("inf"):
            raise UsageError(f"--max-kl {options['max_kl']} is not a divergence; give a number of nats, 0 or more.")
    return given


def share_of(text: str) -> tuple[int, int]:
    """I and N of --shard I/N.

    Raises:
        UsageError: it is none.
    """
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UsageError(f"--shard {text} is no share; give I/N with I from 0 to N - 1, such as 0/4.")
    return int(first), int(second)


def task_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """What --tasks, --limit, --chat and --min-recovery set, as a recipe names it; nothing where none is given.

    Raises:
        UsageError: there are no tasks that the others could be about, or a share is none.
    """
    from moepress.validation.quality.thresholds import parse_least

    names = tuple(dict.fromkeys(name.strip() for name in (options["tasks"] or "").split(",") if name.strip()))
    found: dict[str, Any] = {"tasks": names} if options["tasks"] is not None else {}
    if options["tasks"] is not None and not names:
        raise UsageError("--tasks names no task; give for example gsm8k, or a YAML file of lm-eval.")
    found |= {"limit": options["limit"]} if options["limit"] is not None else {}
    found |= {"chat": True} if options["chat"] else {}
    if options["min_recovery"] is not None:
        found["min_recovery"] = parse_least(options["min_recovery"], "--min-recovery")
    return found


def all_default(*names: str) -> bool:
    """Whether none of these options was given on the command line."""
    context = click.get_current_context()
    return all(context.get_parameter_source(n) is click.core.ParameterSource.DEFAULT for n in names)


def asked_of(options: Mapping[str, Any]) -> Asked:
    """What --include and the parts of --bits ask for."""
    from moepress.compress.gptq.include import asked_for

    return asked_for(options["include"], options["part_bits"])


def names_parts(options: Mapping[str, Any]) -> bool:
    """Whether the command line says what is quantized besides the routed experts."""
    return not all_default("include") or bool(options["part_bits"])


def floats_of(options: Mapping[str, Any], codes: str, *, floats: str = "--scheme") -> Scheme:
    """The scheme of 4-bit floats that --scheme or a plan names, see `floats_alone`.

    Raises:
        UsageError: another option says what codes are.
    """
    from moepress.converters.safetensors.scheme import Codes, floats_alone

    typed = {name: not all_default(name) for name in ("bits", "group_size")}
    return floats_alone(Codes(codes), {**options, **typed}, floats=floats)


def mtp_of(options: Mapping[str, Any]) -> Mtp:
    """What --mtp says is to become of the multi-token-prediction layer."""
    from moepress.models.storage.mtp import Mtp

    return Mtp(options["mtp"])


def repair_of(options: Mapping[str, Any]) -> frozenset[Repair]:
    """The parts of --repair, as a frozen set."""
    from moepress.compress.pruning.repair import Repair

    found = [part.strip() for part in (options["repair"] or "").split(",") if part.strip()]
    if not found:
        raise UsageError(f"--repair names no part; give {', '.join(Repair)}, or several with commas.")
    for part in found:
        if part not in list(Repair):
            raise UsageError(f"--repair {part} is not there; give {', '.join(Repair)}, or several with commas.")
    return frozenset(Repair(part) for part in found)


def push_of(options: Mapping[str, Any]) -> Push | None:
    """Where --push and --private say that the result goes, or None; asks the hub whether it may.

    Raises:
        UsageError: it may not.
        MoepressError: the hub cannot be asked.
    """
    if options["push"] is None and not options["private"]:
        return None
    from moepress.stages.push import check_push

    return check_push(options["push"], private=options["private"])


def calibration_of(options: Mapping[str, Any]) -> Calibration:
    """The calibration that --calibration, --domain, --tokens, --window and --seed describe."""
    from moepress.stages.places import Calibration

    return Calibration(
        sources=options["calibration"],
        domains=options["domain"],
        tokens=options["tokens"],
        window=options["window"],
        seed=options["seed"],
    )


def machine_of(options: Mapping[str, Any]) -> Machine:
    """The machine that --device, --dtype and --max-memory describe."""
    from moepress.stages.places import Machine

    return Machine(device=options["device"], dtype=options["dtype"], memory_bytes=parse_bytes(options["max_memory"]))


def plan_of(profile: Profile, options: Mapping[str, Any], *, quantized: bool) -> Plan:
    """A plan made of a profile with the options of selection, and of the scheme where it is quantized.

    With --budget or --target what these leave open is chosen; with --to gguf besides, a mix of GGUF's types.
    """
    scheme = _planned_scheme(options, quantized=quantized)
    if options.get("to") is not None and options.get("budget") is None and options.get("target") is None:
        raise UsageError("--to gguf chooses a mix of GGUF's types for a size; give --budget or --target too.")
    if options.get("budget") is not None or options.get("target") is not None:
        return _budgeted_plan(profile, options, quantized=quantized)
    if any(options.get(name) for name in ("context", "mixed_bits", "runtime")):
        raise UsageError("--context, --mixed-bits and --runtime go with --budget or --target only.")
    if options.get("targets_file") is not None:
        raise UsageError("--targets-file says what --target may name; give --target too, or leave it out.")
    from moepress.compress.budget.sizes import planned_linears, settled_parts
    from moepress.compress.gptq.include import IN_LAYERS
    from moepress.compress.pruning.plan import count_from_keep, make_plan
    from moepress.compress.pruning.scoring import Criterion, Groups

    groups, asked = Groups(options["groups"]), _planned_parts(options, quantized=quantized)
    keep, experts = options["keep"], options["experts"]
    size, floats = (scheme.group_size, scheme.floats) if scheme else (0, False)
    include, notes = settled_parts(asked, planned_linears(profile, IN_LAYERS), size, floats=floats)
    made = make_plan(
        profile,
        count=count_from_keep(profile.shape, keep, experts, degroup=groups is Groups.DEGROUP),
        criterion=Criterion(options["criterion"]) if options["criterion"] else None,
        weights=parse_weights(options["domain_weight"]),
        groups=groups,
        scheme=scheme,
        include=include,
        linears=planned_linears(profile, include),
        protection=protection_of(options),
    )
    return made.model_copy(update={"notes": [*made.notes, *notes]})


def protection_of(options: Mapping[str, Any]) -> Protection:
    """What --protect and --max-domain-loss ask for."""
    from moepress.compress.pruning.domains import protection

    return protection(protected_names(options["protect"]), options["max_domain_loss"])


def _planned_scheme(options: Mapping[str, Any], *, quantized: bool) -> Scheme | None:
    """What a plan without a budget says of codes."""
    from moepress.converters.safetensors.scheme import Scheme

    if options.get("scheme") is not None:
        return floats_of({**options, "types": options["to"]}, options["scheme"])
    return Scheme(bits=options["bits"], group_size=options["group_size"]) if quantized else None


def _planned_parts(options: Mapping[str, Any], *, quantized: bool) -> Asked:
    """What a plan counts as quantized besides the experts; commands that only prune have no such option."""
    from moepress.compress.gptq.include import Asked

    if quantized:
        return asked_of(options)
    if "include" in options and names_parts(options):
        raise UsageError("--include says what else is quantized; leave it out with --no-quantization.")
    return Asked()


def _planned_widths(request: BudgetRequest, options: Mapping[str, Any], *, quantized: bool) -> dict[str, Any]:
    """What a `Wish` says of bits: none, those that were named, or those that the runtime loads."""
    from moepress.stages.plan import loadable
    from moepress.validation.rules.findings import Runtime

    if not quantized:
        return {"widths": (None,)}
    if not all_default("bits"):
        return {"widths": (options["bits"],)}
    named = options.get("runtime")
    return loadable(request, None if named is None else Runtime(named))


def _budgeted_plan(profile: Profile, options: Mapping[str, Any], *, quantized: bool) -> Plan:
    from moepress.compress.pruning.scoring import Criterion, Groups
    from moepress.stages.plan import BudgetRequest, Wish, mix_within, plan_within

    mixing = options.get("to") is not None
    if mixing and not (quantized and all_default("bits", "group_size") and not options["mixed_bits"]):
        raise UsageError(
            "--to gguf chooses the type of every matrix; leave out --bits, --group-size, --mixed-bits and "
            "--no-quantization."
        )
    if mixing and options["runtime"] not in (None, "llama.cpp"):
        raise UsageError("--to gguf chooses types that llama.cpp loads; leave out --runtime.")
    if mixing and names_parts(options):
        raise UsageError("--to gguf mixes types for the whole model; leave out --include.")
    if options["mixed_bits"] and not (quantized and all_default("bits")):
        raise UsageError("--mixed-bits chooses the bits of every layer; leave out --bits and --no-quantization.")
    asked = _planned_parts(options, quantized=quantized)
    request = BudgetRequest(
        limit_bytes=parse_bytes(options["budget"], "--budget"),
        target=options["target"],
        context=options["context"],
        targets_file=options["targets_file"],
    )
    wish = Wish(
        keep=options["keep"],
        experts=options["experts"],
        **_planned_widths(request, options, quantized=quantized),
        group_size=None if all_default("group_size") else options["group_size"],
        mixed=options["mixed_bits"],
        criterion=Criterion(options["criterion"]) if options["criterion"] else None,
        weights=parse_weights(options["domain_weight"]),
        groups=Groups(options["groups"]),
        include=asked.parts,
        auto=asked.auto,
        protection=protection_of(options),
    )
    return mix_within(profile, request, wish) if mixing else plan_within(profile, request, wish)
