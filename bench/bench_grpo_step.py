"""bench_grpo_step: a GRPO step with its prompt computed once, minixmd against transformers, same weights, on a CPU.

A prompt has P tokens, and n completions of C. In multiply-adds, with W weights in the decoder and V D in the head, both
of which train, and A for an audio tower, which does not:

               transformers, a copy of the prompt each              minixmd
    rollout    n A(30 s) + n (P + C) W + n (P + C) V D              A(clip) + (P + n C) W + (1 + n C) V D
    scoring    n A(30 s) + n (P + C) W + n C V D                    (P + n C) W + n C V D
    update     n A(30 s) + 3 n (P + C) W + 3 n C V D                3 (P + n C) W + 4 n C V D

The fourth product with the head is for the log-probs before the update; it too is counted. Rows of the result:
    sharing    FLOPs of scoring and update (towers left out) of one Group, against n sequences of P + C through the same
               code; the gradients of the two. The same FLOPs at the 7B's shape, counted on `meta`.
    memory     peak of the update's head, frozen as with LoRA, with the GRPO objective, against all logits, log_softmax.
    encoders   clips that go through audio towers in a whole step.
    step       seconds of a step, train.grpo_step against transformers: generate with num_return_sequences, scoring and
               update on rows (n, P + C) with the head on the completions' rows only, clipping, AdamW. On both sides
               all of the decoder trains, a frozen copy is the reference, and no completion ends before C.
    pool       keys and values of 64 rollouts of 850 + 512 tokens at Qwen2-Audio-7B's shape in bf16.

The model is bench_train's of the 7B's proportions: width 512, 8 layers, vocabulary 5,000. P = 400, of which 290 are
audio (11.6 s), n = 8, C = 300, one prompt a step. Given completions, old and reference log-probs, both sides must agree
(log-probs, loss, every gradient) before anything is timed. Rounds take turns in who begins. One thread; seconds are of
its CPU time, what it takes when nobody else wants the core; wall time stands beside it. A ratio is of medians.

Run: python -m bench.bench_grpo_step [--rounds 3] [--out bench/results/NAME.json]
Needs transformers, peft and 8 GB, takes 6 minutes of a core. The last line of stdout is JSON.
"""
import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers.utils import logging

from bench import measure
from bench.bench_head import Case, plain
from bench.bench_train import AUDIO_ID, PAD_ID, TIMED, clips, environment, flops, quantiles, reference_model
from minixmd.config import Train
from minixmd.inputs.batch import Group, Prompt, pack
from minixmd.learning.optim import adamw
from minixmd.learning.rollout import pool_bytes
from minixmd.models.families import read_config
from minixmd.models.head import token_weights
from minixmd.models.weights import build, load_model
from minixmd.tasks.rewards import Rollout, advantages
from minixmd.train import Run, grpo_step, learn, reference_of, score

FULL = dict(shape=TIMED, clip_s=11.6, n=8, tokens=300, head=(2400, 512, 156_032))  # head: targets, D, V
SMALL = dict(shape={**TIMED, "width": 32, "mlp": 48, "layers": 2, "heads": 2, "tower_width": 20}, clip_s=0.4, n=3,
             tokens=6, head=(70, 16, 500))
SEVEN_B = measure.ROOT / "tests" / "configs" / "Qwen2-Audio-7B-Instruct.json"
TARGETS = {"sharing": 0.55, "encoders": 1, "update": 1.7, "whole": 1.3, "pool": 20 * 2**30}
PROCESSOR = SimpleNamespace(  # all that grpo_step asks it; no token ends a turn, and half of the completions are right
    end_id=-1, suppressed_ids=list(range(AUDIO_ID, TIMED["vocab"])), max_positions=32_768,
    decode=lambda ids: f"<think>hm</think><answer>{'ab'[ids[0] % 2]}</answer>")  # fmt: skip
EXAMPLE = SimpleNamespace(id="clip", options=("dog", "cat"), answer=0)


@dataclass(frozen=True)
class Whole(Prompt):
    """A prompt and its only completion as one sequence, which `score` and `learn` take as they take a Group."""

    completions: tuple = ()


def items_of(prompt, ids_GC, shared):
    """The completions with their prompt: as one Group, or each as a sequence of its own."""
    if shared:
        return [Group(prompt, tuple(ids_GC))]
    N = len(prompt) + ids_GC.shape[1]
    return [Whole(torch.cat([prompt.ids_N, ids_C]), torch.arange(N).expand(3, -1), prompt.media,
                  torch.arange(N) >= len(prompt), (ids_C,)) for ids_C in ids_GC]  # fmt: skip


class Sides:
    """One checkpoint, saved by transformers and read by minixmd; one prompt; and the step of both."""

    def __init__(self, size, folder):
        self.n, self.C = size["n"], size["tokens"]
        self.theirs = reference_model(size["shape"], torch.Generator().manual_seed(0)).eval().requires_grad_(False)
        self.theirs.save_pretrained(folder)
        self.reference, model = copy.deepcopy(self.theirs), load_model(folder).requires_grad_(False)
        for part in (model.model, model.lm_head, self.theirs.model.language_model, self.theirs.lm_head):
            part.requires_grad_(True)
        self.stage = Train(name="bench", objective="grpo", model="-", manifest="-", trainable="decoder", lr=1e-6,
                           warmup_ratio=0.0, batch_size=self.n, micro_batch_size=self.n, group_size=self.n,
                           completions_every=0, device="cpu")
        mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.run = Run(model, mine, adamw(mine, self.stage), steps=10_000, vocab_limit=AUDIO_ID,
                       reference=reference_of(model))
        self.parameters = {name.replace(".language_model", ""): p for name, p in self.theirs.named_parameters()
                           if p.requires_grad}  # by our names
        self.optimizer = adamw(self.parameters, self.stage)
        (self.prompt,), _, inputs = clips([size["clip_s"]], size["shape"]["vocab"])
        self.inputs = {name: x for name, x in inputs.items() if name != "use_cache"}
        self.ids_GC = torch.randint(1, AUDIO_ID, (self.n, self.C))  # where completions are given
        self.advantage_G = torch.linspace(-0.5, 1.0, self.n)

    def mine(self, C):
        """A whole step of n completions of C tokens; the seconds of its parts."""
        began, wall, stage = time.process_time(), time.monotonic(), replace(self.stage, max_new_tokens=C)
        with mock.patch.object(time, "perf_counter", time.process_time):  # what grpo_step measures its parts with
            line = grpo_step(self.run, stage, PROCESSOR, [(self.prompt, (EXAMPLE,))], None)
        self.run.step += 1
        parts = {"rollout": line["rollout_s"], "update": line["scoring_s"] + line["update_s"]}
        return {**parts, "whole": time.process_time() - began, "wall": time.monotonic() - wall}

    def learn(self, items, old_T, ref_T):
        weight_T = token_weights([self.C] * self.n, self.stage.aggregation)
        rollout = Rollout(items, self.advantage_G.repeat_interleave(self.C), weight_T, weight_T, ref_T, old_T)
        return learn(self.run, self.stage, rollout)[0]

    def plain(self, C):
        """The same of transformers."""
        began, wall = time.process_time(), time.monotonic()
        ids_GN = self.theirs.generate(**self.inputs, num_return_sequences=self.n, max_new_tokens=C, do_sample=True,
                                      temperature=1.0, top_k=0, top_p=1.0, suppress_tokens=PROCESSOR.suppressed_ids,
                                      pad_token_id=PAD_ID)
        ids_GC = ids_GN[:, len(self.prompt):]
        if ids_GC.shape != (self.n, C):
            raise ValueError(f"generate gave completions {tuple(ids_GC.shape)}, not {(self.n, C)}")
        advantage_G = advantages(2.0 - ids_GC[:, 0] % 2, "std")
        rolled = time.process_time()
        self.plain_learn(ids_GC, advantage_G, None, self.plain_score(ids_GC))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        parts = {"rollout": rolled - began, "update": time.process_time() - rolled}
        return {**parts, "whole": sum(parts.values()), "wall": time.monotonic() - wall}

    def plain_logp(self, model, ids_GC):
        """(n C,) log-probabilities of the completions, over the ids that are not suppressed."""
        inputs = {name: x.expand(self.n, *x.shape[1:]) for name, x in self.inputs.items()}
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids_GC], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        hidden_GCD = model.model(**inputs, use_cache=False).last_hidden_state[:, len(self.prompt) - 1:-1]
        logp_GCV = model.lm_head(hidden_GCD)[..., :AUDIO_ID].log_softmax(-1)
        return logp_GCV.gather(2, ids_GC[..., None]).flatten()

    @torch.no_grad()
    def plain_score(self, ids_GC):
        return self.plain_logp(self.reference, ids_GC)

    def plain_learn(self, ids_GC, advantage_G, old_T, ref_T):
        """Minus equation 2, for completions of equal lengths; old_T None: the policy's own."""
        logp_T = self.plain_logp(self.theirs, ids_GC)
        advantage_T = advantage_G.repeat_interleave(ids_GC.shape[1])
        ratio_T, delta_T = (logp_T - (logp_T.detach() if old_T is None else old_T)).exp(), ref_T - logp_T
        bounded_T = ratio_T.clamp(1 - self.stage.clip_low, 1 + self.stage.clip_high)
        gain_T = torch.minimum(ratio_T * advantage_T, bounded_T * advantage_T)
        loss = (self.stage.beta * (delta_T.exp() - delta_T - 1) - gain_T).mean()
        loss.backward()
        return loss.item()


def agree(what, bound, ours, theirs):
    """The largest distance of two tensors of a name, as a share of the norm; ValueError above the bound."""
    error = max(((ours[name] - x).norm() / x.norm()).nan_to_num(torch.inf).item() for name, x in theirs.items())
    if not error <= bound:
        raise ValueError(f"parity: {what} differ by {error:.1e} of their norm, more than {bound}; nothing is timed")
    return error


def counted(call):
    """(FLOPs of a call, what it returns)."""
    found = []
    return flops(lambda: found.append(call()))[0], found[0]


def parity(sides):
    """Scoring and update of the given completions: by a Group, by its sequences apart, by transformers. Old and
    reference log-probs lie apart from the policy's, so that bounds and KL act. The row "sharing", errors and FLOPs."""
    clip = sides.run.model.encode_media(sides.prompt)
    calls, found, flop, old_T = {}, {}, {}, None
    for name in ("shared", "apart"):
        items = items_of(clip, sides.ids_GC, name == "shared")
        calls[name] = partial(score, sides.run, sides.stage, items), partial(sides.learn, items), sides.run.parameters
    calls["transformers"] = (partial(sides.plain_score, sides.ids_GC),
                             partial(sides.plain_learn, sides.ids_GC, sides.advantage_G), sides.parameters)
    for name, (scoring, learning, parameters) in calls.items():
        scored, logp_T = counted(scoring)
        if old_T is None:
            old_T, ref_T = logp_T + 0.3 * torch.randn(2, len(logp_T))
        learnt, _ = counted(partial(learning, None, ref_T))  # as in a step, whose old log-probs are not given
        for p in parameters.values():
            p.grad = None
        flop[name], loss = {"scoring": scored, "update": learnt}, learning(old_T, ref_T)
        found[name] = {"logp": logp_T, "loss": torch.tensor(loss)}, {k: p.grad for k, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
    row = {"of": "sharing", "model": "timed", **share_of(flop["shared"], flop["apart"])}
    errors = {"loss": found["shared"][0]["loss"].item()}
    for side, bound, errs in (("apart", 1e-5, row), ("transformers", 1e-4, errors)):
        for i, what in enumerate(("value", "gradient")):  # log-probs and loss are the values
            errs[f"{what}_error"] = agree(f"{what}s against {side}", bound, found["shared"][i], found[side][i])
    return row, errors, {"minixmd": flop["shared"], "transformers": flop["transformers"]}


def share_of(shared, apart):
    share = {part: shared[part] / apart[part] for part in shared} | {"both": sum(shared.values()) / sum(apart.values())}
    print("sharing:", ", ".join(f"{part} {x:.3f}" for part, x in share.items()), "of the FLOPs apart, target",
          TARGETS["sharing"], flush=True)  # fmt: skip
    return {"flop": {"shared": shared, "apart": apart}, "share": share, "target": TARGETS["sharing"]}


def sharing_7b(P, ids_GC):
    """The row "sharing" of the published model, without memory."""
    model, found = build(read_config(json.loads(SEVEN_B.read_text()))), []
    prompt = Prompt(torch.zeros(P, dtype=torch.int64), torch.arange(P).expand(3, -1))
    for shared in (True, False):
        batch = pack(items_of(prompt, ids_GC, shared)).to("meta")
        body, hidden_TD = counted(lambda batch=batch: model(batch)[batch.target_row_T])
        head, logits_TV = counted(partial(model.logits, hidden_TD))
        back, _ = counted(logits_TV.sum().backward)
        found.append({"scoring": body + head, "update": body + 2 * head + back})  # by the head twice: see above
    return {"of": "sharing", "model": "Qwen2-Audio-7B", **share_of(*found)}


def memory(N, D, V):
    """bench_head's sides at this size: at ratio 1 and KL 0 their gradients are the same."""
    case, found, peaks = Case(N, D, V, "cpu"), {}, {}
    for side, call in (("log_softmax", partial(case.eager, plain)), ("minixmd", partial(case.grpo, "torch"))):
        peaks[side] = measure.peak(lambda side=side, call=call: found.update({side: dict(enumerate(call()))}), "cpu")
        case.old_N = found["log_softmax"][0]
    share = peaks["minixmd"] / peaks["log_softmax"]
    print(f"memory: peak of a frozen head {peaks['minixmd'] / 2**20:.0f} MiB of {peaks['log_softmax'] / 2**20:.0f}, "
          f"{share:.3f}", flush=True)
    return {"of": "memory", "N": N, "D": D, "V": V, "peak_bytes": peaks, "share": share,
            "error": agree("the heads", 1e-4, *found.values())}  # fmt: skip


def encoders(sides):
    """The row "encoders"; by a step of short completions, in which AdamW makes its moments."""
    heard = {}
    for name, call, *models in (("minixmd", sides.mine, sides.run.model, sides.run.reference),
                                ("transformers", sides.plain, sides.theirs.model, sides.reference.model)):
        seen = []
        hooks = [model.audio_tower.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
                 for model in models]
        call(4)
        heard[name] = sum(seen)
        for hook in hooks:
            hook.remove()
    print(f"encoders: {heard['minixmd']} clips a step of one prompt, transformers {heard['transformers']}", flush=True)
    return {"of": "encoders", "clips": heard, "target": TARGETS["encoders"]}


def timed(sides, rounds):
    """Seconds of whole steps, median and quantiles; and transformers' medians over ours."""
    times = {"minixmd": [], "transformers": []}
    calls = {"minixmd": sides.mine, "transformers": sides.plain}
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            times[name].append(calls[name](sides.C))
    found = {name: {part: quantiles([t[part] for t in rows]) for part in rows[0]} for name, rows in times.items()}
    ours, theirs = found["minixmd"], found["transformers"]
    ratio = {part: theirs[part]["median"] / ours[part]["median"] for part in ours}
    for part, x in ratio.items():
        print(f"  {part:9} {ours[part]['median']:6.2f} s, transformers {theirs[part]['median']:6.2f} s: {x:.2f} times"
              + (f", target {TARGETS[part]}" if part in TARGETS else ""), flush=True)
    return {"seconds": found, "ratio": ratio, "target": {part: TARGETS[part] for part in ("update", "whole")}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="it measures on a CPU only")
    parser.add_argument("--small", action="store_true", help="tiny sizes: tries the script, measures nothing")
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    size = SMALL if args.small else FULL
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(size, folder)
    P, result = len(sides.prompt), {"bench": "bench_grpo_step", "device": "cpu", "small": args.small, **environment()}
    row, errors, flop = parity(sides)
    rows = [row, sharing_7b(P, sides.ids_GC), memory(*size["head"]), encoders(sides)]
    rows.append({"of": "step", "parity": errors, "flop": flop, **timed(sides, args.rounds)})
    count = pool_bytes(read_config(json.loads(SEVEN_B.read_text())).text, 8, 850, 64, 512, torch.bfloat16)
    rows.append({"of": "pool", "prompts": 8, "rollouts": 64, "bytes": count, "target": TARGETS["pool"]})
    print(f"pool: {count / 2**30:.2f} GiB, target {TARGETS['pool'] / 2**30:.0f}")
    line = json.dumps({**result, "size": size, "prompt_tokens": P, "audio_tokens": len(sides.prompt.media[0].rows_P),
                       "rounds": args.rounds, "rows": rows})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
