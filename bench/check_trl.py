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
from collections import namedtuple
from dataclasses import replace
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
from minixmd.models.head import CrossEntropy, PolicyLoss, head_loss, token_weights

RTOL = 1e-5  # of the loss, and of a parameter's largest gradient
V, PAD, EOS, CHUNK = 97, 2, 1, 7  # CHUNK: rows of logits at a time, so that there are several chunks
PROMPTS, LENGTHS, LONGEST = (3, 6, 2, 4, 5, 1), (5, 9, 1, 6, 3, 4), 11  # tokens; LONGEST: Dr. GRPO's constant
LOW, HIGH = 0.2, 0.35  # the ratio is clipped to [1 - LOW, 1 + HIGH]
BANNED, LIMIT = torch.tensor([0, 5, 50]), 90  # these ids and those from LIMIT on: no completion has one
AGGREGATION = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant", "dapo": "token", "ce": "token"}
REASONS = {  # why TRL differs from the formula, by Case.extra and loss_type
    "3 micro-batches bnpo": "it takes the mean of the micro-batches' token means; ours is the step's, as its dapo is",
    "3 steps dapo": "it divides by the mean tokens of the steps; DAPO's eq. 8 and ours by the step's own",
} | {f"default KL {x}": "use_bias_correction_kl multiplies the KL by the ratio" for x in ("grpo", "dapo")}
# loss_type: TRL's, or "ce". level, of the ratio: "token" | "sequence". extra: "masked", the longest completion was
# truncated: TRL's mask leaves it out, ours has its rows with weight 0 and NaN in every vector | "3 micro-batches" of 2
# sequences | "3 steps", the 6 sequences serve three optimizer steps, of which the first is taken | "suppressed_ids", ids are |
# "on policy", old = the model's own | "k1", the KL | "default KL", TRL's.
Case = namedtuple("Case", "loss_type level beta temperature extra")
TYPES, LEVELS = ("grpo", "bnpo", "dr_grpo", "dapo"), ("token", "sequence")
CASES = [Case(*x) for x in (
    *product(TYPES, LEVELS, (0.0, 0.1), (1.0, 0.7), ("", "masked")),
    *product(TYPES, LEVELS, (0.1,), (0.7,), ("3 micro-batches", "3 steps")),
    *product(("grpo", "dapo"), LEVELS, (0.1,), (0.7,), ("suppressed_ids", "on policy", "k1", "default KL")),
    *product(("ce",), ("token",), (0.0,), (1.0,), ("", "masked", "3 micro-batches")))]


def make_model(folder):
    """Random weights, large enough to matter; read back from `folder`, where TRL looks for its reference."""
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=PAD, eos_token_id=EOS))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    model.save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


def micro_batches(case, batch):
    size = 2 if case.extra in ("3 micro-batches", "3 steps") else 6
    for start in range(0, len(batch["present"]), size):
        yield {k: v[start:start + size] if v.dim() else v for k, v in batch.items()}


def hidden(model, batch):
    """(B, T, D): the hidden states that predict the T columns of completions."""
    states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return states[:, max(PROMPTS) - 1:-1]


def logp(model, case, batch):
    logp_BTV = (model.lm_head(hidden(model, batch)) / case.temperature).log_softmax(-1)
    return logp_BTV.gather(2, batch["completion_ids"][..., None]).squeeze(2)


def make_batch(model, case):
    """What TRL's trainers read in a step, and `present`: 1 where a completion has a token, masked or not."""
    g = torch.Generator().manual_seed(3)
    B, P, T = len(LENGTHS), max(PROMPTS), max(LENGTHS)
    prompt_mask = (torch.arange(P) >= P - torch.tensor(PROMPTS)[:, None]).long()
    present = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    mask = present * torch.tensor([[1], [case.extra != "masked"], [1], [1], [1], [1]])
    batch = {"prompt_ids": torch.randint(3, V, (B, P), generator=g).where(prompt_mask == 1, PAD),
             "completion_ids": torch.randint(6, 50, (B, T), generator=g).where(present == 1, PAD),
             "prompt_mask": prompt_mask, "completion_mask": mask, "present": present, "num_items_in_batch": mask.sum(),
             "advantages": torch.tensor([2.2, -0.5, 0.8, -0.9, 1.2, -0.3])}
    batch["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    batch["attention_mask"] = torch.cat([prompt_mask, mask], 1)
    batch["labels"] = batch["input_ids"].where(torch.cat([0 * prompt_mask, mask], 1) == 1, -100)
    apart_B = torch.tensor([-0.5, -0.5, -0.2, 0.5, 0.6, 0.6])  # 0 is clipped above, 3 and 5 below; not so 1 and 4
    with torch.no_grad():
        logp_BT = logp(model, case, batch)
    batch["old_per_token_logps"] = logp_BT + apart_B[:, None] + 0.2 * torch.randn(B, T, generator=g)
    batch["ref_per_token_logps"] = logp_BT + 0.5 * torch.randn(B, T, generator=g)
    return next(micro_batches(case, batch)) if case.extra == "3 steps" else batch


def paper(model, case, batch, changed=False):
    """The loss in fp64, a sequence at a time; changed: as REASONS says of TRL."""
    logp_BT, counts, gains = logp(model.double(), case, batch), batch["completion_mask"].sum(1).tolist(), []
    for logp_T, old_T, ref_T, A, n in zip(logp_BT, batch["old_per_token_logps"], batch["ref_per_token_logps"],
                                          batch["advantages"].double(), counts, strict=True):
        logp_T, delta_T = logp_T[:n], ref_T[:n] - logp_T[:n]
        ratio_T = (logp_T - (logp_T.detach() if case.extra == "on policy" else old_T[:n])).exp()
        if case.level == "sequence" and n:
            ratio_T = ratio_T.prod() ** (1 / n)
        kl_T = -delta_T if case.extra == "k1" else delta_T.exp() - delta_T - 1
        kl_T = kl_T * ratio_T if changed and case.extra == "default KL" else kl_T
        gain_T = torch.min(ratio_T * A, ratio_T.clamp(1 - LOW, 1 + HIGH) * A) - case.beta * kl_T
        gains.append((logp_T if case.loss_type == "ce" else gain_T).sum())
    B, over = len(counts), [sum(counts)] * len(counts)
    over = {"grpo": [B * max(n, 1) for n in counts], "dr_grpo": [B * LONGEST] * B}.get(case.loss_type, over)
    if changed and case.extra != "default KL":
        over = [sum(LENGTHS) / 3] * B if B == 2 else [3 * (counts[i] + counts[i + 1]) for i in (0, 0, 2, 2, 4, 4)]
    return -sum(gain / n for gain, n in zip(gains, over, strict=True))


def trl(model, case, batch, tokenizer, folder):
    parts, loss = list(micro_batches(case, batch)), 0.0
    config = dict(output_dir=folder, report_to="none", use_cpu=True, bf16=False,
                  per_device_train_batch_size=len(parts[0]["present"]), gradient_accumulation_steps=len(parts))
    data = Dataset.from_dict({"input_ids": [[3, 4]] * 6} if case.loss_type == "ce" else {"prompt": ["3"] * 6})
    if case.loss_type == "ce":
        trainer = SFTTrainer(model, SFTConfig(**config), None, data, processing_class=tokenizer)
    else:
        config = GRPOConfig(
            **config, loss_type=case.loss_type, importance_sampling_level=case.level, epsilon=LOW, epsilon_high=HIGH,
            beta=case.beta, use_bias_correction_kl=case.extra == "default KL", temperature=case.temperature,
            max_completion_length=LONGEST, num_generations=2, steps_per_generation=6 // len(parts[0]["present"]))
        trainer = GRPOTrainer(model, lambda **_: None, config, data, processing_class=tokenizer)  # no reward is asked
    trainer._prepare_inputs = lambda inputs: inputs  # it would sample completions
    trainer.current_gradient_accumulation_steps = len(parts)  # as train() sets it
    for x in parts:
        if case.extra == "on policy":
            del x["old_per_token_logps"]
        if case.loss_type == "ce":
            x = {k: x[k] for k in ("input_ids", "attention_mask", "labels")}
        loss += trainer.training_step(trainer.model, x, batch["num_items_in_batch"])
    if case.extra in ("", "masked") and case.loss_type != "ce":  # each bound acts: on 2 tokens, or a sequence
        assert min(trainer._metrics["train"][f"clip_ratio/{x}_mean"][0] for x in ("low", "high")) > 0.05
    return loss


def liger(model, case, batch):
    hidden_BTD, head = hidden(model, batch), model.lm_head
    if case.loss_type == "ce":
        label_BT = batch["labels"][:, max(PROMPTS):]
        return LigerFusedLinearCrossEntropyLoss()(head.weight, hidden_BTD.flatten(0, 1), label_BT.flatten())
    function = LigerFusedLinearGRPOLoss(
        case.beta, False, case.beta > 0, epsilon_low=LOW, epsilon_high=HIGH, loss_type=case.loss_type,
        max_completion_length=LONGEST, importance_sampling_level=case.level, temperature=case.temperature)
    return function(
        hidden_BTD, head.weight, batch["completion_ids"], batch["completion_mask"], batch["advantages"], head.bias,
        batch["ref_per_token_logps"] if case.beta else None,
        None if case.extra == "on policy" else batch["old_per_token_logps"])[0]


def ours(model, case, batch, backend):
    live_BT, loss_sum = batch["completion_mask"] == 1, 0.0
    weights_T = token_weights(live_BT.sum(1).tolist(), AGGREGATION[case.loss_type], LONGEST)
    batch = batch | {"weight": torch.zeros(live_BT.shape).masked_scatter(live_BT, weights_T)}
    for name, column in (("old", "old_per_token_logps"), ("ref", "ref_per_token_logps"), ("advantage", "advantages")):
        batch[name] = batch[column].view(len(live_BT), -1).where(live_BT, torch.nan)
    for x in micro_batches(case, batch):
        at = x["present"].view(-1).nonzero().squeeze(1)
        problem = hidden(model, x).flatten(0, 1), model.lm_head.weight, at
        id_T, old_T, ref_T, advantage_T, weight_T = (
            x[k].view(-1)[at] for k in ("completion_ids", "old", "ref", "advantage", "weight"))
        kl, bans = "k1" if case.extra == "k1" else "k3", (BANNED, LIMIT) if case.extra == "suppressed_ids" else (None, None)
        lengths = tuple(x["present"].sum(1).tolist()) if case.level == "sequence" else None
        objective = CrossEntropy(id_T, weight_T, backend) if case.loss_type == "ce" else PolicyLoss(
            id_T, old_T, ref_T if case.beta else None, advantage_T, weight_T,
            ClipConfig(LOW, HIGH, case.beta, kl), backend, case.temperature, *bans, lengths)
        if case.extra == "on policy":
            objective = replace(objective, old_T=head_loss(*problem, objective)[1]["logp"])
        loss, _ = head_loss(*problem, objective, chunk=CHUNK)
        loss.backward()
        loss_sum += loss.detach()
    return loss_sum


def differences(a, b):
    """(|d loss|, worst |d gradient| over the largest, whether one is out of tolerance) of two (loss, gradients)."""
    worst = torch.stack([(a[1][name] - g).abs().max() / g.abs().max() for name, g in b[1].items()]).max().item()
    return abs(a[0] - b[0]), worst, not (worst <= RTOL and abs(a[0] - b[0]) <= RTOL * abs(b[0]))


def check(case, source, tokenizer, folder):
    """A row of the table."""
    if case.extra == "suppressed_ids":  # TRL and Liger know no bans; a bias does the same
        bias_V = torch.zeros(V).index_fill(0, torch.cat([BANNED, torch.arange(LIMIT, V)]), -1e9)
        source.lm_head.bias = torch.nn.Parameter(bias_V, requires_grad=False)
    batch, why = make_batch(source, case), REASONS.get(f"{case.extra} {case.loss_type}")

    def run(side, *arguments):
        model = copy.deepcopy(source)
        loss = side(model, case, batch, *arguments)
        if loss.requires_grad:
            loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    impls = ("torch",) if case.loss_type in ("bnpo", "dr_grpo") else ("torch", "triton")
    mine, sides = [run(ours, backend) for backend in impls], {"paper": run(paper)}
    if case.extra != "k1":  # which neither has
        sides["TRL"] = run(trl, tokenizer, folder)
    if case.extra in ("", "masked", "suppressed_ids", "on policy"):  # one call is one step
        sides["Liger"] = run(liger)
    row = {name: [max(x) for x in zip(*(differences(a, b) for a in mine), strict=True)] for name, b in sides.items()}
    wrong = [name for name in sides if row[name][2] != (name == "TRL" and why is not None)]
    wrong += ["reason"] if why and differences(sides["TRL"], run(paper, True))[2] else []
    return row | {"verdict": f"WRONG: {', '.join(wrong)}" if wrong else f"TRL differs: {why}" if why else "equal"}


def main():
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    tokenizer, rows = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(EOS), pad_token=str(PAD)), {}
    print(f"{'':47}{'TRL':18}{'Liger':18}{'paper':18}verdict")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder)
        for case in CASES:
            name = "{:8}{:9}beta {}  T {}  {:17}".format(*case)
            row = rows[" ".join(name.split())] = check(case, copy.deepcopy(model), tokenizer, folder)
            cells = ("{:.1e} {:.1e}".format(*row[x]) if x in row else "-" for x in ("TRL", "Liger", "paper"))
            print(name + "".join(f"{x:18}" for x in cells) + row["verdict"], flush=True)
    wrong = [name for name, row in rows.items() if row["verdict"].startswith("WRONG")]
    versions = {x: version(x) for x in ("torch", "triton", "transformers", "trl", "liger_kernel")}
    print(json.dumps({"bench": "check_trl", "versions": versions, "wrong": wrong, "rows": rows}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
