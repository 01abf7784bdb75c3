"""Run a config's stages: python -m minixmd.train config.py [stage.field=value …], or a bundled recipe: … train toy

Read it from the top: what a run is made of, a step on given answers (SFT, distillation; sources.py says whose), a step
on the model's own (GRPO), the loop around both (train, validate, save), then the runner that gives every stage its
directory (main). A stage that is finished is skipped; a training run that was stopped goes on from its last state and
ends with the same weights, bit for bit on the CPU.
"""
import argparse
import copy
import json
import math
import os
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

from minixmd import generate, load, pack
from minixmd.config import Evaluate, FactCheck, Label, Report, Switch, Toy, Traces, Train
from minixmd.config.load import load_config
from minixmd.config.references import check_files, input_paths, resolve
from minixmd.dryrun.plan import dry_run
from minixmd.inputs.examples import read_manifest
from minixmd.inputs.media import MediaError
from minixmd.inputs.tokenizer import common_vocab_size
from minixmd.kernels.grpo import ClipConfig
from minixmd.kernels.logprob import split_suppressed
from minixmd.learning.optim import adamw, learning_rate, optimizer_tensors, restore_optimizer
from minixmd.learning.targets import sources
from minixmd.models.head import CrossEntropy, DistillTopK, PolicyLoss, head_loss
from minixmd.models.hub import pinned
from minixmd.models.lora import add_lora, hash_seed, merge_lora, set_backend
from minixmd.models.weights import adapted, save_adapter, save_model
from minixmd.report import gather as report
from minixmd.runs.directory import LOGS, begin, finish, load_state, log_line, save_state
from minixmd.runs.distributed import Elsewhere, join, leave, told, wait
from minixmd.runs.files import write_safetensors, write_text
from minixmd.stages import evaluate, factcheck, label, switch, traces
from minixmd.stages.multiple_choice import (
    ask,
    check_room,
    count_bad,
    device_of,
    dtype_of,
    impl_of,
    prefetch,
    read_records,
    score_letters,
)
from minixmd.tasks.rewards import REWARDS, learnable, parse_answer, summary
from minixmd.tasks.statistics import tabulate
from minixmd.toy import pretrain as toy

# ---- what a run is made of ----


@dataclass
class Run:
    """What a training run carries from step to step, and all that its resumable state holds."""

    model: torch.nn.Module
    parameters: dict[str, torch.nn.Parameter]  # those that train, by name
    optimizer: torch.optim.Optimizer
    steps: int  # optimizer steps in all
    backend: str = "torch"  # "triton" | "torch", of the kernels
    common_vocab: int = 0  # ids below it mean the same to the teacher, for the KL
    suppressed_Z: torch.Tensor | None = None  # ids that the student is never scored on
    vocab_limit: int | None = None  # of GRPO: ids from here on are suppressed too, and not listed
    reference: torch.nn.Module | None = None  # of GRPO: the policy before training
    step: int = 0  # finished
    best: float = -1.0  # validation accuracy
    validated: int = 0  # step of the last validation, by the log
    bad: int = 0  # clips that could not be read, over all epochs so far


def build(stage, pairs, load=load):
    """Load the model, choose what trains, and make the optimizer. load: a dry run's loads no weights."""
    model, processor = load(stage.model, device=device_of(stage), dtype=dtype_of(stage))
    backend = impl_of(stage)
    if stage.trainable == "lora":
        if adapted(model):
            raise ValueError(f"{stage.name}: {stage.model} carries an adapter already; merge it first")
        add_lora(model, rank=stage.lora_rank, alpha=stage.lora_alpha, targets=stage.lora_targets, seed=stage.seed)
    elif stage.trainable == "decoder":
        merge_lora(model)
        model.model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    else:
        merge_lora(model)
        model.requires_grad_(True)
        for name, p in model.named_parameters():
            # Whisper's sinusoids are a table, not weights, and Omni's begin and end vectors are read by nothing
            if name.endswith(("embed_positions.weight", "audio_bos_eos_token.weight")):
                p.requires_grad_(False)
    set_backend(model, backend)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    steps = stage.epochs * math.ceil(len(pairs) / stage.batch_size)
    steps = steps if stage.max_steps is None else min(steps, stage.max_steps)
    run = Run(model, parameters, adamw(parameters, stage), steps, backend)
    if stage.teacher_loss != "ce":
        theirs = Tokenizer.from_file(str(Path(stage.teacher_labels).parent / "tokenizer.json"))
        run.common_vocab = common_vocab_size(processor.tokenizer, theirs)
        run.suppressed_Z = torch.tensor(processor.suppressed_ids, device=model.lm_head.weight.device)
    if stage.objective == "grpo":
        run.vocab_limit, listed = split_suppressed(processor.suppressed_ids, len(model.lm_head.weight))
        run.suppressed_Z = torch.tensor(listed, dtype=torch.long, device=model.lm_head.weight.device) if listed else None
        run.reference = reference_of(model) if stage.beta else None
    return run, processor


def reference_of(model):
    """The policy as it is now, frozen: a copy of what trains (of adapters, new and therefore 0), which shares the rest.
    It runs through the policy's own kernels, so that before training the KL between the two is 0."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def order(stage, count, step):
    """Indices of the step's examples: a pure function of seed and step, each epoch a permutation of its own."""
    per_epoch = math.ceil(count / stage.batch_size)
    epoch, at = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(hash_seed(stage.seed, "order", epoch))
    return torch.randperm(count, generator=generator)[at * stage.batch_size:(at + 1) * stage.batch_size].tolist()


def update(run, stage, loss=0.0):
    """Clip, step, and forget the gradients. Returns the gradient's norm before clipping and the learning rate.

    Raises:
        ValueError: the loss, of which the gradients are, or their norm is not finite; no weight is changed.
    """
    if not math.isfinite(loss):
        raise ValueError(f"{stage.name}: the loss at step {run.step + 1} is {loss}; stopped")
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), stage.clip or math.inf).item()
    if not math.isfinite(norm):
        raise ValueError(f"{stage.name}: the gradient's norm at step {run.step + 1} is {norm}; stopped")
    lr = learning_rate(run.step, run.steps, stage.lr, stage.warmup_ratio)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm, lr


# ---- a step on given answers: SFT and distillation ----


def supervised_step(run, stage, good):
    """One optimizer step on [(Prompt, (example, answer, teacher's best ids))]; returns its line for the log."""
    prompts, tops = [prompt for prompt, _ in good], [top for _, (_, _, top) in good]
    parts = accumulate(run, stage, prompts, tops) if good else {"loss": 0.0}
    norm, lr = update(run, stage, parts["loss"])
    return {**parts, "lr": lr, "grad_norm": norm, "tokens": sum(map(len, prompts))}


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
            objective = CrossEntropy(batch.target_id_T[learnt_T], batch.target_weight_T[learnt_T] / total, run.backend)
            losses.append(head_loss(hidden_ND, head_VD, batch.target_row_T[learnt_T], objective)[0])
        loss = sum(losses)
        loss.backward()
        parts["loss"] += loss.item()
    return dict(parts)


def teacher_kl(run, stage, hidden_ND, batch, stored, count, parts):
    """T² KL(teacher || student) at the letters of the clips in `stored`, {segment: best ids}, summed over `count`.

    KL is over the ids that both vocabularies share, less the suppressed ones; what the teacher holds elsewhere is left out
    of its distribution and logged, as is what the student holds there.
    """
    segments = list(stored)
    first_K = torch.tensor([batch.target_segment_T.tolist().index(segment) for segment in segments])
    id_KJ, logq_KJ, tail_K, dropped_K = stored_rows(list(stored.values()), run.common_vocab, run.suppressed_Z.cpu())
    device = hidden_ND.device
    objective = DistillTopK(id_KJ.to(device), logq_KJ.to(device), tail_K.to(device),
                            torch.full((len(segments),), 1 / count, device=device), run.common_vocab, run.suppressed_Z,
                            stage.temperature, run.backend)
    loss, columns = head_loss(hidden_ND, run.model.lm_head.weight, batch.target_row_T[first_K.to(device)], objective)
    parts["kl"] += columns["kl"].sum().item() / count
    parts["teacher_dropped"] += dropped_K.sum().item() / count
    parts["student_dropped"] += columns["student_dropped"].sum().item() / count
    return loss


def stored_rows(tops, common_vocab, suppressed_Z):
    """The teacher's best ids as kernels/distill_topk.py takes them: (id_KJ, logq_KJ, tail_K, dropped_K), all fp32.

    Ids outside the shared ones are taken out and the rest is normalised again. What lies outside among the ids that
    were not stored cannot be told from the tail, of which it is a part.
    """
    id_KJ = torch.tensor([top["ids"] for top in tops], dtype=torch.int32)
    logq_KJ = torch.tensor([[z / top["temperature"] - top["logsumexp"] for z in top["logits"]] for top in tops])
    tail_K = (1 - logq_KJ.exp().sum(-1)).clamp(min=0)
    outside_KJ = (id_KJ >= common_vocab) | torch.isin(id_KJ, suppressed_Z)
    dropped_K = logq_KJ.exp().where(outside_KJ, 0).sum(-1)
    kept_K = 1 - dropped_K
    return id_KJ.masked_fill(outside_KJ, -1), logq_KJ - kept_K.log()[:, None], tail_K / kept_K, dropped_K


# ---- a step on the model's own answers: GRPO, equation 2 of SightSound-R1 ----

NOTE = ("the loss shows no progress: in the first update after a rollout the ratio is 1, which leaves the KL and the "
        "mean of the advantages, 0 where all completions weigh the same. Its gradient is not 0; what shows the "
        "progress is the reward")
SHOWN = 4  # completions of a step that are written as text
MAX_KL = 1e-6  # to the reference, before the first update


def grpo_step(run, stage, processor, good, folder):
    """One rollout and the optimizer steps on it, for [(Prompt, (example, …))]; returns its line for the log."""
    if not good:
        return {"loss": 0.0, "tokens": 0}
    times = [time.perf_counter()]
    prompts, examples = [prompt for prompt, _ in good], [one[0] for _, one in good]
    for prompt, e in zip(prompts, examples, strict=True):
        check_room(processor, e, prompt, stage.max_new_tokens)
    if all(name.startswith(("model.", "lm_head.")) for name in run.parameters):  # sampling, scoring and learning share
        prompts = [run.model.encode_ahead(prompt) for prompt in prompts]  # what the towers say
    answers = generate(run.model, processor, prompts, n=stage.group_size, max_new_tokens=stage.max_new_tokens,
                       temperature=stage.temperature, seed=stage.seed, stop=stage.stop, step=run.step,
                       keys=[e.id for e in examples], decode_slots=stage.decode_slots, backend=run.backend)
    pairs = [[(c, e) for c in group] for group, e in zip(answers, examples, strict=True)]
    parts = {name: torch.tensor([[reward(c.text, e) for c, e in group] for group in pairs])
             for name, reward in REWARDS.items()}
    parts["reward"] = reward_PG = sum(parts.values())
    show(run, stage, pairs[0], parts, folder)
    rollout = learnable(stage, prompts, answers, reward_PG)
    times.append(time.perf_counter())
    if rollout and stage.beta:
        rollout.ref_T = score(run, stage, rollout.groups)
    times.append(time.perf_counter())
    means = Counter(loss=0.0)
    for _ in range(stage.num_iterations if rollout else 0):
        loss, found = learn(run, stage, rollout)
        if stage.beta and not any(run.optimizer.state.values()):  # no update yet, in this process or an earlier one
            check_reference(stage, rollout)
        norm, lr = update(run, stage, loss)
        figures = {"loss": loss, "lr": lr, "grad_norm": norm, "entropy": found["entropy"].mean().item(),
                   "clip_fraction": found["clipped"].mean().item()}
        if stage.beta:
            figures["kl"] = found["kl"].mean().item()
        means.update({name: value / stage.num_iterations for name, value in figures.items()})
    if run.model.lm_head.weight.is_cuda:
        torch.cuda.synchronize()  # the optimizer's kernels too belong to the update's time
    times.append(time.perf_counter())
    line = {**means, **summary(pairs, parts), "learned": len(rollout.groups) if rollout else 0}  # groups
    if rollout:  # what the sampler said of its tokens against what the training pass says: 0 but for rounding
        gap_T = (rollout.sampled_T - rollout.old_T).abs()
        line |= {"logp_gap_mean": gap_T.mean().item(), "logp_gap_max": gap_T.max().item()}
    for i, name in enumerate(("rollout_s", "scoring_s", "update_s")):
        line[name] = round(times[i + 1] - times[i], 3)
    return line | {"tokens": sum(map(len, prompts)) + sum(len(c.ids) for group in answers for c in group)}


def show(run, stage, group, parts, folder):
    """Writes some of the first prompt's completions, with what they earned, every completions_every steps."""
    if stage.completions_every and run.step % stage.completions_every == 0:
        for i, (c, e) in enumerate(group[:SHOWN]):
            earned = {name: part_PG[0, i].item() for name, part_PG in parts.items()}
            log_line(folder, {"step": run.step + 1, "id": e.id, **earned, "finished": c.finished, "text": c.text},
                     "completions.jsonl")


def passes(run, stage, groups):
    """The micro-batches of a step, as (groups, Batch, slice of the step's T tokens)."""
    end = 0
    for start in range(0, len(groups), stage.micro_batch_size):
        part = groups[start:start + stage.micro_batch_size]
        batch = pack(part).to(run.model.lm_head.weight.device)
        begin, end = end, end + len(batch.target_id_T)
        yield part, batch, slice(begin, end)


def token_logp(run, stage, hidden_ND, head_VD, batch):
    """(T,) log-probabilities of a batch's targets as the sampler has them: at its temperature, without suppressed ids."""
    zero_T = torch.zeros(len(batch.target_id_T), device=hidden_ND.device)
    objective = PolicyLoss(batch.target_id_T, zero_T, None, zero_T, zero_T, ClipConfig(0.0, 0.0, 0.0, "k3"), run.backend,
                     stage.temperature, run.suppressed_Z, run.vocab_limit)
    with torch.no_grad():
        return head_loss(hidden_ND, head_VD, batch.target_row_T, objective)[1]["logp"].cpu()


def score(run, stage, groups):
    """(T,) log-probabilities of a step's tokens under the reference, log pi_ref."""
    with torch.no_grad():
        return torch.cat([token_logp(run, stage, run.reference(batch), run.reference.lm_head.weight, batch)
                          for _, batch, _ in passes(run, stage, groups)])


def learn(run, stage, rollout):
    """Gradients of one optimizer step, minus equation 2; returns the loss and {column: (T,)} of head.PolicyLoss.

        loss   = sum over tokens of weight (-min[ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A] + beta KL)
        weight = 1 / (P G |o_i|), over P prompts of G completions o_i (token_weights)
        A      = (r_i - mean(r)) / (std(r) + 1e-4), the advantage, over the completions of a prompt (rewards.py)
        ratio  = exp(log pi_theta - log pi_theta_old), where old is the policy before the rollout's first update
        KL     = exp(d) - d - 1 with d = log pi_ref - log pi_theta (k3)

    The denominators are the whole step's, so the gradient does not depend on how it is cut into micro-batches.
    """
    head_VD, device = run.model.lm_head.weight, run.model.lm_head.weight.device
    how = ClipConfig(stage.clip_low, stage.clip_high, stage.beta, stage.kl)
    total, columns, first = 0.0, [], rollout.old_T is None
    if first:
        rollout.old_T = torch.empty_like(rollout.sampled_T)
    for groups, batch, at in passes(run, stage, rollout.groups):
        hidden_ND = run.model(batch)
        if first:  # this is that policy, and a product with the head costs less than a forward pass
            rollout.old_T[at] = token_logp(run, stage, hidden_ND, head_VD, batch)
        old_T, ref_T, advantage_T, weight_T = (None if x_T is None else x_T[at].to(device) for x_T in (
            rollout.old_T, rollout.ref_T, rollout.advantage_T, rollout.weight_T))
        lengths = tuple(len(ids_T) for group in groups for ids_T in group.completions)
        objective = PolicyLoss(batch.target_id_T, old_T, ref_T, advantage_T, weight_T, how, run.backend, stage.temperature,
                         run.suppressed_Z, run.vocab_limit, lengths if stage.ratio == "sequence" else None)
        loss, found = head_loss(hidden_ND, head_VD, batch.target_row_T, objective)
        loss.backward()
        total += loss.item()
        columns.append({name: column_T.cpu() for name, column_T in found.items()})
    return total, {name: torch.cat([found[name] for found in columns]) for name in columns[0]}


def check_reference(stage, rollout):
    """Before the first update the policy is the reference. A reference of other weights would pull it away for good."""
    delta_T = (rollout.ref_T - rollout.old_T).double()
    kl = (delta_T.expm1() - delta_T).mean().item()
    if not kl <= MAX_KL:
        raise ValueError(f"{stage.name}: before the first update the KL to the reference is {kl:.3g}, above {MAX_KL}: "
                         "the reference is not the policy that training starts from; stopped")


# ---- the loop ----


def train(stage, folder, log):
    """Stage Train. Writes best/ (an adapter, or a whole model when all of it trains) and log.jsonl."""
    grpo = stage.objective == "grpo"
    pairs, counts = sources(stage, read_manifest(stage.manifest))
    validation = read_manifest(stage.val_manifest) if stage.val_manifest else []
    if missing := next((e for e in validation if e.answer is None), None):
        raise ValueError(f"{stage.val_manifest}: example {missing.id!r} has no answer to validate against")
    run, processor = build(stage, pairs)
    resume(run, folder)
    if run.step == 0:
        count = sum(p.numel() for p in run.parameters.values())
        log({"step": 0, "learns_from": counts, "steps": run.steps, "trainable_parameters": count,
             **({"note": NOTE} if grpo else {})})
    reads = min(stage.epochs * len(pairs), run.steps * stage.batch_size)
    tqdm.write(f"{stage.name}: {run.steps} steps of {stage.batch_size} on {len(pairs)} clips ({counts})"
               + (f", from step {run.step}" if run.step else ""))
    if grpo:
        tqdm.write(f"{stage.name}: {NOTE}")
    steps = (pairs[i] for step in range(run.step, run.steps) for i in order(stage, len(pairs), step))
    prompts = prefetch(lambda one: (ask(stage, processor, *one[:2]), one), steps, ahead=2 * stage.batch_size)
    with tqdm(total=run.steps, initial=run.step, desc=stage.name, unit="step") as bar:
        while True:
            if validation and due(run, stage):  # also after a stop between the state and its validation
                validate(run, stage, processor, validation, folder, log)
            if run.step == run.steps:
                break
            began = time.perf_counter()
            asked = [next(prompts) for _ in order(stage, len(pairs), run.step)]
            good = [(prompt, one) for prompt, one in asked if not isinstance(prompt, MediaError)]
            for error in (prompt for prompt, _ in asked if isinstance(prompt, MediaError)):
                run.bad += 1
                log({"step": run.step + 1, "bad": error.reason, "detail": str(error)})
            if run.bad > stage.max_bad * reads:
                raise ValueError(f"{stage.name}: {run.bad} bad clips, above max_bad {stage.max_bad} of the {reads} to "
                                 f"be read; the last: {error}")
            line = grpo_step(run, stage, processor, good, folder) if grpo else supervised_step(run, stage, good)
            run.step += 1
            rate = line["tokens"] / (time.perf_counter() - began)
            log({"step": run.step, **line, "tokens_per_s": round(rate)})
            shown = "reward" if grpo else "loss"
            bar.set_postfix_str(f"{shown} {line.get(shown, 0):.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            if due(run, stage) or (stage.save_every and run.step % stage.save_every == 0):
                save(run, folder)
    if not any(run.optimizer.state.values()):
        raise ValueError(f"{stage.name}: no step had anything to learn: its clips were bad, or its groups left out")
    publish(run, stage, processor, folder)


def due(run, stage):
    """Whether the step that is finished is one to validate after, and has not been."""
    at = run.step == run.steps or (stage.eval_every and run.step % stage.eval_every == 0)
    return at and run.step > run.validated


def validate(run, stage, processor, validation, folder, log):
    """Accuracy on the validation manifest, by letters or, in GRPO and with traces, by greedily written answers; the
    best weights so far (the earliest, in a tie) are kept aside."""
    written = stage.max_new_tokens if stage.objective == "grpo" or stage.traces else 0
    records = score_letters(run.model, processor, stage, validation, max_new_tokens=written, stop=stage.stop)
    bad = count_bad(records, stage)
    if written:  # not the letters' logits and not what the words are like, but the answer that is rewarded
        for example, record in zip(validation, records, strict=True):
            record["answer"] = None if "bad" in record else parse_answer(record["text"], example.options)
    accuracy = tabulate(validation, records)["accuracy"]
    if accuracy > run.best:
        run.best = accuracy
        write_safetensors(folder / "best.safetensors", run.parameters)
        save(run, folder)
    log({"step": run.step, "val_accuracy": accuracy, "val_bad": bad})  # last: with it this validation is done
    run.validated = run.step
    tqdm.write(f"{stage.name}: step {run.step}, validation accuracy {100 * accuracy:.1f} %")


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
    for path in (folder / name for name in LOGS):
        if path.exists():
            lines = [line for line in read_records(path) if line["step"] <= run.step and run.step > 0]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            run.validated = max([run.validated, *(line["step"] for line in lines if "val_accuracy" in line)])


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

RUN = {Toy: toy.run, Evaluate: evaluate.run, Label: label.run, Traces: traces.run, FactCheck: factcheck.run,
       Switch: switch.run, Train: train, Report: report.run}


def main(argv=None):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m minixmd.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a Python file that defines stages = […], or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="stage.field=value",
                        help="also field=value (every stage that has the field) and run_dir=path")
    parser.add_argument("--dry-run", action="store_true",
                        help="only check the config and print its prompts, shapes and memory; needs no weights or data")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions would multiply with 10 bits
    try:
        rank = join(os.environ)
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            return dry_run(config, sys.modules[__name__])  # which traces this module's steps
        check_files(config.stages)
        for stage in config.stages:  # what is not here, on the hub or reachable shows before the first hour of work
            where(stage)
            if not (getattr(stage, "model", None) or "@").startswith("@"):
                pinned(stage.model)
        for stage in config.stages:
            paths = input_paths(stage, config.run_dir, config.stages)
            folder = told(begin(config.run_dir, stage, paths, config.source) if rank == 0 else None)
            if folder is None and rank == 0:
                print(f"{stage.name}: finished before, skipped", flush=True)
            elif folder is not None and (rank == 0 or shared(stage)):
                print(f"{stage.name}: runs in {folder}" + where(stage), flush=True)
                try:
                    RUN[type(stage)](resolved(stage, config), folder, partial(log_line, folder))
                    finish(folder)
                except Elsewhere:
                    pass
            wait()
        leave()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if args.traceback:
            raise
        print(f"minixmd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minixmd: interrupted; the same command goes on from where it stopped", file=sys.stderr)
        return 130
    return 0


def shared(stage):
    """Whether a stage's clips are shared among the processes that torchrun started."""
    asks = isinstance(stage, (Evaluate, Label, Traces)) or getattr(stage, "checker", None) == "model"
    return asks and getattr(stage, "endpoint", None) is None


def where(stage):
    """What "auto" and the like came to, where a model runs here: nothing is chosen silently."""
    elsewhere = getattr(stage, "endpoint", None) is not None or getattr(stage, "checker", "") == "verdicts"
    if not hasattr(stage, "device") or elsewhere:
        return ""
    device = device_of(stage)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    kernels = f", {stage.dtype}, kernels in {impl_of(stage)}" if hasattr(stage, "backend") else ""
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
