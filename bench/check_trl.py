"""check_trl: our policy loss and cross-entropy against TRL's and Liger's: loss and the gradient of every parameter.

A Qwen2 of random weights (2 layers, grouped heads, 97 tokens) reads 6 left-padded prompts with right-padded completions
of 1 to 9 tokens. TRL is its trainers' own `training_step`, one trainer a case, built from its config. Liger is the
chunked GRPO loss and the fused linear cross-entropy on the hidden states of the same model, as ours is. `paper` is each
case once more in fp64, from the formulas of GRPO (arXiv 2402.03300, eq. 3), GSPO (2507.18071, eq. 5 and 7), DAPO
(2503.14476, eq. 8) and Dr. GRPO (2503.20783): it decides. Where TRL is not to equal it, REASONS says why, and TRL must
equal it with that change. Ours runs in chunks, in PyTorch and (but for bnpo and dr_grpo, which only weigh otherwise) in
Triton's interpreter. A row has the worse against each side: |d loss|, and the worst |d gradient| over the parameter's
largest. The last line is JSON; exit status 1 if a side differs by more than RTOL, or not as REASONS says.

Run (a minute) in a virtual environment with TRL, Liger and minixmd's requirements: python -m bench.check_trl
"""
import copy
import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product

os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", HF_HUB_OFFLINE="1",
                  HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")  # all read on import

import torch
from datasets import Dataset
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from minixmd.kernels.grpo import ClipConfig
from minixmd.learning.policy import token_weights
from minixmd.models.head import CrossEntropy, PolicyLoss, head_loss

RTOL = 1e-5  # of the loss, and of a parameter's largest gradient
V, PAD, EOS = 97, 2, 1
CHUNK = 7  # rows of logits at a time, so that there are several chunks
PROMPTS, LENGTHS = (3, 6, 2, 4, 5, 1), (5, 9, 1, 6, 3, 4)  # tokens of each prompt and of its completion
LONGEST = 11  # Dr. GRPO's constant
LOW, HIGH = 0.2, 0.35  # the ratio is clipped to [1 - LOW, 1 + HIGH]
SUPPRESSED, LIMIT = torch.tensor([0, 5, 50]), 90  # these ids and those from LIMIT on: no completion has one
AGGREGATION = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant", "dapo": "token", "ce": "token"}
REASONS = {  # why TRL differs from the formula, by Case.extra and Case.loss_type
    "3 micro-batches bnpo": "it takes the mean of the micro-batches' token means; ours is the step's, as its dapo is",
    "3 steps dapo": "it divides by the mean tokens of the steps; DAPO's eq. 8 and ours by the step's own",
    "default KL grpo": "use_bias_correction_kl multiplies the KL by the ratio",
    "default KL dapo": "use_bias_correction_kl multiplies the KL by the ratio",
}
TYPES, LEVELS = ("grpo", "bnpo", "dr_grpo", "dapo"), ("token", "sequence")


@dataclass(frozen=True)
class Case:
    """extra: "masked": the longest completion was truncated; TRL's mask leaves it out, ours has its rows with weight 0
    and NaN in every vector | "3 micro-batches" of 2 sequences | "3 steps": the 6 sequences serve three optimizer steps,
    of which the first is taken | "suppressed": some ids are never sampled | "on policy": old log-probs are the model's
    own | "k1", the KL | "default KL", TRL's."""

    loss_type: str  # TRL's, or "ce"
    level: str  # of the ratio: "token" | "sequence"
    beta: float
    temperature: float
    extra: str = ""

    @property
    def batch_size(self):
        """Sequences of a micro-batch."""
        return 2 if self.extra in ("3 micro-batches", "3 steps") else 6

    @property
    def reason(self):
        """Why TRL differs, or None."""
        return REASONS.get(f"{self.extra} {self.loss_type}")

    def __str__(self):
        return (f"{self.loss_type:8}{self.level:9}beta {self.beta}  T {self.temperature}  {self.extra:17}")


CASES = [
    *(Case(*x) for x in product(TYPES, LEVELS, (0.0, 0.1), (1.0, 0.7), ("", "masked"))),
    *(Case(*x) for x in product(TYPES, LEVELS, (0.1,), (0.7,), ("3 micro-batches", "3 steps"))),
    *(Case(*x) for x in product(("grpo", "dapo"), LEVELS, (0.1,), (0.7,),
                                ("suppressed", "on policy", "k1", "default KL"))),
    *(Case("ce", "token", 0.0, 1.0, extra) for extra in ("", "masked", "3 micro-batches")),
]  # fmt: skip


# ---- the model and its batch ----


def make_model(folder):
    """Random weights, large enough to matter; read back from `folder`, where TRL looks for its reference."""
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=PAD, eos_token_id=EOS))  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    model.save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


def micro_batches(case, batch):
    for start in range(0, len(batch["present"]), case.batch_size):
        rows = slice(start, start + case.batch_size)
        yield {name: x[rows] if x.dim() else x for name, x in batch.items()}


def completion_states(model, batch):
    """(B, T, D): the hidden states that predict the T columns of completions."""
    states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return states[:, max(PROMPTS) - 1:-1]


def completion_logprobs(model, case, batch):
    logits_BTV = model.lm_head(completion_states(model, batch)) / case.temperature
    return logits_BTV.log_softmax(-1).gather(2, batch["completion_ids"][..., None]).squeeze(2)


def make_batch(model, case):
    """What TRL's trainers read in a step, and `present`: 1 where a completion has a token, masked or not."""
    g = torch.Generator().manual_seed(3)
    B, P, T = len(LENGTHS), max(PROMPTS), max(LENGTHS)
    prompt_mask = (torch.arange(P) >= P - torch.tensor(PROMPTS)[:, None]).long()
    present = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    mask = present.clone()
    if case.extra == "masked":
        mask[1] = 0  # the longest
    prompt_ids = torch.randint(3, V, (B, P), generator=g).where(prompt_mask == 1, PAD)
    completion_ids = torch.randint(6, 50, (B, T), generator=g).where(present == 1, PAD)
    input_ids = torch.cat([prompt_ids, completion_ids], 1)
    batch = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "prompt_mask": prompt_mask,
             "completion_mask": mask, "present": present, "num_items_in_batch": mask.sum(), "input_ids": input_ids,
             "advantages": torch.tensor([2.2, -0.5, 0.8, -0.9, 1.2, -0.3]),
             "attention_mask": torch.cat([prompt_mask, mask], 1),
             "labels": input_ids.where(torch.cat([0 * prompt_mask, mask], 1) == 1, -100)}
    apart_B = torch.tensor([-0.5, -0.5, -0.2, 0.5, 0.6, 0.6])  # 0 is clipped above, 3 and 5 below; not so 1 and 4
    with torch.no_grad():
        logp_BT = completion_logprobs(model, case, batch)
    batch["old_per_token_logps"] = logp_BT + apart_B[:, None] + 0.2 * torch.randn(B, T, generator=g)
    batch["ref_per_token_logps"] = logp_BT + 0.5 * torch.randn(B, T, generator=g)
    return next(micro_batches(case, batch)) if case.extra == "3 steps" else batch


# ---- the sides ----


def paper(model, case, batch, as_trl=False):
    """The loss in fp64, a sequence at a time. as_trl: with the change that REASONS names."""
    logp_BT, counts = completion_logprobs(model.double(), case, batch), batch["completion_mask"].sum(1).tolist()
    gains = []
    for i, n in enumerate(counts):
        logp_T = logp_BT[i, :n]
        if case.loss_type == "ce":
            gains.append(logp_T.sum())
            continue
        old_T = logp_T.detach() if case.extra == "on policy" else batch["old_per_token_logps"][i, :n]
        delta_T = batch["ref_per_token_logps"][i, :n] - logp_T
        A = batch["advantages"][i].double()
        ratio_T = (logp_T - old_T).exp()
        if case.level == "sequence" and n:
            ratio_T = ratio_T.prod() ** (1 / n)
        kl_T = -delta_T if case.extra == "k1" else delta_T.exp() - delta_T - 1
        if as_trl and case.extra == "default KL":
            kl_T = kl_T * ratio_T
        gain_T = torch.min(ratio_T * A, ratio_T.clamp(1 - LOW, 1 + HIGH) * A) - case.beta * kl_T
        gains.append(gain_T.sum())
    return -sum(gain / n for gain, n in zip(gains, denominators(case, counts, as_trl), strict=True))


def denominators(case, counts, as_trl):
    """What each sequence's sum is divided by. counts: their tokens."""
    B = len(counts)
    if as_trl and case.extra == "3 steps":
        return [sum(LENGTHS) / 3] * B
    if as_trl and case.extra == "3 micro-batches":
        return [3 * (counts[i] + counts[i + 1]) for i in (0, 0, 2, 2, 4, 4)]
    if case.loss_type == "grpo":
        return [B * max(n, 1) for n in counts]
    if case.loss_type == "dr_grpo":
        return [B * LONGEST] * B
    return [sum(counts)] * B


def trl(model, case, batch, tokenizer, folder):
    parts, loss = list(micro_batches(case, batch)), 0.0
    size = len(parts[0]["present"])
    config = dict(output_dir=folder, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=size,
                  gradient_accumulation_steps=len(parts))  # fmt: skip
    if case.loss_type == "ce":
        data = Dataset.from_dict({"input_ids": [[3, 4]] * 6})
        trainer = SFTTrainer(model, SFTConfig(**config), None, data, processing_class=tokenizer)
    else:
        config = GRPOConfig(
            **config, loss_type=case.loss_type, importance_sampling_level=case.level, epsilon=LOW, epsilon_high=HIGH,
            beta=case.beta, use_bias_correction_kl=case.extra == "default KL", temperature=case.temperature,
            max_completion_length=LONGEST, num_generations=2, steps_per_generation=6 // size)  # fmt: skip
        data = Dataset.from_dict({"prompt": ["3"] * 6})
        trainer = GRPOTrainer(model, lambda **_: None, config, data, processing_class=tokenizer)  # no reward is asked
    trainer._prepare_inputs = lambda inputs: inputs  # it would sample completions
    trainer.current_gradient_accumulation_steps = len(parts)  # as train() sets it
    for x in parts:
        if case.extra == "on policy":
            del x["old_per_token_logps"]
        if case.loss_type == "ce":
            x = {name: x[name] for name in ("input_ids", "attention_mask", "labels")}
        loss += trainer.training_step(trainer.model, x, batch["num_items_in_batch"])
    if case.extra in ("", "masked") and case.loss_type != "ce":  # each bound acts: on 2 tokens, or a sequence
        for bound in ("low", "high"):
            assert trainer._metrics["train"][f"clip_ratio/{bound}_mean"][0] > 0.05
    return loss


def liger(model, case, batch):
    hidden_BTD, head = completion_states(model, batch), model.lm_head
    if case.loss_type == "ce":
        label_BT = batch["labels"][:, max(PROMPTS):]
        return LigerFusedLinearCrossEntropyLoss()(head.weight, hidden_BTD.flatten(0, 1), label_BT.flatten())
    function = LigerFusedLinearGRPOLoss(
        case.beta, False, case.beta > 0, epsilon_low=LOW, epsilon_high=HIGH, loss_type=case.loss_type,
        max_completion_length=LONGEST, importance_sampling_level=case.level, temperature=case.temperature)
    ref_BT = batch["ref_per_token_logps"] if case.beta else None
    old_BT = None if case.extra == "on policy" else batch["old_per_token_logps"]
    loss, *_ = function(hidden_BTD, head.weight, batch["completion_ids"], batch["completion_mask"],
                        batch["advantages"], head.bias, ref_BT, old_BT)  # fmt: skip
    return loss


def ours(model, case, batch, backend):
    live_BT, total = batch["completion_mask"] == 1, 0.0
    weight_T = token_weights(live_BT.sum(1).tolist(), AGGREGATION[case.loss_type], LONGEST)
    vectors = {"weight": torch.zeros(live_BT.shape).masked_scatter(live_BT, weight_T)}
    for name, column in (("old", "old_per_token_logps"), ("ref", "ref_per_token_logps"), ("advantage", "advantages")):
        vectors[name] = batch[column].view(len(live_BT), -1).where(live_BT, torch.nan)
    for x in micro_batches(case, {**batch, **vectors}):
        row_T = x["present"].view(-1).nonzero().squeeze(1)
        hidden_ND, head_VD = completion_states(model, x).flatten(0, 1), model.lm_head.weight
        row_loss = row_loss_of(case, x, row_T, backend)
        if case.extra == "on policy":
            _, columns = head_loss(hidden_ND, head_VD, row_T, row_loss)
            row_loss = replace(row_loss, old_T=columns["logp"])
        loss, _ = head_loss(hidden_ND, head_VD, row_T, row_loss, chunk=CHUNK)
        loss.backward()
        total += loss.detach()
    return total


def row_loss_of(case, x, row_T, backend):
    """Our row loss over the tokens of a micro-batch."""
    id_T, old_T, ref_T, advantage_T, weight_T = (
        x[name].view(-1)[row_T] for name in ("completion_ids", "old", "ref", "advantage", "weight"))
    if case.loss_type == "ce":
        return CrossEntropy(id_T, weight_T, backend)
    clip_config = ClipConfig(LOW, HIGH, case.beta, "k1" if case.extra == "k1" else "k3")
    suppressed_Z, vocab_limit = (SUPPRESSED, LIMIT) if case.extra == "suppressed" else (None, None)
    lengths = tuple(x["present"].sum(1).tolist()) if case.level == "sequence" else None
    return PolicyLoss(id_T, old_T, ref_T if case.beta else None, advantage_T, weight_T, clip_config, backend,
                      case.temperature, suppressed_Z, vocab_limit, lengths)


# ---- the comparison ----


@dataclass
class Difference:
    """Between our loss and gradients and another side's."""

    loss: float  # absolute
    gradient: float  # the worst, over the parameter's largest
    beyond: bool  # whether either is above RTOL


def difference(mine, theirs):
    """The Difference of two (loss, {parameter: gradient})."""
    worst = []
    for name, grad in theirs[1].items():
        worst.append((mine[1][name] - grad).abs().max() / grad.abs().max())
    gradient, loss = torch.stack(worst).max().item(), abs(mine[0] - theirs[0])
    return Difference(loss, gradient, not (gradient <= RTOL and loss <= RTOL * abs(theirs[0])))


def check(case, source, tokenizer, folder):
    """({side: Difference, the worst of our backends}, verdict)."""
    if case.extra == "suppressed":  # TRL and Liger suppress no ids; a bias does the same
        bias_V = torch.zeros(V).index_fill(0, torch.cat([SUPPRESSED, torch.arange(LIMIT, V)]), -1e9)
        source.lm_head.bias = torch.nn.Parameter(bias_V, requires_grad=False)
    batch = make_batch(source, case)

    def run(side, *arguments):
        model = copy.deepcopy(source)
        loss = side(model, case, batch, *arguments)
        if loss.requires_grad:
            loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    backends = ("torch",) if case.loss_type in ("bnpo", "dr_grpo") else ("torch", "triton")
    mine, sides = [run(ours, backend) for backend in backends], {"paper": run(paper)}
    if case.extra != "k1":  # which neither has
        sides["TRL"] = run(trl, tokenizer, folder)
    if case.extra in ("", "masked", "suppressed", "on policy"):  # one call is one step
        sides["Liger"] = run(liger)
    row, wrong = {}, []
    for name, theirs in sides.items():
        found = [difference(one, theirs) for one in mine]
        row[name] = Difference(max(x.loss for x in found), max(x.gradient for x in found),
                               any(x.beyond for x in found))
        differs_by_reason = name == "TRL" and case.reason is not None
        if row[name].beyond != differs_by_reason:
            wrong.append(name)
    if case.reason and difference(sides["TRL"], run(paper, True)).beyond:
        wrong.append("reason")
    if wrong:
        return row, f"WRONG: {', '.join(wrong)}"
    return row, f"TRL differs: {case.reason}" if case.reason else "equal"


def main():
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(EOS), pad_token=str(PAD))
    rows, wrong = {}, []
    print(f"{'':47}{'TRL':18}{'Liger':18}{'paper':18}verdict")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder)
        for case in CASES:
            row, verdict = check(case, copy.deepcopy(model), tokenizer, folder)
            title = " ".join(str(case).split())
            rows[title] = {name: [x.loss, x.gradient, x.beyond] for name, x in row.items()} | {"verdict": verdict}
            if verdict.startswith("WRONG"):
                wrong.append(title)
            cells = ""
            for name in ("TRL", "Liger", "paper"):
                cell = f"{row[name].loss:.1e} {row[name].gradient:.1e}" if name in row else "-"
                cells += f"{cell:18}"
            print(f"{case}{cells}{verdict}", flush=True)
    versions = {name: version(name) for name in ("torch", "triton", "transformers", "trl", "liger_kernel")}
    print(json.dumps({"bench": "check_trl", "versions": versions, "wrong": wrong, "rows": rows}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
