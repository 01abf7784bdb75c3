"""The teacher of on-policy distillation: a frozen model that is shown a clip in its own way and reads the student's
words as if they were its own. Its ids are copied, not written anew, so the two must share a vocabulary."""
from dataclasses import replace
from itertools import chain

import torch

from minixmd.inputs.batch import Group, pack, send
from minixmd.inputs.prompts import build_prompt, cut_by_tokens
from minixmd.inputs.tokenizer import common_vocab_size
from minixmd.learning.reference import copies_on_host
from minixmd.learning.steps import check_length
from minixmd.models.head import DistillKL, PolicyWithTeacher
from minixmd.models.lora import merge_lora
from minixmd.models.multimodal import frozen_copy
from minixmd.models.sharding import finish_passes
from minixmd.runs.device import runtime_of
from minixmd.runs.distributed import rank_and_world_size
from minixmd.runs.heartbeat import beat

MIN_COMMON = 0.99  # share of the ids that the student can write, below which the teacher cannot read it


def load_teacher(stage, student, device, load):
    """The Teacher of an OnPolicy stage, with paths in place of "@name". student: its Processor. load: minixmd.load, or
    a function like it. Raises ValueError: too few of the ids that the student can write mean the same to both."""
    runtime = runtime_of(stage)
    runtime["sharded"] = stage.teacher_place == "sharded" and rank_and_world_size()[1] > 1
    if stage.teacher_place == "host":
        runtime["device"] = "cpu"
    model, processor = load(stage.teacher_model, **runtime)
    common = common_vocab_size(student, processor.folder)
    written = set(range(student.vocab_size)) - set(student.suppressed_ids)
    shared = sum(i < common for i in written)
    if shared < MIN_COMMON * len(written):
        raise ValueError(f"{stage.name}: teacher_model {stage.teacher_model}: of the {len(written):,} ids that the "
                         f"student can write {shared:,} mean the same to it, below a share of {MIN_COMMON}: it cannot "
                         "read the student")
    return Teacher(stage, model, processor, device, common, torch.tensor(student.suppressed_ids))


class Teacher:
    """Args:
        stage: OnPolicy.
        model, processor: the teacher's. Its head stays on the device, also where the others are on the host.
        device: on which it reads.
        common_vocab: how many ids from 0 on mean the same to student and teacher. suppressed_Z: those that the student
            never writes.
    """

    def __init__(self, stage, model, processor, device, common_vocab, suppressed_Z):
        self.stage = stage
        self.device = device
        self.processor = processor
        self.common_vocab = common_vocab
        self.suppressed_Z = suppressed_Z[suppressed_Z < common_vocab].to(device)
        self.head_VE = model.lm_head.weight.detach().to(device)
        self.model, self.values = model, None
        if stage.teacher_place == "host":
            merge_lora(model)  # then all weights have one dtype
            self.values = copies_on_host({name: p.detach() for name, p in model.named_parameters()}, device)
            self.model = frozen_copy(model, self.values)

    def frozen_model(self):
        """The model on the device, from the host for as long as the caller keeps it."""
        if self.values is None:
            return self.model
        values = {}
        for name, value in self.values.items():
            values[name] = value.to(self.device, non_blocking=True)
        return frozen_copy(self.model, values)

    def show(self, item, load):
        """The Item with the Prompt in which the teacher is shown its clip. load: reads a file, as load_clip."""
        stage = self.stage
        prompt = build_prompt(self.processor, item.shown, stage.teacher_format, None, "", load, stage.max_new_tokens)
        check_length(prompt, item.shown, stage.max_new_tokens, stage.micro_batch_tokens, "the teacher's prompt")
        return replace(item, teacher_prompt=prompt)

    @torch.no_grad()
    def read(self, model, rollout, prompts):
        """What frozen_model's `model` makes of a rollout's T tokens: (its hidden states (T, E), of which its head makes
        rows of logits; (T,) bool, where it has any). Each clip's prompt is computed once a Group.

        prompts: the P Prompts as they are shown to it; None where it is silent. It is also silent from an id on that it
        does not know. All processes call this together where its weights are sharded.
        """
        shape = len(rollout.weight_T), model.config.text.hidden_size
        hidden_TE = torch.zeros(shape, device=self.device, dtype=model.dtype)
        read_T = torch.zeros(len(hidden_TE), dtype=torch.bool)
        groups, places = [], []  # what it reads, and the numbers of those tokens
        end = 0
        read_by_student = chain.from_iterable(rollout.micro_batches)
        for (p, _), group in zip(rollout.pieces, read_by_student, strict=False):  # without those of fillers
            known, place = [], []
            for ids_T in group.completions:
                count = self.count_known(ids_T)
                if count:
                    known.append(ids_T[:count])
                    place.append(torch.arange(end, end + count))
                end += len(ids_T)
            if known and prompts[p] is not None:
                groups.append(Group(prompts[p], tuple(known)))
                places.append(torch.cat(place))
        for cut in cut_by_tokens(list(map(len, groups)), self.stage.micro_batch_tokens):
            beat()
            batch = pack([groups[i] for i in cut]).to(self.device)
            place_K = torch.cat([places[i] for i in cut])
            read_T[place_K] = True
            [place_K] = send([place_K], self.device)
            hidden_TE.index_copy_(0, place_K, model(batch)[batch.target_row_T])
        finish_passes(model)
        return hidden_TE, read_T

    def add_kl(self, policy_loss, rollout, rows):
        """A head.PolicyLoss with the KL at these of the rollout's tokens."""
        divergence = DistillKL(
            rollout.teacher_TE[rows],
            self.head_VE,
            rollout.teacher_weight_T[rows],
            self.common_vocab,
            self.suppressed_Z,
            self.stage.temperature,
            policy_loss.backend,
            self.stage.teacher_kl == "reverse",
        )
        return PolicyWithTeacher(policy_loss, divergence)

    def count_known(self, ids_T):
        """How many ids there are before one that the teacher does not know."""
        return int((ids_T < self.common_vocab).cumprod(0).sum())
