"""Run a config's stages: python -m minixmd.train config.py [stage.field=value …], or a bundled recipe: … train toy

Read it from the top: which examples a Train stage learns from (sources), the loop (train, step, validate, save), then
the runner that gives every stage its directory (main). A stage that is finished is skipped; a training run that was
stopped goes on from its last state and ends with the same weights, bit for bit on the CPU.
"""
import argparse
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from minixmd import load
from minixmd.config import Evaluate, Label, Report, Switch, Toy, Train
from minixmd.configfile import load_config
from minixmd.files import write_safetensors, write_text
from minixmd.inputs.batch import pack
from minixmd.inputs.examples import read_manifest
from minixmd.inputs.media import MediaError
from minixmd.inputs.tokenizer import shared_ids
from minixmd.learning.checkpoint import begin, finish, load_state, log_line, save_state
from minixmd.learning.head import CrossEntropy, DistillTopK, head_loss
from minixmd.learning.optim import adamw, learning_rate, optimizer_tensors, restore_optimizer
from minixmd.learning.scoring import ask, count_bad, device_of, dtype_of, impl_of, prefetch, read_records, score_letters
from minixmd.models.hub import pinned
from minixmd.models.lora import add_lora, hash_seed, set_impl
from minixmd.models.weights import adapted, save_adapter, save_model
from minixmd.references import check_files, input_paths, resolve
from minixmd.stages import evaluate, label, report, switch, toy

# ---- what is learnt: one answer an example ----


def sources(stage, examples):
    """Which answer each training example learns: the manifest's own (SFT), or the teacher's or the student's (distill).

    In distillation the gate decides a clip: closed (p_teacher >= 0.5), the teacher's letter or its stored logits are
    the target; open, the student's own earlier letter is, which keeps what it knew (the anti-forgetting loss). Without
    the student's letters an open clip is left out. The manifest's answers are not read.

    Returns:
        ([(example, answer index, the teacher's best ids or None)], {reason: count} of what stands where and what was
        left out).
    Raises:
        ValueError: SFT on an example without an answer, labels of other clips or without stored logits, or nothing left
            to learn.
    """
    if stage.objective == "sft":
        if missing := next((e for e in examples if e.answer is None), None):
            raise ValueError(f"{stage.manifest}: example {missing.id!r} has no answer to learn from")
        return [(e, e.answer, None) for e in examples], {"manifest": len(examples)}
    teacher, student, switch = (_by_id(path) if path else {} for path in (stage.teacher_labels, stage.student_labels,
                                                                          stage.switch))
    looked_up = {"learned": "p_teacher", "oracle": "oracle"}.get(stage.gate)
    if looked_up and not any(looked_up in record for record in switch.values()):
        raise ValueError(f"{stage.switch}: no clip has the {looked_up!r} that gate {stage.gate!r} goes by")
    chosen, counts = [], Counter()
    for e in examples:
        to_teacher = switch.get(e.id, {}).get(looked_up, 0.0) >= 0.5 if looked_up else stage.gate == "always"
        if to_teacher and e.id not in teacher:
            raise ValueError(f"{stage.teacher_labels}: no label for example {e.id!r} of {stage.manifest}")
        record = teacher[e.id] if to_teacher else student.get(e.id, {"bad": "switch open"})
        source = "teacher" if to_teacher else "student"
        if "bad" in record:
            counts[f"left out: {record['bad']}"] += 1
        elif record["option"] not in e.options:
            raise ValueError(f"the {source}'s label of {e.id!r} is {record['option']!r}, not among its options: the "
                             f"labels were made from another manifest than {stage.manifest}")
        else:
            by_logits = to_teacher and stage.teacher_loss != "ce"
            top = record.get("top") if by_logits else None
            if by_logits and (top is None or top["temperature"] != stage.temperature):
                raise ValueError(f"{stage.name}: teacher_loss {stage.teacher_loss!r} at temperature "
                                 f"{stage.temperature} needs labels made with top_k, at that temperature: "
                                 f"{stage.teacher_labels}")
            chosen.append((e, e.options.index(record["option"]), top))
            counts[source] += 1
    if not chosen:
        raise ValueError(f"{stage.name}: no clip is left to learn from ({dict(counts)})")
    return chosen, dict(counts)


def _by_id(path):
    return {record["id"]: record for record in read_records(Path(path))}


# ---- the loop ----


@dataclass
class Run:
    """What a training run carries from step to step, and all that its resumable state holds."""

    model: torch.nn.Module
    parameters: dict[str, torch.nn.Parameter]  # those that train, by name
    optimizer: torch.optim.Optimizer
    steps: int  # optimizer steps in all
    impl: str = "torch"  # "triton" | "torch", of the kernels
    shared: int = 0  # ids below it mean the same to the teacher, for the KL
    banned_Z: torch.Tensor | None = None  # ids that the student is never scored on
    step: int = 0  # finished
    best: float = -1.0  # validation accuracy
    bad: int = 0  # clips that could not be read, over all epochs so far


def build(stage, pairs):
    """Load the model, choose what trains, and make the optimizer."""
    model, processor = load(stage.model, device=device_of(stage), dtype=dtype_of(stage))
    impl = impl_of(stage)
    if stage.trainable == "lora":
        if adapted(model):
            raise ValueError(f"{stage.name}: {stage.model} carries an adapter already; merge it first")
        add_lora(model, rank=stage.lora_rank, alpha=stage.lora_alpha, targets=stage.lora_targets, seed=stage.seed)
    else:
        model.requires_grad_(True)
        for name, p in model.named_parameters():
            # Whisper's sinusoids are a table, not weights, and Omni's begin and end vectors are read by nothing
            if name.endswith(("embed_positions.weight", "audio_bos_eos_token.weight")):
                p.requires_grad_(False)
    set_impl(model, impl)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    steps = stage.epochs * math.ceil(len(pairs) / stage.batch_size)
    steps = steps if stage.max_steps is None else min(steps, stage.max_steps)
    run = Run(model, parameters, adamw(parameters, stage), steps, impl)
    if stage.teacher_loss != "ce":
        theirs = Tokenizer.from_file(str(Path(stage.teacher_labels).parent / "tokenizer.json"))
        run.shared = shared_ids(processor.tokenizer, theirs)
        run.banned_Z = torch.tensor(processor.banned, device=model.lm_head.weight.device)
    return run, processor


def order(stage, count, step):
    """Indices of the step's examples: a pure function of seed and step, each epoch a permutation of its own."""
    per_epoch = math.ceil(count / stage.batch_size)
    epoch, at = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(hash_seed(stage.seed, "order", epoch))
    return torch.randperm(count, generator=generator)[at * stage.batch_size:(at + 1) * stage.batch_size].tolist()


def accumulate(run, stage, prompts, tops=()):
    """Gradients of one optimizer step's loss, micro-batch by micro-batch; returns its parts, {"loss": …}.

    The loss is the mean of the cross-entropy over the step's target tokens. Where tops has the teacher's best ids for
    a clip, the KL at its letter, as a mean over the step's clips, stands in its place ("kl") or is added ("kl+ce").
    The denominators are the whole step's, so the gradient does not depend on the micro-batch size.
    """
    total = sum(int(prompt.target_N.sum()) for prompt in prompts)
    head_VD, parts = run.model.lm_head.weight, Counter(loss=0.0)
    for start in range(0, len(prompts), stage.micro_batch_size):
        at = slice(start, start + stage.micro_batch_size)
        batch = pack(prompts[at]).to(head_VD.device)
        hidden_ND, losses = run.model(batch), []
        stored = {i: top for i, top in enumerate(tops[at]) if top is not None}
        if stored:
            losses.append(teacher_kl(run, stage, hidden_ND, batch, stored, len(prompts), parts))
        learnt_T = torch.ones_like(batch.target_id_T, dtype=torch.bool)
        if stored and stage.teacher_loss == "kl":
            learnt_T = ~torch.isin(batch.target_segment_T, torch.tensor(list(stored), device=head_VD.device))
        if learnt_T.any():
            objective = CrossEntropy(batch.target_id_T[learnt_T], batch.target_weight_T[learnt_T] / total, run.impl)
            losses.append(head_loss(hidden_ND, head_VD, batch.target_row_T[learnt_T], objective)[0])
        loss = sum(losses)
        loss.backward()
        parts["loss"] += loss.item()
    return dict(parts)


def teacher_kl(run, stage, hidden_ND, batch, stored, count, parts):
    """T² KL(teacher || student) at the letters of the clips in `stored`, {segment: best ids}, summed over `count`.

    KL is over the ids that both vocabularies share, less the banned ones; what the teacher holds elsewhere is left out
    of its distribution and logged, as is what the student holds there.
    """
    segments = list(stored)
    first_K = torch.tensor([batch.target_segment_T.tolist().index(segment) for segment in segments])
    id_KJ, logq_KJ, tail_K, dropped_K = stored_rows(list(stored.values()), run.shared, run.banned_Z.cpu())
    device = hidden_ND.device
    objective = DistillTopK(id_KJ.to(device), logq_KJ.to(device), tail_K.to(device),
                            torch.full((len(segments),), 1 / count, device=device), run.shared, run.banned_Z,
                            stage.temperature, run.impl)
    loss, columns = head_loss(hidden_ND, run.model.lm_head.weight, batch.target_row_T[first_K.to(device)], objective)
    parts["kl"] += columns["kl"].sum().item() / count
    parts["teacher_dropped"] += dropped_K.sum().item() / count
    parts["student_dropped"] += columns["student_dropped"].sum().item() / count
    return loss


def stored_rows(tops, shared, banned_Z):
    """The teacher's best ids as kernels/distill_topk.py takes them: (id_KJ, logq_KJ, tail_K, dropped_K), all fp32.

    Ids outside the shared ones are taken out and the rest is normalised again. What lies outside among the ids that
    were not stored cannot be told from the tail, of which it is a part.
    """
    id_KJ = torch.tensor([top["ids"] for top in tops], dtype=torch.int32)
    logq_KJ = torch.tensor([[z / top["temperature"] - top["logsumexp"] for z in top["logits"]] for top in tops])
    tail_K = (1 - logq_KJ.exp().sum(-1)).clamp(min=0)
    outside_KJ = (id_KJ >= shared) | torch.isin(id_KJ, banned_Z)
    dropped_K = logq_KJ.exp().where(outside_KJ, 0).sum(-1)
    kept_K = 1 - dropped_K
    return id_KJ.masked_fill(outside_KJ, -1), logq_KJ - kept_K.log()[:, None], tail_K / kept_K, dropped_K


def update(run, stage):
    """Clip, step, and forget the gradients. Returns the gradient's norm before clipping and the learning rate."""
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), stage.clip or math.inf).item()
    lr = learning_rate(run.step, run.steps, stage.lr, stage.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return norm, lr


def train(stage, folder, log):
    """Stage Train. Writes best/ (an adapter, or a whole model when all of it trains) and log.jsonl."""
    pairs, counts = sources(stage, read_manifest(stage.manifest))
    validation = read_manifest(stage.val_manifest) if stage.val_manifest else []
    if missing := next((e for e in validation if e.answer is None), None):
        raise ValueError(f"{stage.val_manifest}: example {missing.id!r} has no answer to validate against")
    run, processor = build(stage, pairs)
    resume(run, folder)
    if run.step == 0:
        log({"step": 0, "learns_from": counts, "steps": run.steps,
             "trainable_parameters": sum(p.numel() for p in run.parameters.values())})
    tqdm.write(f"{stage.name}: {run.steps} steps of {stage.batch_size} on {len(pairs)} clips ({counts})"
               + (f", from step {run.step}" if run.step else ""))
    steps = (pairs[i] for step in range(run.step, run.steps) for i in order(stage, len(pairs), step))
    prompts = prefetch(lambda one: (ask(stage, processor, *one[:2]), one[2]), steps, ahead=2 * stage.batch_size)
    with tqdm(total=run.steps, initial=run.step, desc=stage.name, unit="step") as bar:
        while run.step < run.steps:
            began = time.perf_counter()
            asked = [next(prompts) for _ in order(stage, len(pairs), run.step)]
            good = [(prompt, top) for prompt, top in asked if not isinstance(prompt, MediaError)]
            for error in (prompt for prompt, _ in asked if isinstance(prompt, MediaError)):
                run.bad += 1
                log({"step": run.step + 1, "bad": error.reason, "detail": str(error)})
            if run.bad > stage.max_bad * stage.epochs * len(pairs):
                raise ValueError(f"{stage.name}: {run.bad} bad clips, above max_bad {stage.max_bad} of the "
                                 f"{stage.epochs * len(pairs)} to be read; the last: {error}")
            parts = accumulate(run, stage, *map(list, zip(*good, strict=True))) if good else {"loss": 0.0}
            loss = parts["loss"]
            if not math.isfinite(loss):
                raise ValueError(f"{stage.name}: the loss at step {run.step + 1} is {loss}; stopped")
            norm, lr = update(run, stage)
            tokens = sum(len(prompt) for prompt, _ in good)
            rate = tokens / (time.perf_counter() - began)
            log({"step": run.step, **parts, "lr": lr, "grad_norm": norm, "tokens": tokens,
                 "tokens_per_s": round(rate)})
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            last = run.step == run.steps
            if validation and (last or (stage.eval_every and run.step % stage.eval_every == 0)):
                validate(run, stage, processor, validation, folder, log)
            if last or (stage.save_every and run.step % stage.save_every == 0):
                save(run, folder)
    publish(run, stage, processor, folder)


def validate(run, stage, processor, validation, folder, log):
    """Letter accuracy on the validation manifest; the best weights so far (the earliest, in a tie) are kept aside."""
    records = score_letters(run.model, processor, stage, validation)
    bad = count_bad(records, stage)
    accuracy = evaluate.tabulate(validation, records)["accuracy"]
    log({"step": run.step, "val_accuracy": accuracy, "val_bad": bad})
    tqdm.write(f"{stage.name}: step {run.step}, validation accuracy {100 * accuracy:.1f} %")
    if accuracy > run.best:
        run.best = accuracy
        write_safetensors(folder / "best.safetensors", run.parameters)


def save(run, folder):
    state = optimizer_tensors(run.optimizer, run.parameters)
    state.update({f"{name}.weight": p for name, p in run.parameters.items()})
    save_state(folder, state, {"step": run.step, "best": run.best, "bad": run.bad})


def resume(run, folder):
    """Go on from the stage's last state, if there is one; log lines of steps that will be redone are dropped."""
    state = load_state(folder)
    if state is not None:
        tensors, meta = state
        with torch.no_grad():
            for name, p in run.parameters.items():
                p.copy_(tensors[f"{name}.weight"])
        restore_optimizer(run.optimizer, run.parameters, tensors)
        run.step, run.best, run.bad = meta["step"], meta["best"], meta["bad"]
    log_path = folder / "log.jsonl"
    if log_path.exists():
        lines = [line for line in read_records(log_path) if line["step"] <= run.step and run.step > 0]
        write_text(log_path, "".join(json.dumps(line) + "\n" for line in lines))


def publish(run, stage, processor, folder):
    """best/: the validated best weights (the last ones without validation), as `load` and other programs read them."""
    best = folder / "best.safetensors"
    if best.exists():
        with torch.no_grad():
            for name, tensor in load_file(best).items():
                run.parameters[name].copy_(tensor)
    if stage.trainable == "lora":
        save_adapter(run.model, pinned(stage.model), folder / "best")
    else:
        save_model(run.model, processor.folder, folder / "best")


# ---- the runner ----

RUN = {Toy: toy.run, Evaluate: evaluate.run, Label: label.run, Switch: switch.run, Train: train, Report: report.run}


def main(argv=None):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m minixmd.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a Python file that defines stages = […], or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="stage.field=value",
                        help="also field=value (every stage that has the field) and run_dir=path")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions would multiply with 10 bits
    try:
        config = load_config(args.config, args.overrides)
        check_files(config.stages)
        for stage in config.stages:  # what is not here, on the hub or reachable shows before the first hour of work
            where(stage)
            if not getattr(stage, "model", "@").startswith("@"):
                pinned(stage.model)
        for stage in config.stages:
            paths = input_paths(stage, config.run_dir, config.stages)
            folder = begin(config.run_dir, stage, paths, config.source)
            if folder is None:
                print(f"{stage.name}: finished before, skipped", flush=True)
                continue
            print(f"{stage.name}: runs in {folder}" + where(stage), flush=True)
            RUN[type(stage)](resolved(stage, config), folder, partial(log_line, folder))
            finish(folder)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if args.traceback:
            raise
        print(f"minixmd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minixmd: interrupted; the same command goes on from where it stopped", file=sys.stderr)
        return 130
    return 0


def where(stage):
    """What "auto" and the like came to: nothing is chosen silently."""
    if not hasattr(stage, "device"):
        return ""
    device = device_of(stage)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    kernels = f", {stage.dtype}, kernels in {impl_of(stage)}" if hasattr(stage, "impl") else ""
    return f" on {device}{kernels}{threads}"


def resolved(stage, config):
    """The stage with every "@name" replaced by the path it stands for."""
    def path(value):
        return str(resolve(value, config.run_dir, config.stages))

    changes = {}
    for field in input_paths(stage, config.run_dir, config.stages):
        name = field.partition(".")[0]
        value = getattr(stage, name)
        changes[name] = {row: {c: path(v) for c, v in cells.items()} for row, cells in value.items()} \
            if isinstance(value, dict) else path(value)
    return replace(stage, **changes)


if __name__ == "__main__":
    sys.exit(main())
