"""Training, in one file: python -m minixmd.train CONFIG [stage.field=value …], or a bundled recipe: … train toy

Read it from the top: a Trainer is set up, then comes the loop, then one optimizer step of each way to learn, whole:

    distill_step   XMD: the teacher's answer where the gate says so, the student's own earlier one elsewhere
    sft_step       the right letter, or a teacher's chain of thought
    grpo_step      SightSound-R1: a rollout, its rewards, and the clipped policy update

and last validation, saving and resuming. A run that was stopped goes on from its last state and ends with the same
weights, bit for bit on the CPU. The command line, and the other stages of a config, are runner.py's.
"""
import math
import runpy
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from minixmd import generate, load, pack
from minixmd.config import GRPO, SFT, Distill
from minixmd.inputs.examples import check_media, read_manifest
from minixmd.inputs.prompts import build_prompt, check_length, prefetch
from minixmd.inputs.tokenizer import common_vocab_size
from minixmd.kernels.grpo import ClipConfig
from minixmd.learning.logprobs import SampledVocabulary, reference_logprobs, token_logprobs
from minixmd.learning.optim import adamw, learning_rate, optimizer_tensors, restore_optimizer
from minixmd.learning.policy import make_rollout, rollout_metrics
from minixmd.learning.targets import resolve_targets
from minixmd.models.head import CrossEntropy, DistillTopK, PolicyLoss
from minixmd.models.hub import pinned
from minixmd.models.lora import add_lora, hash_seed, merge_lora
from minixmd.models.multimodal import frozen_copy
from minixmd.models.weights import adapted, save_adapter, save_model
from minixmd.runs.device import runtime_of
from minixmd.runs.files import write_safetensors
from minixmd.runs.records import append_jsonl, count_bad
from minixmd.runs.state import load_state, rewind_logs, save_state
from minixmd.stages.multiple_choice import Writing, score_letters, write_answers
from minixmd.tasks.rewards import REWARDS, parse_answer
from minixmd.tasks.statistics import tabulate

GRPO_NOTE = ("the GRPO loss is about 0 while the ratio is 1, as it is in the first update after a rollout: what is left "
             "is the KL and the mean of the advantages. Its gradient is not 0; watch the reward")
SHOWN_COMPLETIONS = 4  # of a step, written as text
MAX_START_KL = 1e-6  # to the reference, before the first update


def train(stage, folder, log):
    """Runs a Distill, SFT or GRPO stage. Writes best/ (an adapter, or a whole model) and log.jsonl."""
    examples = read_manifest(stage.manifest)
    check_media(stage.name, stage.manifest, examples, stage.media)
    validation = read_manifest(stage.val_manifest) if stage.val_manifest else []
    check_media(stage.name, stage.val_manifest, validation, stage.media)
    for example in validation:
        if example.answer is None:
            raise ValueError(f"{stage.val_manifest}: example {example.id!r} has no answer to validate against")
    items, counts = resolve_targets(stage, examples)
    trainer = Trainer(stage, len(items), folder, log)
    trainer.resume()
    trainer.fit(items, counts, validation)
    trainer.publish()


class Trainer:
    """One training stage: its model, its optimizer, and how far it is.

    Args:
        stage: Distill, SFT or GRPO, with paths in place of "@name".
        num_items: Items that it learns from, for the number of steps.
        folder: the stage's directory. log: function that appends a dict to log.jsonl.
    """

    # ---- setup ----

    def __init__(self, stage, num_items, folder=None, log=None):
        self.stage, self.num_items, self.folder, self.log = stage, num_items, folder, log
        self.model, self.processor = self.load_model()
        self.choose_parameters()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.parameters, lr=stage.lr, betas=stage.betas, eps=stage.eps,
                               weight_decay=stage.weight_decay)
        self.steps = stage.epochs * self.steps_per_epoch()
        if stage.max_steps is not None:
            self.steps = min(self.steps, stage.max_steps)
        self.max_reads = min(stage.epochs * num_items, self.steps * stage.batch_size)
        self.step = 0  # finished ones
        self.best_accuracy = -1.0  # in validation
        self.validated_step = 0  # the last one after which validation was finished
        self.num_bad = 0  # clips that could not be read, over all epochs so far
        if isinstance(stage, Distill) and stage.teacher_loss != "ce":
            self.common_vocab, self.suppressed_Z = self.distilled_vocabulary()
        if isinstance(stage, GRPO):
            self.vocabulary = SampledVocabulary.of(self.model, self.processor, stage.temperature)
            self.reference = frozen_copy(self.model) if stage.beta else None

    def load_model(self):
        runtime = runtime_of(self.stage)
        return load(self.stage.model, device=runtime.device, dtype=runtime.dtype, backend=runtime.backend)

    def distilled_vocabulary(self):
        """How many ids student and teacher share, and the suppressed ids, which the KL leaves out."""
        teacher_tokenizer = Tokenizer.from_file(str(Path(self.stage.teacher_labels).parent / "tokenizer.json"))
        suppressed_Z = torch.tensor(self.processor.suppressed_ids, device=self.model.device)
        return common_vocab_size(self.processor.tokenizer, teacher_tokenizer), suppressed_Z

    def choose_parameters(self):
        """Adds the adapter, or unfreezes what trains."""
        stage, model = self.stage, self.model
        if stage.trainable == "lora":
            if adapted(model):
                raise ValueError(f"{stage.name}: {stage.model} carries an adapter already; merge it first")
            add_lora(model, rank=stage.lora_rank, alpha=stage.lora_alpha, targets=stage.lora_targets, seed=stage.seed)
        else:
            merge_lora(model)
            model.set_trainable(stage.trainable)

    def steps_per_epoch(self):
        return math.ceil(self.num_items / self.stage.batch_size)

    def batch_indices(self, step):
        """Indices of a step's items: a pure function of seed and step, each epoch a permutation of its own."""
        epoch, batch = divmod(step, self.steps_per_epoch())
        generator = torch.Generator().manual_seed(hash_seed(self.stage.seed, "order", epoch))
        order = torch.randperm(self.num_items, generator=generator)
        return order[batch * self.stage.batch_size:(batch + 1) * self.stage.batch_size].tolist()

    # ---- the loop ----

    def fit(self, items, counts, validation=()):
        """Trains to the last step. counts: {reason: count} of what the items are, for the log."""
        stage = self.stage
        take_step = {Distill: self.distill_step, SFT: self.sft_step, GRPO: self.grpo_step}[type(stage)]
        self.announce(counts)
        upcoming = (items[i] for step in range(self.step, self.steps) for i in self.batch_indices(step))
        samples = prefetch(self.build_sample, upcoming, self.count_bad_clip, ahead=2 * stage.batch_size)
        with tqdm(total=self.steps, initial=self.step, desc=stage.name, unit="step") as bar:
            while True:
                if validation and self.validation_due():  # also after a stop between the state and its validation
                    self.validate(validation)
                if self.step == self.steps:
                    break
                began = time.perf_counter()
                batch = [next(samples) for _ in self.batch_indices(self.step)]
                metrics = take_step([sample for sample in batch if sample is not None])
                self.step += 1
                tokens_per_s = metrics["tokens"] / (time.perf_counter() - began)
                self.log({"step": self.step, **metrics, "tokens_per_s": round(tokens_per_s)})
                shown = "reward" if isinstance(stage, GRPO) else "loss"
                bar.set_postfix_str(f"{shown} {metrics.get(shown, 0):.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
                bar.update()
                if self.validation_due() or (stage.save_every and self.step % stage.save_every == 0):
                    self.save()
        if not any(self.optimizer.state.values()):
            raise ValueError(f"{stage.name}: no step had anything to learn: its clips were bad, or its groups left out")

    def announce(self, counts):
        """Says what will be learnt, on the screen and at a run's start in the log."""
        stage, is_grpo = self.stage, isinstance(self.stage, GRPO)
        if self.step == 0:
            count = sum(p.numel() for p in self.parameters.values())
            note = {"note": GRPO_NOTE} if is_grpo else {}
            self.log({"step": 0, "learns_from": counts, "steps": self.steps, "trainable_parameters": count, **note})
        resumed = f", from step {self.step}" if self.step else ""
        tqdm.write(f"{stage.name}: {self.steps} steps of {stage.batch_size} on {self.num_items} clips ({counts}){resumed}")
        if is_grpo:
            tqdm.write(f"{stage.name}: {GRPO_NOTE}")

    def build_sample(self, item):
        """(Prompt, Item); the Prompt ends with the target, but not in GRPO, where the model writes its own."""
        target = None if isinstance(self.stage, GRPO) else item.target
        return build_prompt(self.processor, item.example, self.stage.prompt_format, answer=target), item

    def count_bad_clip(self, item, error):
        """Logs a clip that cannot be used. Raises ValueError when there are too many."""
        self.num_bad += 1
        self.log({"step": self.step + 1, "bad": error.reason, "detail": str(error)})
        if self.num_bad > self.stage.max_bad * self.max_reads:
            raise ValueError(f"{self.stage.name}: {self.num_bad} bad clips, above max_bad {self.stage.max_bad} of the "
                             f"{self.max_reads} to be read; the last: {error}")

    def update(self, loss):
        """Clips the gradients, takes an optimizer step and drops them. Returns the gradient norm and the learning rate.

        Raises:
            ValueError: the loss or the gradient's norm is not finite; no weight is changed.
        """
        stage = self.stage
        if not math.isfinite(loss):
            raise ValueError(f"{stage.name}: the loss at step {self.step + 1} is {loss}; stopped")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), stage.max_grad_norm or math.inf).item()
        if not math.isfinite(grad_norm):
            raise ValueError(f"{stage.name}: the gradient's norm at step {self.step + 1} is {grad_norm}; stopped")
        lr = learning_rate(self.step, self.steps, stage.lr, stage.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"lr": lr, "grad_norm": grad_norm}

    def micro_batches(self, items):
        """A step's items in runs of micro_batch_size."""
        size = self.stage.micro_batch_size
        return [items[start:start + size] for start in range(0, len(items), size)]

    def cross_entropy(self, hidden_ND, batch, denominator, chosen_T=None):
        """The sum of -log p(target) / denominator over a batch's targets, or over those of a mask."""
        row_T, id_T, weight_T = batch.target_row_T, batch.target_id_T, batch.target_weight_T
        if chosen_T is not None:
            row_T, id_T, weight_T = row_T[chosen_T], id_T[chosen_T], weight_T[chosen_T]
        row_loss = CrossEntropy(id_T, weight_T / denominator, self.model.backend)
        return self.model.head_loss(hidden_ND, row_T, row_loss)[0]

    # ---- SFT ----

    def sft_step(self, samples):
        """One optimizer step on [(Prompt, Item)]: the mean cross-entropy over all target tokens.

        The denominator is the whole step's, so the gradient does not depend on the micro-batch size.
        """
        loss = self.sft_gradients(samples)
        return {"loss": loss, **self.update(loss), "tokens": sum(len(prompt) for prompt, _ in samples)}

    def sft_gradients(self, samples):
        denominator = sum(int(prompt.target_N.sum()) for prompt, _ in samples)
        total = 0.0
        for part in self.micro_batches(samples):
            batch = pack([prompt for prompt, _ in part]).to(self.model.device)
            loss = self.cross_entropy(self.model(batch), batch, denominator)
            loss.backward()
            total += loss.item()
        return total

    # ---- distillation: XMD, section 4 ----

    def distill_step(self, samples):
        """One optimizer step on [(Prompt, Item)]. The gate decided whose answer each clip's target is: item.source.

            "teacher"   -log p(letter), or T² KL(teacher || student) at the letter, or their sum (teacher_loss)
            "student"   -log p(the letter that the student gave before): the anti-forgetting loss
        """
        metrics = self.distill_gradients(samples)
        from_teacher = sum(item.source == "teacher" for _, item in samples)
        return {**metrics, **self.update(metrics["loss"]), "to_teacher": from_teacher,
                "tokens": sum(len(prompt) for prompt, _ in samples)}

    def distill_gradients(self, samples):
        """Gradients of a step: cross-entropy is a mean over its target tokens, the KL one over its clips."""
        denominator = sum(int(prompt.target_N.sum()) for prompt, _ in samples)
        metrics = Counter(loss=0.0)
        for part in self.micro_batches(samples):
            batch = pack([prompt for prompt, _ in part]).to(self.model.device)
            hidden_ND, losses = self.model(batch), []
            # packed without completions, so that item i of the micro-batch is segment i
            topk = {i: item.teacher_topk for i, (_, item) in enumerate(part) if item.teacher_topk is not None}
            learnt_T = torch.ones_like(batch.target_id_T, dtype=torch.bool)
            if topk:
                losses.append(self.teacher_kl(hidden_ND, batch, topk, len(samples), metrics))
            if topk and self.stage.teacher_loss == "kl":  # in the letter's place
                segments = torch.tensor(list(topk), device=self.model.device)
                learnt_T = ~torch.isin(batch.target_segment_T, segments)
            if learnt_T.any():
                losses.append(self.cross_entropy(hidden_ND, batch, denominator, learnt_T))
            loss = sum(losses)
            loss.backward()
            metrics["loss"] += loss.item()
        return dict(metrics)

    def teacher_kl(self, hidden_ND, batch, topk, num_clips, metrics):
        """T² KL(teacher || student) at the letters of some clips, {segment: the teacher's best ids}, over num_clips.

        The KL is over the ids that both vocabularies share, less the suppressed ones. What the teacher holds elsewhere
        is left out of its distribution and logged, as is what the student holds there.
        """
        stage, device = self.stage, hidden_ND.device
        owners = batch.target_segment_T.tolist()
        first_K = torch.tensor([owners.index(segment) for segment in topk])  # the letter is a turn's first token
        stored = stored_rows(list(topk.values()), self.common_vocab, self.suppressed_Z.cpu())
        id_KJ, logq_KJ, tail_K, dropped_K = stored
        weight_K = torch.full((len(topk),), 1 / num_clips, device=device)
        row_loss = DistillTopK(id_KJ.to(device), logq_KJ.to(device), tail_K.to(device), weight_K, self.common_vocab,
                               self.suppressed_Z, stage.temperature, self.model.backend)
        loss, columns = self.model.head_loss(hidden_ND, batch.target_row_T[first_K.to(device)], row_loss)
        metrics["kl"] += columns["kl"].sum().item() / num_clips
        metrics["teacher_dropped"] += dropped_K.sum().item() / num_clips
        metrics["student_dropped"] += columns["student_dropped"].sum().item() / num_clips
        return loss

    # ---- GRPO: equation 2 of SightSound-R1 ----

    def grpo_step(self, samples):
        """One rollout of [(Prompt, Item)] and the optimizer steps on it."""
        if not samples:
            return {"loss": 0.0, "tokens": 0}
        stage, times = self.stage, [time.perf_counter()]
        prompts, items = [prompt for prompt, _ in samples], [item for _, item in samples]
        for prompt, item in samples:
            check_length(self.processor, item.example, prompt, stage.max_new_tokens)
        if self.model.encoders_frozen():  # sampling, scoring and learning then share the encoders' output
            prompts = [self.model.encode_media(prompt) for prompt in prompts]
        completions = generate(
            self.model, self.processor, prompts, num_samples=stage.group_size, max_new_tokens=stage.max_new_tokens,
            temperature=stage.temperature, seed=stage.seed, stop=stage.stop, step=self.step,
            keys=[item.example.id for item in items], decode_slots=stage.decode_slots)
        rewards = score_completions(completions, items)
        self.show_completions(completions[0], items[0], rewards)
        rollout = make_rollout(stage, prompts, completions, rewards["reward"])
        times.append(time.perf_counter())
        if rollout and self.reference is not None:
            rollout.ref_T = reference_logprobs(self.reference, rollout.groups, stage.micro_batch_size, self.vocabulary)
        times.append(time.perf_counter())
        metrics = Counter(loss=0.0)
        for _ in range(stage.num_iterations if rollout else 0):
            for name, value in self.policy_update(rollout).items():
                metrics[name] += value / stage.num_iterations
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()  # the optimizer's kernels too belong to the update's time
        times.append(time.perf_counter())
        metrics = {**metrics, **rollout_metrics([item.example for item in items], completions, rewards),
                   "learned": len(rollout.groups) if rollout else 0}  # groups
        if rollout:  # what the sampler said of its tokens against the training pass: 0 but for rounding
            gap_T = (rollout.sampled_T - rollout.old_T).abs()
            metrics |= {"logp_gap_mean": gap_T.mean().item(), "logp_gap_max": gap_T.max().item()}
        for i, name in enumerate(("rollout_s", "scoring_s", "update_s")):
            metrics[name] = round(times[i + 1] - times[i], 3)
        sampled = sum(len(completion.ids) for group in completions for completion in group)
        return metrics | {"tokens": sum(map(len, prompts)) + sampled}

    def policy_update(self, rollout):
        """One optimizer step on a rollout."""
        loss, columns = self.policy_gradient(rollout)
        if self.reference is not None and not any(self.optimizer.state.values()):
            self.check_reference(rollout)  # no update yet, in this process or an earlier one
        metrics = {"loss": loss, **self.update(loss), "entropy": columns["entropy"].mean().item(),
                   "clip_fraction": columns["clipped"].mean().item()}
        if self.reference is not None:
            metrics["kl"] = columns["kl"].mean().item()
        return metrics

    def policy_gradient(self, rollout):
        """Gradients of one optimizer step, minus equation 2; returns the loss and {column: (T,)} of head.PolicyLoss.

            loss   = sum over tokens of weight (-min[ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A] + beta KL)
            weight = 1 / (P G |o_i|), over P prompts of G completions o_i (policy.token_weights)
            A      = (r_i - mean(r)) / (std(r) + 1e-4), the advantage, over the completions of a prompt
            ratio  = exp(log pi_theta - log pi_theta_old), where old is the policy before the rollout's first update
            KL     = exp(d) - d - 1 with d = log pi_ref - log pi_theta (k3)

        The denominators are the whole step's, so the gradient does not depend on how it is cut into micro-batches.
        """
        stage, device, vocabulary = self.stage, self.model.device, self.vocabulary
        clip_config = ClipConfig(stage.clip_low, stage.clip_high, stage.beta, stage.kl)
        total, columns, end = 0.0, [], 0
        first_update = rollout.old_T is None
        if first_update:
            rollout.old_T = torch.empty_like(rollout.sampled_T)
        for groups in self.micro_batches(rollout.groups):
            batch = pack(groups).to(device)
            begin, end = end, end + len(batch.target_id_T)
            rows = slice(begin, end)
            hidden_ND = self.model(batch)
            if first_update:  # the policy is the old one, and a product with the head costs less than a forward pass
                rollout.old_T[rows] = token_logprobs(self.model, hidden_ND, batch, vocabulary)
            lengths = None
            if stage.ratio == "sequence":
                lengths = tuple(len(ids_T) for group in groups for ids_T in group.completions)
            row_loss = PolicyLoss(
                batch.target_id_T, rollout.old_T[rows].to(device),
                None if rollout.ref_T is None else rollout.ref_T[rows].to(device),
                rollout.advantage_T[rows].to(device), rollout.weight_T[rows].to(device), clip_config,
                self.model.backend, vocabulary.temperature, vocabulary.suppressed_Z, vocabulary.vocab_limit, lengths)
            loss, found = self.model.head_loss(hidden_ND, batch.target_row_T, row_loss)
            loss.backward()
            total += loss.item()
            columns.append({name: column_T.cpu() for name, column_T in found.items()})
        return total, {name: torch.cat([part[name] for part in columns]) for name in columns[0]}

    def check_reference(self, rollout):
        """Before the first update the policy is the reference; one of other weights would pull it away for good."""
        delta_T = (rollout.ref_T - rollout.old_T).double()
        kl = (delta_T.expm1() - delta_T).mean().item()
        if not kl <= MAX_START_KL:
            raise ValueError(f"{self.stage.name}: before the first update the KL to the reference is {kl:.3g}, above "
                             f"{MAX_START_KL}: the reference is not the policy that training starts from; stopped")

    def show_completions(self, group, item, rewards):
        """Writes some of the first prompt's completions, with their rewards, every completions_every steps."""
        every = self.stage.completions_every
        if not every or self.step % every:
            return
        for i, completion in enumerate(group[:SHOWN_COMPLETIONS]):
            earned = {name: reward_PG[0, i].item() for name, reward_PG in rewards.items()}
            append_jsonl(self.folder / "completions.jsonl",
                         {"step": self.step + 1, "id": item.example.id, **earned, "finished": completion.finished,
                          "text": completion.text})

    # ---- validation, saving, resuming ----

    def validation_due(self):
        """Whether the step that is finished is one to validate after, and has not been."""
        every = self.stage.eval_every
        due = self.step == self.steps or (every and self.step % every == 0)
        return due and self.step > self.validated_step

    def validate(self, examples):
        """Accuracy on the validation manifest: by letters, or by greedily written answers in GRPO and with traces.

        The best weights so far (the earliest, in a tie) are kept.
        """
        stage = self.stage
        if isinstance(stage, GRPO) or getattr(stage, "traces", None):
            writing = Writing(stage.max_new_tokens, stop=getattr(stage, "stop", ()))
            records = write_answers(self.model, self.processor, examples, stage.prompt_format, writing)
            for example, record in zip(examples, records, strict=True):  # read as the reward reads it, strictly
                record["answer"] = None if "bad" in record else parse_answer(record["text"], example.options)
        else:
            records = score_letters(self.model, self.processor, examples, stage.prompt_format)
        bad = count_bad(records, stage.name, stage.max_bad)
        accuracy = tabulate(examples, records)["accuracy"]
        if accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            write_safetensors(self.folder / "best.safetensors", self.parameters)
            self.save()
        self.log({"step": self.step, "val_accuracy": accuracy, "val_bad": bad})  # last: it marks the validation as done
        self.validated_step = self.step
        tqdm.write(f"{stage.name}: step {self.step}, validation accuracy {100 * accuracy:.1f} %")

    def save(self):
        """Replaces the resumable state."""
        tensors = optimizer_tensors(self.optimizer, self.parameters)
        tensors.update({f"{name}.weight": p for name, p in self.parameters.items()})
        save_state(self.folder, tensors, {"step": self.step, "best": self.best_accuracy, "bad": self.num_bad})

    def resume(self):
        """Goes on from the stage's last state, if there is one; log lines of steps that will be redone are dropped."""
        state = load_state(self.folder)
        if state is not None:
            tensors, meta = state
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(tensors[f"{name}.weight"])
            restore_optimizer(self.optimizer, self.parameters, tensors)
            self.step, self.best_accuracy, self.num_bad = meta["step"], meta["best"], meta["bad"]
        for line in rewind_logs(self.folder, self.step):
            if "val_accuracy" in line:
                self.validated_step = max(self.validated_step, line["step"])

    def publish(self):
        """Writes best/: the best weights in validation (the last ones without it), as `load` and others read them."""
        best = self.folder / "best.safetensors"
        if best.exists():
            with torch.no_grad():
                for name, tensor in load_file(best).items():
                    self.parameters[name].copy_(tensor)
        if self.stage.trainable == "lora":
            save_adapter(self.model, pinned(self.stage.model), self.folder / "best")
        else:
            save_model(self.model, self.processor.folder, self.folder / "best")


def score_completions(completions, items):
    """{name of a reward: (P, G)} of P prompts' completions, and "reward", their sum."""
    rewards = {}
    for name, reward in REWARDS.items():
        rewards[name] = torch.tensor([[reward(completion.text, item.example.options, item.target)
                                       for completion in group]
                                      for group, item in zip(completions, items, strict=True)])
    rewards["reward"] = sum(rewards.values())
    return rewards


def stored_rows(topk, common_vocab, suppressed_Z):
    """The teacher's best ids of K clips as kernels/distill_topk.py takes them: (id_KJ, logq_KJ, tail_K, dropped_K).

    Ids outside the common vocabulary are taken out and the rest is normalised again. What lies outside among the ids that
    were not stored cannot be told from the tail, which it is part of.
    """
    id_KJ = torch.tensor([stored["ids"] for stored in topk], dtype=torch.int32)
    logq_KJ = torch.tensor([[z / stored["temperature"] - stored["logsumexp"] for z in stored["logits"]]
                            for stored in topk])
    tail_K = (1 - logq_KJ.exp().sum(-1)).clamp(min=0)
    outside_KJ = (id_KJ >= common_vocab) | torch.isin(id_KJ, suppressed_Z)
    dropped_K = logq_KJ.exp().where(outside_KJ, 0).sum(-1)
    kept_K = 1 - dropped_K
    return id_KJ.masked_fill(outside_KJ, -1), logq_KJ - kept_K.log()[:, None], tail_K / kept_K, dropped_K


if __name__ == "__main__":  # the command line is the runner's, which imports this module
    runpy.run_module("minixmd.runner", run_name="__main__")
