"""Training, in one file: python -m minixmd.train CONFIG [stage.field=value …], or a bundled recipe: … train toy

Read it from the top: a Trainer is set up, then comes the loop, then one optimizer step of each way to learn, whole:

    distill_step   XMD: the teacher's answer where the gate says so, the student's own earlier one elsewhere
    sft_step       the right letter, or a teacher's chain of thought
    grpo_step      SightSound-R1: a rollout, its rewards, and the clipped policy update; in an OnPolicy stage a teacher
                   that sees the clip also scores every token that the student wrote

and last validation, saving and resuming. A run that was stopped goes on from its last state and ends with the same
weights, bit for bit on the CPU. The command line, and the other stages of a config, are runner.py's.
"""
import math
import runpy
import time
from collections import defaultdict
from contextlib import closing

import torch
from tqdm import tqdm

from minixmd import generate, load, pack
from minixmd.config import GRPO, SFT, Distill
from minixmd.inputs.batch import send
from minixmd.inputs.examples import read_examples
from minixmd.inputs.prompts import build_prompt, prefetch
from minixmd.kernels.grpo import ClipConfig
from minixmd.learning import checkpoint, logprobs, optim, policy, steps, targets
from minixmd.learning.reference import Reference
from minixmd.learning.rollout import Usage
from minixmd.learning.teacher import load_teacher
from minixmd.models import sharding
from minixmd.models.checkpointing import set_checkpointing
from minixmd.models.head import CrossEntropy, DistillTopK, PolicyLoss
from minixmd.models.lora import make_trainable
from minixmd.runs import distributed
from minixmd.runs.device import runtime_of
from minixmd.runs.heartbeat import beat
from minixmd.runs.seeds import hash_seed
from minixmd.stages.multiple_choice import read_validation, validation_accuracy
from minixmd.stages.shown_completions import show_completions

GRPO_NOTE = ("the GRPO loss is about 0 while the ratio is 1, as it is in the first update after a rollout: what is "
             "left is the KL and the mean of the advantages, 0 where all completions weigh the same. Its gradient is "
             "not 0; watch the reward")
MAX_EQUAL_GROUPS = 400  # of a GRPO stage's first ones, among which rewards must differ at least once
MAX_START_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-4}  # to the reference, before the first update


def train(stage, folder, log):
    """Runs a Distill, SFT or GRPO stage. Writes best/ (an adapter, or a whole model) and log.jsonl."""
    examples = read_examples(stage)
    validation = read_validation(stage)
    items, counts = targets.resolve_targets(stage, examples)
    trainer = Trainer(stage, len(items), folder, log)
    trainer.resume()
    if items:
        trainer.fit(items, counts, validation)
    else:
        note = f"nothing to learn ({counts}): its model is the one before"
        log({"step": 0, "nothing_to_learn": note})
        tqdm.write(f"{stage.name}: {note}")
    trainer.publish()


class Trainer:
    """One training stage: its model, its optimizer, and how far it is.

    Args:
        stage: Distill, SFT, GRPO or OnPolicy, with paths in place of "@name".
        num_items: Items that it learns from, for the number of steps.
        folder: the stage's directory. log: function that appends a dict to log.jsonl.
        load: minixmd.load, or a function like it.
    """

    # ---- setup ----

    def __init__(self, stage, num_items, folder=None, log=None, load=load):
        self.stage = stage
        self.num_items = num_items
        self.folder = folder
        self.log = log
        self.model, self.processor = self.load_model(load)
        self.merged = make_trainable(
            self.model, stage.trainable, rank=stage.lora_rank, alpha=stage.lora_alpha, targets=stage.lora_targets,
            seed=stage.seed)
        self.checkpointing = stage.checkpointing == "on" or stage.checkpointing == "auto" and self.on_gpu()
        set_checkpointing(self.model, self.checkpointing)
        self.rank, self.world_size = distributed.rank_and_world_size()
        self.sharded = self.world_size > 1 and stage.trainable != "lora"  # an adapter's model is whole in every process
        if self.sharded:
            sharding.shard_trained(self.model)
        self.parameters = sharding.local_parameters(self.model)
        self.optimizer = optim.adamw(
            self.parameters, lr=stage.lr, betas=stage.betas, eps=stage.eps, weight_decay=stage.weight_decay,
            moments=stage.moments, backend=self.model.backend)
        self.steps = stage.epochs * self.steps_per_epoch()
        if stage.max_steps is not None:
            self.steps = min(self.steps, stage.max_steps)
        self.max_reads = min(stage.epochs * num_items, self.steps * stage.batch_size)
        self.orders = {}  # epoch -> the order of its items
        self.step = 0  # finished ones
        self.best_accuracy = -1.0  # in validation
        self.best_step = 0  # after which it was reached; 0 = never
        self.validated_step = 0  # the last one after which validation was finished
        self.varied = False  # whether rewards of a prompt's completions ever differed
        self.num_bad = 0  # clips that could not be read, over all epochs so far
        self.items = None  # of `fit`
        self.samples = None  # what prefetch makes of them
        self.drawn = None  # of the coming step: draw's
        self.waited_s = 0.0  # for clips, in the step
        self.seconds = defaultdict(float)  # of the steps, and their parts
        self.spare = None  # a sample of which fillers are made, where weights are sharded
        if isinstance(stage, (Distill, SFT)) and stage.teacher_loss != "ce":
            self.common_vocab, self.suppressed_ids = self.distilled_vocabulary()
            self.suppressed_Z = self.suppressed_ids.to(self.model.device)
        if isinstance(stage, GRPO):
            self.vocabulary = logprobs.SampledVocabulary.of(self.model, self.processor, stage.temperature)
            self.reference = Reference(self.model, stage.reference, self.sharded) if stage.beta else None
        self.teacher = None  # of OnPolicy
        if getattr(stage, "teacher_weight", 0):
            self.teacher = self.load_teacher(load)

    def whole_model(self):
        """The model with all its weights in this process, for what is no training; all processes call it together."""
        return sharding.whole(self.model) if self.sharded else self.model

    def on_gpu(self):
        return self.model.device.type == "cuda"

    def now(self):
        """A time in seconds, when a GPU has done what it was given."""
        if self.on_gpu():
            torch.cuda.synchronize()
        return time.perf_counter()

    def load_model(self, load):
        return load(self.stage.model, **runtime_of(self.stage))

    def load_teacher(self, load):
        return load_teacher(self.stage, self.processor, self.model.device, load)

    def distilled_vocabulary(self):
        """How many ids student and teacher share, and the suppressed ids, which the KL leaves out."""
        return targets.distilled_vocabulary(self.stage, self.processor)

    def steps_per_epoch(self):
        return math.ceil(self.num_items / self.stage.batch_size)

    def batch_indices(self, step):
        """Indices of a step's items: a pure function of seed and step, each epoch a permutation of its own."""
        epoch, batch = divmod(step, self.steps_per_epoch())
        if epoch not in self.orders:
            generator = torch.Generator().manual_seed(hash_seed(self.stage.seed, "order", epoch))
            self.orders[epoch] = torch.randperm(self.num_items, generator=generator)
        start = batch * self.stage.batch_size
        return self.orders[epoch][start:start + self.stage.batch_size].tolist()

    # ---- the loop ----

    def fit(self, items, counts, validation=()):
        """Trains to the last step. counts: {reason: count} of what the items are, for the log."""
        stage = self.stage
        self.announce(counts)
        self.items = items
        self.samples = prefetch(self.build_sample, self.upcoming_items(), lambda item, error: error,
                                reading=stage.reading, ahead=2 * math.ceil(stage.batch_size / self.world_size))
        take_step = {Distill: self.distill_step, SFT: self.sft_step}.get(type(stage), self.grpo_step)
        bar = tqdm(total=self.steps, initial=self.step, desc=stage.name, unit="step")
        with closing(self.samples), bar:  # its child processes end
            while True:
                if any(distributed.gather(distributed.stop_requested())):
                    self.save()
                    raise distributed.Stopped
                if validation and self.validation_due():  # also after a stop between the state and its validation
                    self.validate(validation)
                if self.step == self.steps:
                    break
                began = time.perf_counter()
                learnt_from, num_clips, errors = self.drawn or self.draw(self.step)
                self.drawn = None
                for error in errors:
                    self.count_bad_clip(error)
                metrics = {"loss": 0.0, "tokens": 0}  # of a step whose clips were all bad
                if num_clips:
                    metrics = take_step(learnt_from)
                self.step += 1
                step_s = time.perf_counter() - began
                tokens_per_s = metrics["tokens"] / step_s
                metrics |= {"data_s": round(self.waited_s, 3), "step_s": round(step_s, 3)}
                self.waited_s = 0.0
                for name, value in metrics.items():
                    if name.endswith("_s"):
                        self.seconds[name] += value
                self.log({"step": self.step, **metrics, "tokens_per_s": round(tokens_per_s)})
                shown = "reward" if isinstance(stage, GRPO) else "loss"
                bar.set_postfix_str(f"{shown} {metrics.get(shown, 0):.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
                bar.update()
                save_due = stage.save_every and self.step % stage.save_every == 0
                if save_due or self.validation_due():
                    self.save()
        whole = self.seconds.pop("step_s", 0.0)
        if whole:
            parts = [f"{name.removesuffix('_s')} {100 * part / whole:.0f} %" for name, part in self.seconds.items()]
            tqdm.write(f"{stage.name}: of its steps' time {', '.join(parts)}")
        if not any(self.optimizer.state.values()):
            raise ValueError(f"{stage.name}: no step had anything to learn: its clips were bad, or its groups left out")
        if isinstance(stage, GRPO) and stage.reward_weight and not self.varied:
            tqdm.write(f"{stage.name}: note: rewards differed in no group: nothing was learnt from them")

    def upcoming_items(self):
        for step in range(self.step, self.steps):
            yield from steps.deal(self.items, self.batch_indices(step))

    def draw(self, step):
        """(what this process learns from in a step: MicroBatches, or for a rollout [(Prompt, Item)]; how many clips all
        learn from; the errors of all their bad ones). All processes call it together."""
        samples, errors = [], []
        for _ in steps.deal(self.items, self.batch_indices(step)):
            began = time.perf_counter()
            sample = next(self.samples)
            self.waited_s += time.perf_counter() - began
            kind = errors if isinstance(sample, Exception) else samples
            kind.append(sample)
        numbers, errors = zip(*distributed.gather((len(samples), errors)), strict=True)
        if self.sharded and any(numbers):
            self.spare = samples[0] if samples else None
            if not all(numbers):  # then all take that of the first who has one
                self.spare = distributed.broadcast(self.spare, source=[number > 0 for number in numbers].index(True))
        learnt_from = samples if isinstance(self.stage, GRPO) else self.micro_batches(samples)
        return learnt_from, sum(numbers), sum(errors, [])

    def announce(self, counts):
        """Says what will be learnt, on the screen and at a run's start in the log."""
        stage = self.stage
        line = {
            "step": 0,
            "learns_from": counts,
            "steps": self.steps,
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }
        text = f"{stage.name}: {self.steps} steps of {stage.batch_size} on {self.num_items} clips ({counts})"
        if self.world_size > 1:
            text += f", in {self.world_size} processes"
        if self.checkpointing:
            text += ", blocks checkpointed"
        if self.step:
            text += f", from step {self.step}"
        if isinstance(stage, GRPO) and self.teacher is None:
            line["note"] = GRPO_NOTE
            text += f"\n{stage.name}: {GRPO_NOTE}"
        if self.teacher is not None:
            common, total = self.teacher.common_vocab, self.processor.vocab_size
            text += f"\n{stage.name}: the teacher shares {common:,} of the {total:,} ids"
        if self.merged:
            text += f"\n{stage.name}: the adapter of {stage.model} is merged into its base: training starts from both"
        if self.step == 0:
            self.log(line)
        tqdm.write(text)

    def build_sample(self, item, load):
        """(Prompt, Item); the Prompt ends with the target, but not in GRPO, where the model writes its own. With a
        teacher the Item gets its Prompt. A trace's ids, which are learnt as they are, follow the Prompt in a Group."""
        answer, max_new_tokens = item.target, 0
        if isinstance(self.stage, GRPO):
            answer, max_new_tokens = None, self.stage.max_new_tokens
        if item.ids is not None:
            answer, max_new_tokens = None, len(item.ids)
        prompt_format = self.stage.prompt_format
        prompt = build_prompt(self.processor, item.example, prompt_format, answer, "", load, max_new_tokens)
        steps.check_length(prompt, item.example, max_new_tokens, self.stage.micro_batch_tokens)
        if item.shown is not None:
            item = self.teacher.show(item, load)
        if item.ids is not None:
            prompt = steps.append_trace(prompt, item, self.common_vocab, self.suppressed_ids)
        return prompt, item

    def count_bad_clip(self, error):
        """Logs a clip that cannot be used. Raises ValueError when there are too many."""
        self.num_bad += 1
        self.log({"step": self.step + 1, "bad": error.reason, "detail": str(error)})
        if self.num_bad > self.stage.max_bad * self.max_reads:
            raise ValueError(f"{self.stage.name}: {self.num_bad} bad clips, above max_bad {self.stage.max_bad} of the "
                             f"{self.max_reads} to be read; the last: {error}")

    def update(self, values):
        """Adds up the processes' gradients, clips them, takes an optimizer step and drops them. values: {"loss", …:
        this process's part}, on its device, which are added up and read here, once a step, with the gradient's norm.
        Returns them all, and the learning rate. Raises ValueError, and changes no weight, where one is not finite."""
        stage = self.stage
        if self.samples is not None and self.drawn is None and self.step + 1 < self.steps:
            self.drawn = self.draw(self.step + 1)  # packed and pinned while a GPU is still at the gradients
        grad_norm = self.clip_gradients(stage.max_grad_norm or math.inf)
        names = list(dict.fromkeys(sum(distributed.gather(list(values)), [])))  # a process may have none of some
        parts = [values.get(name, self.zero()).double() for name in names]
        read = torch.stack([*distributed.all_reduce(torch.stack(parts)), grad_norm.double()]).tolist()
        metrics = dict(zip([*names, "grad_norm"], read, strict=True))
        if not math.isfinite(metrics["loss"]):
            raise ValueError(f"{stage.name}: the loss at step {self.step + 1} is {metrics['loss']}; stopped")
        if not math.isfinite(metrics["grad_norm"]):
            raise ValueError(f"{stage.name}: the gradient's norm at step {self.step + 1} is {metrics['grad_norm']}; "
                             "stopped")
        lr = optim.learning_rate(self.step, self.steps, stage.lr, stage.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics | {"lr": lr}

    def clip_gradients(self, max_norm):
        """Leaves in self.parameters the gradients of all processes, clipped. Returns their norm before that."""
        parameters = list(self.parameters.values())
        if self.sharded:  # FSDP has added them up
            sharding.move_gradients(self.model, self.parameters)
        else:
            distributed.all_reduce_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.sharded:
            norm = distributed.all_reduce(norm.double().square()).sqrt().to(norm.dtype)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def micro_batches(self, samples):
        return steps.make_micro_batches(samples, self.stage.micro_batch_tokens, self.model.device, self.spare)

    def cross_entropy(self, hidden_ND, batch, denominator, chosen_L=None):
        """The sum of -log p(target) / denominator over a batch's targets, or over those of these numbers."""
        row_T, id_T, weight_T = batch.target_row_T, batch.target_id_T, batch.target_weight_T
        if chosen_L is not None:
            row_T, id_T, weight_T = row_T[chosen_L], id_T[chosen_L], weight_T[chosen_L]
        row_loss = CrossEntropy(id_T, weight_T / denominator, self.model.backend)
        return self.model.head_loss(hidden_ND, row_T, row_loss)[0]

    # ---- SFT ----

    def sft_step(self, micro_batches):
        """One optimizer step on MicroBatches: the mean over all target tokens of -log p(token) or, with teacher_loss
        "kl", of KL(teacher || student), the teacher at the temperature at which it sampled, the student at 1. The
        denominator is the whole step's, so the gradient does not depend on how it is cut."""
        counts = steps.count(micro_batches)
        return self.update(self.sft_gradients(micro_batches, counts)) | {"tokens": counts.tokens}

    def sft_gradients(self, micro_batches, counts):
        """Gradients of a step; returns {"loss", …}, on the model's device."""
        metrics = defaultdict(self.zero)
        for micro_batch in micro_batches:
            beat()
            batch = micro_batch.batch.to(self.model.device)
            hidden_ND = self.model(batch)
            if micro_batch.items and self.stage.teacher_loss == "kl":
                topk = [item.teacher_topk for item in micro_batch.items]
                loss = self.teacher_kl(hidden_ND, batch.target_row_T, topk, counts.targets, metrics)
            else:
                denominator = counts.targets if micro_batch.items else math.inf
                loss = self.cross_entropy(hidden_ND, batch, denominator)
            loss.backward()
            metrics["loss"] += loss.detach()
        return dict(metrics)

    def zero(self):
        """A sum to begin, on the model's device, in fp64."""
        return torch.zeros((), dtype=torch.float64, device=self.model.device)

    # ---- distillation: XMD, section 4 ----

    def distill_step(self, micro_batches):
        """One optimizer step on MicroBatches. The gate decided whose answer each clip's target is: item.source.

            "teacher"   -log p(letter), or T² KL(teacher || student) at the letter, or their sum (teacher_loss)
            "student"   -log p(the letter that the student gave before): the anti-forgetting loss
        """
        counts = steps.count(micro_batches)
        metrics = self.update(self.distill_gradients(micro_batches, counts))
        sources = [item.source for micro_batch in micro_batches for item in micro_batch.items]
        [from_teacher] = distributed.total(sources.count("teacher"))
        return metrics | {"to_teacher": from_teacher, "tokens": counts.tokens}

    def distill_gradients(self, micro_batches, counts):
        """Gradients of a step: cross-entropy is a mean over its target tokens, the KL one over its clips. Returns
        {"loss", …} on the model's device."""
        metrics = defaultdict(self.zero)
        for micro_batch in micro_batches:
            beat()
            num_targets, num_clips = counts.targets, counts.clips
            if not micro_batch.items:
                num_targets = num_clips = math.inf
            batch = micro_batch.batch.to(self.model.device)
            hidden_ND = self.model(batch)
            topk = {}  # number of a clip in the micro-batch, which is its segment's -> the teacher's best ids
            for i, item in enumerate(micro_batch.items):
                if item.source == "teacher" and self.stage.teacher_loss != "ce":
                    topk[i] = item.teacher_topk
            losses = []
            owners = micro_batch.batch.target_segment_T.tolist()  # on the CPU
            learnt = list(range(len(owners)))
            if topk:
                first_K = torch.tensor([owners.index(segment) for segment in topk])  # letters: a turn's first token
                [first_K] = send([first_K], self.model.device)
                rows = batch.target_row_T[first_K]
                losses.append(self.teacher_kl(hidden_ND, rows, list(topk.values()), num_clips, metrics))
            if topk and self.stage.teacher_loss == "kl":  # in the letter's place
                learnt = [t for t in learnt if owners[t] not in topk]
            if learnt:
                [learnt_L] = send([torch.tensor(learnt)], self.model.device)
                losses.append(self.cross_entropy(hidden_ND, batch, num_targets, learnt_L))
            loss = sum(losses)
            loss.backward()
            metrics["loss"] += loss.detach()
        return dict(metrics)

    def teacher_kl(self, hidden_ND, row_K, topk, denominator, metrics):
        """The sum of T² KL(teacher || student) / denominator at K rows of hidden_ND. topk: the teacher's best ids. The
        KL is over the ids that both vocabularies share, less the suppressed ones. What the teacher holds elsewhere is
        left out of its distribution and logged, as is what the student holds there."""
        device = hidden_ND.device
        rows = targets.stored_rows(topk, self.common_vocab, self.suppressed_ids, len(row_K))
        id_KJ, logq_KJ, tail_K, dropped_K = rows
        [id_KJ] = send([id_KJ], device)
        logq_KJ, tail_K, dropped_K = send([logq_KJ, tail_K, dropped_K], device)
        row_loss = DistillTopK(
            id_KJ,
            logq_KJ,
            tail_K,
            torch.full((len(row_K),), 1 / denominator, device=device),
            self.common_vocab,
            self.suppressed_Z,
            self.stage.temperature,
            self.model.backend,
        )
        loss, columns = self.model.head_loss(hidden_ND, row_K, row_loss)
        metrics["kl"] += columns["kl"].sum() / denominator
        metrics["teacher_dropped"] += dropped_K.sum() / denominator
        metrics["student_dropped"] += columns["student_dropped"].sum() / denominator
        return loss

    # ---- GRPO: equation 2 of SightSound-R1; with a teacher on-policy distillation ----

    def grpo_step(self, samples):
        """One rollout of [(Prompt, Item)] and the optimizer steps on it. A teacher reads it once, before the first."""
        stage = self.stage
        prompts = [prompt for prompt, _ in samples]
        items = [item for _, item in samples]

        started = self.now()
        sampler = self.whole_model()  # the policy itself: where its weights are sharded, gathered for the rollout
        if self.model.encoders_frozen():  # sampling, scoring and learning then share the encoders' output
            prompts = [sampler.encode_media(prompt) for prompt in prompts]
        completions, usage = [], Usage()
        self.now()  # what is encoded is no part of the prefill
        own_words = stage.samples == "student"
        if not own_words:
            completions = [policy.given_completions(item.texts, self.processor, stage.max_new_tokens)
                           for item in items]
        elif prompts:
            completions = generate(
                sampler, self.processor, prompts, num_samples=stage.group_size, max_new_tokens=stage.max_new_tokens,
                temperature=stage.temperature, seed=stage.seed, step=self.step, stop=stage.stop,
                keys=[item.example.id for item in items], decode_slots=stage.slots, usage=usage)
        del sampler
        letters = stage.prompt_format.asks_for_letter
        rewards = policy.score_completions(completions, items, letters)
        teacher_prompts = [item.teacher_prompt for item in items]
        rollout = policy.make_rollout(stage, prompts, completions, rewards["reward"], teacher_prompts)
        if self.sharded and rollout.learned:
            rollout.fill_up(self.spare[0], self.processor.end_id)

        sampled = self.now()
        if self.teacher is not None and rollout.learned:
            self.read_by_teacher(rollout, teacher_prompts, self.teacher.frozen_model())
        every = stage.completions_every
        if prompts and self.rank == 0 and every and self.step % every == 0:
            reader = self.teacher if own_words else None
            show_completions(self.folder, self.step + 1, rollout, completions, items, rewards, reader)
        read = self.now()
        scored_T = None  # what the policy says without gradients, before its first update
        first_update = not any(self.optimizer.state.values())  # in this process or an earlier one
        if rollout.micro_batches and self.reference is not None:
            options = rollout.micro_batches, self.vocabulary
            rollout.ref_T = logprobs.reference_logprobs(self.reference.frozen_model(), *options)
            if first_update:
                scored_T = logprobs.reference_logprobs(self.whole_model(), *options)
                self.check_reference(rollout.ref_T, scored_T)

        scored = self.now()
        metrics = defaultdict(float, loss=0.0)
        for _ in range(stage.num_iterations if rollout.learned else 0):
            for name, value in self.policy_update(rollout).items():
                metrics[name] += value / stage.num_iterations
        updated = self.now()

        metrics = dict(metrics)
        own = policy.rollout_metrics([item.example for item in items], completions, rewards, letters) if items else {}
        metrics |= policy.mean_metrics(len(items), own)
        metrics["learned"] = rollout.learned  # groups
        self.varied = self.varied or metrics["zero_variance"] < 1
        groups = (self.step + 1) * stage.batch_size
        if not self.varied and groups >= MAX_EQUAL_GROUPS and self.teacher is None:
            raise ValueError(f"{stage.name}: in none of {groups} groups did the completions' rewards differ, so they "
                             "teach nothing: completions.jsonl shows some")
        if rollout.learned and own_words:  # what the sampler said against the training pass: 0 but for rounding
            metrics |= self.logp_gaps(rollout, scored_T, first_update and self.reference is not None)
        usage.write_to(metrics.update)
        metrics["encode_s"] = round(sampled - started - usage.prefill_s - usage.decode_s, 3)  # of clips; rewards
        metrics["scoring_s"] = round(scored - read, 3)
        if self.teacher is not None:
            metrics["teacher_s"] = round(read - sampled, 3)
        metrics["update_s"] = round(updated - scored, 3)
        new_tokens = sum(len(completion.ids) for group in completions for completion in group)
        [tokens] = distributed.total(sum(map(len, prompts)) + new_tokens)
        return metrics | {"tokens": tokens}

    def read_by_teacher(self, rollout, teacher_prompts, model):
        rollout.teacher_TE, read_T = self.teacher.read(model, rollout, teacher_prompts)
        weight_T = self.stage.teacher_weight * rollout.weight_T * read_T
        [rollout.teacher_weight_T] = send([weight_T], self.model.device)
        [rollout.taught_tokens] = distributed.total(int(read_T.sum()))

    def logp_gaps(self, rollout, scored_T, scored):
        """Between the training pass and what the sampler said; with `scored` also what scoring said: scored_T, None
        without tokens."""
        own = slice(rollout.own_tokens)
        gap_T, scoring_gap_T = torch.zeros(2, 1, device=self.model.device)
        if rollout.own_tokens:
            gap_T = (rollout.sampled_T - rollout.old_T)[own].abs()
        if rollout.own_tokens and scored:
            scoring_gap_T = (scored_T - rollout.old_T)[own].abs()
        found = torch.stack([gap_T.sum(), gap_T.max(), scoring_gap_T.max()]).tolist()
        sums, largest, of_scoring = zip(*distributed.gather(found), strict=True)
        gaps = {"logp_gap_mean": sum(sums) / rollout.tokens, "logp_gap_max": max(largest)}
        return gaps | {"scoring_gap_max": max(of_scoring)} if scored else gaps

    def policy_update(self, rollout):
        loss, columns = self.policy_gradient(rollout)
        values = {"loss": loss}
        for name, column in {"entropy": "entropy", "clip_fraction": "clipped", "kl": "kl"}.items():
            if column in columns and (name != "kl" or self.reference is not None):
                values[name] = columns[column][:rollout.own_tokens].sum() / rollout.tokens
        if rollout.taught_tokens and "teacher_kl" in columns:
            read_T = rollout.teacher_weight_T != 0
            for name in ("teacher_kl", "teacher_dropped", "student_dropped"):
                values[name] = columns[name].where(read_T, 0).sum() / rollout.taught_tokens
        return self.update(values)

    def policy_gradient(self, rollout):
        """Gradients of one optimizer step, minus equation 2; returns the loss and {column: (T,)} of head.PolicyLoss.

            loss   = sum over tokens of weight (-min[ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A] + beta KL)
            weight = 1 / (P G |o_i|), over P prompts of G completions o_i (policy.token_weights)
            A      = (r_i - mean(r)) / (std(r) + 1e-4), the advantage, over the completions of a prompt
            ratio  = exp(log pi_theta - log pi_theta_old), where old is the policy before the rollout's first update
            KL     = exp(d) - d - 1 with d = log pi_ref - log pi_theta (k3)

        With a teacher, whose hidden states at the tokens are in the rollout, the bracket also has teacher_weight D,
        with D = T² KL(teacher || policy) or T² KL(policy || teacher) over the ids that both know, at the temperature T
        of the sampling; and A is multiplied by reward_weight.
        """
        stage, device, vocabulary = self.stage, self.model.device, self.vocabulary
        rollout.send(device)
        clip_config = ClipConfig(stage.clip_low, stage.clip_high, stage.beta, stage.kl)
        total, columns, end = self.zero(), defaultdict(list), 0
        first_update = rollout.old_T is None
        if first_update:
            rollout.old_T = torch.empty_like(rollout.sampled_T)
        for groups in rollout.micro_batches:
            beat()
            batch = pack(groups).to(device)
            begin, end = end, end + len(batch.target_id_T)
            rows = slice(begin, end)
            hidden_ND = self.model(batch)
            if first_update:  # the policy is the old one, and a product with the head costs less than a forward pass
                rollout.old_T[rows] = logprobs.token_logprobs(self.model, hidden_ND, batch, vocabulary)
            ref_T = None if rollout.ref_T is None else rollout.ref_T[rows]
            lengths = None
            if stage.ratio == "sequence":
                lengths = tuple(len(ids_T) for group in groups for ids_T in group.completions)
            row_loss = PolicyLoss(
                batch.target_id_T,
                rollout.old_T[rows],
                ref_T,
                rollout.advantage_T[rows],
                rollout.weight_T[rows],
                clip_config,
                self.model.backend,
                *vocabulary,
                lengths,
            )
            if self.teacher is not None:
                row_loss = self.teacher.add_kl(row_loss, rollout, rows)
            loss, part = self.model.head_loss(hidden_ND, batch.target_row_T, row_loss)
            loss.backward()
            total += loss.detach()
            for name, column_T in part.items():
                columns[name].append(column_T)
        return total, {name: torch.cat(parts) for name, parts in columns.items()}

    def check_reference(self, ref_T, scored_T):
        """Before the first update the policy is the reference; one of other weights would pull it away for good."""
        delta_T = (ref_T - scored_T).double()
        kl, most = (delta_T.expm1() - delta_T).mean().item(), MAX_START_KL[self.model.dtype]
        if not kl <= most:
            raise ValueError(f"{self.stage.name}: before the first update the KL to the reference is {kl:.3g}, above "
                             f"{most}: the reference is not the policy that training starts from; stopped")

    # ---- validation, saving, resuming ----

    def validation_due(self):
        """Whether the step that is finished is one to validate after, and has not been."""
        every = self.stage.eval_every
        due = self.step == self.steps or (every and self.step % every == 0)
        return due and self.step > self.validated_step

    def validate(self, examples):
        """Accuracy on the validation manifest: by letters, or by greedily written answers in GRPO and with traces. The
        best weights so far (the earliest, in a tie) are kept."""
        stage = self.stage
        file = self.folder / "validation" / f"{self.step:06}.jsonl"
        accuracy, bad = validation_accuracy(self.whole_model(), self.processor, examples, stage, file)
        if accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.best_step = self.step
            self.save()  # no tensor is written again: the state of this step is on disk
        self.log({"step": self.step, "val_accuracy": accuracy, "val_bad": bad})  # last: it marks the validation as done
        self.validated_step = self.step
        tqdm.write(f"{stage.name}: step {self.step}, validation accuracy {100 * accuracy:.1f} %")

    def save(self):
        progress = {"step": self.step, "best": self.best_accuracy, "best_step": self.best_step, "bad": self.num_bad,
                    "varied": self.varied}
        checkpoint.save(self.folder, self.parameters, self.optimizer, progress, self.rows())

    def rows(self):
        """Which rows of sharded weights this process holds (sharding.local_rows); None where each holds all."""
        return sharding.local_rows(self.model) if self.sharded else None

    def resume(self):
        """Goes on from the stage's last state, if there is one; log lines of steps that will be redone are dropped."""
        progress, log_lines = checkpoint.restore(self.folder, self.parameters, self.optimizer, self.rows())
        if progress is not None:
            self.step = progress["step"]
            self.best_accuracy = progress["best"]
            self.best_step = progress["best_step"]
            self.num_bad = progress["bad"]
            self.varied = progress["varied"]
        for line in log_lines:
            if "val_accuracy" in line:
                self.validated_step = max(self.validated_step, line["step"])

    def publish(self):
        """Writes best/: the best weights in validation (the last ones without it), as `load` and others read them."""
        if self.best_step:  # as this process knows it: the first one may not have written it yet
            checkpoint.restore_weights(self.folder, self.best_step, self.parameters, self.rows())
        model = self.whole_model()
        if self.rank == 0:
            checkpoint.publish(self.folder, model, self.processor, self.stage.model)


if __name__ == "__main__":  # the command line is the runner's, which imports this module
    runpy.run_module("minixmd.runner", run_name="__main__")
