"""Runs a config's stages in order: python -m minixmd.train config.py [stage.field=value …]

Under torchrun every process computes its share of a stage's shards; the first does all the rest.
"""
import argparse
import os
import shutil
import sys
import traceback
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial

from minixmd.config import TRAINING, Answers, Evaluate, FactCheck, Label, Report, Switch, Toy, Traces
from minixmd.config.load import load_config
from minixmd.config.references import MODELS, check_files, dependencies, input_paths, resolve, select
from minixmd.dryrun.plan import dry_run
from minixmd.dryrun.slots import settle_slots
from minixmd.models.attention import describe_attention
from minixmd.models.hub import pinned
from minixmd.report import gather as report
from minixmd.runs import distributed
from minixmd.runs.device import describe_device, out_of_memory, prepare_backends
from minixmd.runs.heartbeat import unwatched
from minixmd.runs.records import append_jsonl
from minixmd.runs.stage_directory import begin, finish
from minixmd.stages import answers, evaluate, factcheck, label, switch, traces
from minixmd.stages.input_checks import check_inputs
from minixmd.toy import pretrain, trial
from minixmd.train import train

RUN = {Toy: pretrain.run, Evaluate: evaluate.run, Answers: answers.run, Label: label.run, Traces: traces.run,
       FactCheck: factcheck.run, Switch: switch.run, Report: report.run} | dict.fromkeys(TRAINING, train)


def main(argv=None):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m minixmd.train",
                                     description="Run the stages of a config, or of a bundled recipe.")
    parser.add_argument("config", help="a Python file that defines stages = […], or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="stage.field=value",
                        help="also field=value (every stage that has the field) and run_dir=path")
    parser.add_argument("--dry-run", action="store_true",
                        help="only check the config and print its prompts, memory and hours; needs no weights or data")
    parser.add_argument("--trial", action="store_true",
                        help="run every stage on a few clips, with stand-ins for models and data that are not here")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages and what they need")
    parser.add_argument("--keep-going", action="store_true",
                        help="run also after a stage has failed what does not need it; the status is then 1")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of --dry-run: on how many (default 1)")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS",
                        help="of several processes: one that makes no progress for so long ends the run (default 1800)")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    args = parser.parse_intermixed_args(argv)  # overrides may follow a flag
    prepare_backends()
    rank = 0
    failed = {}  # name of a stage -> why it failed; with --keep-going alone
    try:
        rank = 0 if args.dry_run else distributed.init(os.environ, args.timeout)
        only = [name for name in args.only or () if "=" not in name]
        overrides = args.overrides + [name for name in args.only or () if "=" in name]  # which stood behind --only
        config = load_config(args.config, overrides)
        if only:
            config = replace(config, stages=select(config.stages, only))
        if args.dry_run:
            return dry_run(config, args.gpus)
        if args.keep_going and distributed.rank_and_world_size()[1] > 1:
            raise ValueError("--keep-going works in one process: what fails in one of several ends all of them")
        with open(os.devnull, "w") as nowhere, ExitStack() as quiet:
            if rank:  # what the first process says is enough
                quiet.enter_context(redirect_stdout(nowhere))
                quiet.enter_context(redirect_stderr(nowhere))
            if args.trial:
                stand_ins = trial.world_config(config)
                if stand_ins is not None:
                    run_stage(stand_ins, rank, failed, *stand_ins.stages)
                config = distributed.broadcast(trial.shrink(config) if rank == 0 else None)
            # what is missing here, on the hub or the device, and then every file, before the first hour of work
            for check in (lambda stage: check_files((stage,)), check_machine,
                          lambda stage: check_inputs(replace(config, stages=(stage,)))):
                for_each(config.stages, check, failed, args.keep_going)
            for_each(config.stages, partial(run_stage, config, rank, failed), failed, args.keep_going)
        distributed.destroy()
    except (ValueError, OSError, RuntimeError) as error:
        gone = distributed.is_lost_process(error)
        if args.traceback or isinstance(error, RuntimeError) and not gone:
            raise
        if distributed.first_to_fail():
            cause = "another process has ended; torchrun names it below" if gone else str(error)
            print(f"{distributed.process_name()}{shortened(cause)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, distributed.Stopped) as request:
        how, status = ("interrupted", 130) if isinstance(request, KeyboardInterrupt) else ("stopped", 143)
        if rank == 0:
            print(f"minixmd: {how}; the same command goes on from where it stopped", file=sys.stderr)
        return status
    if failed:
        print(f"minixmd: not made: {', '.join(failed)}; the same command makes what is missing", file=sys.stderr)
    return 1 if failed else 0


def for_each(stages, function, failed, keep_going):
    """Calls function(stage) for every stage that has not failed. keep_going: an error is printed and noted in `failed`,
    {name: why}, where it would else end the run."""
    for stage in stages:
        if stage.name in failed:
            continue
        try:
            function(stage)
        except Exception as error:
            if not keep_going or isinstance(error, distributed.Stopped):
                raise
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exc()
            failed[stage.name] = shortened(str(error))
            print(f"minixmd: {failed[stage.name]}", file=sys.stderr)


def check_machine(stage):
    """Raises ValueError for a device that this machine lacks, or a model that is not one for all processes."""
    describe_device(stage)
    for field in MODELS:
        model = getattr(stage, field, None)
        if model is not None and not model.startswith("@") and len(set(distributed.gather(pinned(model)))) > 1:
            raise ValueError(f"{stage.name}: {model} is not the same for all processes: name a revision")


def shortened(message):
    """A message in one line, without the middle of one that quotes very much."""
    message = " ".join(message.split())
    return message if len(message) <= 2000 else f"{message[:1000]} … {message[-900:]}"


def run_stage(config, rank, failed, stage):
    """Runs a stage in its directory, if it is not finished. All processes call this together. failed: {name: why} of
    earlier stages. Raises ValueError for a stage that needs one of them."""
    missing = {name: why for name, why in failed.items() if name in dependencies(stage)}
    if missing:
        consequence = "not run"
        if isinstance(stage, Report):
            folder = partial_report(config, stage)
            folder.mkdir(parents=True, exist_ok=True)
            report.run(with_paths(report.without(stage, missing), config), folder, lambda line: None)
            consequence = f"made without some rows, in {folder}"
        raise ValueError(f"{stage.name}: {consequence}, since it needs {', '.join(missing)}")
    paths = input_paths(stage, config.run_dir, config.stages)
    folder = None
    if rank == 0:
        hub_names = {field: pinned(path) for field, path in paths.items() if field in MODELS and not path.exists()}
        folder = begin(config.run_dir, stage, paths, config.source, hub_names)
    folder = distributed.broadcast(folder)
    if folder is None:
        if rank == 0:
            print(f"{stage.name}: finished before, skipped", flush=True)
        return
    distributed.check_shared(folder)
    where = describe_device(stage)
    alone = not where  # it asks a server, or reads what others made: one process does
    if rank == 0 or not alone:
        print(f"{stage.name}: runs in {folder}{where}{where and describe_attention(stage)}", flush=True)
        log = partial(append_jsonl, folder / "log.jsonl") if rank == 0 else lambda line: None
        try:
            stage = settle_slots(stage, config.stages, folder)
            with unwatched() if alone else nullcontext():
                RUN[type(stage)](with_paths(stage, config), folder, log)
        except (RuntimeError, MemoryError) as error:
            place = out_of_memory(error)
            if place is None:
                raise
            raise ValueError(f"{stage.name}: {place} ran out of memory; --dry-run prints what each phase takes and "
                             f"what to lower ({type(error).__name__}: {error})") from error
    distributed.gather(None)
    if rank == 0:
        finish(folder)
        if isinstance(stage, Report):
            shutil.rmtree(partial_report(config, stage), ignore_errors=True)


def partial_report(config, stage):
    """The folder of a Report without what could not be made."""
    return config.run_dir / f"{stage.name}-partial"


def with_paths(stage, config):
    """The stage with every "@name" replaced by the path it stands for."""
    def path(value):
        if isinstance(value, dict):
            return {key: path(part) for key, part in value.items()}
        return str(resolve(value, config.run_dir, config.stages))

    names = {field.partition(".")[0] for field in input_paths(stage, config.run_dir, config.stages)}
    return replace(stage, **{name: path(getattr(stage, name)) for name in names})  # a table's is "tables.row.column"


if __name__ == "__main__":
    sys.exit(main())
