"""`moepress work`: one or more workers of a shared run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moepress.commands.console import emit, quiet_libraries, say
from moepress.commands.options import json_option, machine_options, store_option, talk_options
from moepress.commands.requests import machine_of, share_of
from moepress.commands.tables import human_bytes
from moepress.errors import UsageError


@click.command()
@store_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Fetch the result into this folder at the end.")
@click.option("--resume", is_flag=True, help="Go on with fetching into that folder.")
@click.option("--force", is_flag=True, help="Replace that folder, if moepress made it.")
@click.option(
    "--shard",
    default="0/1",
    show_default=True,
    metavar="I/N",
    help="Begin with every N-th task from the I-th on, as job I of an array of N; then go on with those of others.",
)
@click.option("--model", help="Where the model is on this machine, if elsewhere than where the work was planned.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for this worker's files while it works (default: in the store's folder, or the system's).",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of this worker (default: a thread per core).")
@click.option(
    "--lease",
    type=click.FloatRange(1),
    default=60.0,
    show_default=True,
    help="Seconds without a sign of life after which others take this worker's task.",
)
@click.option("--ray", is_flag=True, help="Start the workers on a Ray cluster (pip install 'moepress[ray]').")
@click.option(
    "--workers", type=click.IntRange(1), help="How many, with --ray (default: what the cluster has room for)."
)
@click.option("--parent", type=int, hidden=True, help="End, after a task, when this process is gone.")
@machine_options
@talk_options
@json_option
def work(store: str, output: Path | None, resume: bool, force: bool, **options: Any) -> None:
    """Do tasks of the run in a store until all are done, beside any number of other workers.

    Start as many as there are machines or GPUs, when and where you like; each takes what nobody does. One that is
    killed loses the task in its hands, which another takes when its lease is over. With -o the result is fetched into
    a folder once all tasks are done, as `moepress quantize` would have made it, byte for byte.

    \b
    Example:  moepress work --store /mnt/shared/run
              moepress work --store s3://bucket/run --shard 3/64 --max-memory 24GB
              moepress work --store s3://bucket/run -o quantized
    """
    if (resume or force) and output is None:
        raise UsageError("--resume and --force are for the folder of -o; a worker goes on without them.")
    share = share_of(options["shard"])
    if output is not None:
        from moepress.runs.output import check_output

        check_output(output, [], resume=resume, force=force)
    if options["workers"] and not options["ray"]:
        raise UsageError("--workers goes with --ray; start this command several times, or see `moepress quantize -h`.")
    quiet_libraries()
    from moepress.stages.places import Output
    from moepress.stages.work import Place, work_stage

    place = Place(
        share=share,
        scratch=options["scratch"],
        term_seconds=options["lease"],
        model=options["model"],
        threads=options["threads"],
        parent=options["parent"],
    )
    result = None if output is None else Output(folder=output, resume=resume, force=force)
    who = "This worker"
    if options["ray"]:
        from moepress.stages.workers import ray_stage

        found = ray_stage(store, machine_of(options), place, workers=options["workers"])
        who = f"{found['workers']:,} workers"
        if result is not None:
            found = {**work_stage(store, machine_of(options), place, result), **found}
    else:
        found = work_stage(store, machine_of(options), place, result)
    if options["as_json"]:
        emit(found)
        return
    say(f"{who} did {found['did']:,} of {found['tasks']:,} tasks; all are done.")
    if output is not None:
        sizes = ""
        if "bytes_after" in found:
            sizes = f": {human_bytes(found['bytes_before'])} -> {human_bytes(found['bytes_after'])}"
        say(f"{output} is there{sizes}.")
