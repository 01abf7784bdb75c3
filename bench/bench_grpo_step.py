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
    memory     peak of the update's head, frozen as with LoRA, with the GRPO loss, against all logits, log_softmax.
    encoders   clips that go through audio towers in a whole step.
    step       seconds of a step, Trainer.grpo_step against transformers: generate with num_return_sequences, scoring
               and update on rows (n, P + C) with the head on the completions' rows only, clipping, AdamW. On both sides
               all of the decoder trains, a frozen copy is the reference, and no completion ends before C.
    pool       keys and values of 64 rollouts of 850 + 512 tokens at Qwen2-Audio-7B's shape in bf16.

The model is bench_train's of the 7B's proportions: width 512, 8 layers, vocabulary 5,000. P = 400, of which 290 are
audio (11.6 s), n = 8, C = 300, one prompt a step. Given completions, old and reference log-probs, both sides must agree
(log-probs, loss, every gradient) before anything is timed. Rounds take turns in who begins. One thread; seconds are of
its CPU time, what it takes when nobody else wants the core; wall time stands beside it. A ratio is of medians.

Run: python -m bench.bench_grpo_step [--rounds 3] [--out bench/results/NAME.json]
Needs transformers, peft and 8 GB, takes 6 minutes of a core. The last line of stdout is JSON.
"""
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

from bench import measure, reference
from bench.bench_head import Case, plain
from bench.measure import quantiles
from bench.reference import AUDIO_ID, PAD_ID, TIMED, count_flops, environment, make_clips, reference_model
from minixmd.config import GRPO
from minixmd.inputs.batch import Group, Prompt, pack
from minixmd.inputs.examples import Example
from minixmd.learning.kv_cache import pool_bytes
from minixmd.learning.logprobs import reference_logprobs
from minixmd.learning.optim import adamw
from minixmd.learning.policy import Rollout, advantages, token_weights
from minixmd.learning.targets import Item
from minixmd.models.families import read_config
from minixmd.models.weights import build
from minixmd.train import Trainer


@dataclass(frozen=True)
class Size:
    shape: dict  # of the model
    clip_s: float
    n: int  # completions of the prompt
    tokens: int  # of a completion, C
    head: tuple[int, int, int]  # targets, D and V of the row "memory"


FULL = Size(TIMED, clip_s=11.6, n=8, tokens=300, head=(2400, 512, 156_032))
SMALL = Size(reference.SMALL, clip_s=0.4, n=3, tokens=6, head=(70, 16, 500))
SEVEN_B = measure.ROOT / "tests" / "configs" / "Qwen2-Audio-7B-Instruct.json"
TARGETS = {"sharing": 0.55, "encoders": 1, "update": 1.7, "whole": 1.3, "pool": 20 * 2**30}
PROCESSOR = SimpleNamespace(  # all that grpo_step needs of one; no token ends a turn, and half of the answers are right
    end_id=-1, suppressed_ids=list(range(AUDIO_ID, TIMED["vocab"])), max_positions=32_768,
    decode=lambda ids: f"<think>hm</think><answer>{'ab'[ids[0] % 2]}</answer>")  # fmt: skip
ITEM = Item(Example("clip", None, None, "?", ("dog", "cat")), target=0, source="manifest")


@dataclass(frozen=True)
class Sequence(Prompt):
    """A prompt and its only completion as one sequence, which the trainer takes as it takes a Group."""

    completions: tuple = ()


def groups_of(prompt, ids_GC, shared):
    """The completions with their prompt: as one Group, or each as a Sequence."""
    if shared:
        return [Group(prompt, tuple(ids_GC))]
    row_N = torch.arange(len(prompt) + ids_GC.shape[1])
    sequences = []
    for ids_C in ids_GC:
        ids_N = torch.cat([prompt.ids_N, ids_C])
        sequences.append(Sequence(ids_N, row_N.expand(3, -1), prompt.media, row_N >= len(prompt), (ids_C,)))
    return sequences


class Sides:
    """One checkpoint, saved by transformers and read by minixmd; one prompt; and the step of both."""

    def __init__(self, size, folder):
        self.n, self.C = size.n, size.tokens
        self.theirs = reference_model(size.shape, torch.Generator().manual_seed(0)).eval().requires_grad_(False)
        self.theirs.save_pretrained(folder)
        self.their_reference = copy.deepcopy(self.theirs)
        self.theirs.model.language_model.requires_grad_(True)
        self.theirs.lm_head.requires_grad_(True)
        self.stage = GRPO(name="bench", model=str(folder), manifest="-", trainable="decoder", lr=1e-6, warmup_ratio=0.0,
                          batch_size=self.n, micro_batch_tokens=32_768, group_size=self.n, completions_every=0,
                          device="cpu")  # fmt: skip
        self.trainer = Trainer(self.stage, num_items=10_000 * self.n, load=reference.load_with(PROCESSOR))
        self.parameters = {name.replace(".language_model", ""): p for name, p in self.theirs.named_parameters()
                           if p.requires_grad}  # by our names
        self.optimizer = adamw(self.parameters, lr=self.stage.lr, betas=self.stage.betas, eps=self.stage.eps,
                               weight_decay=self.stage.weight_decay)
        clips = make_clips([size.clip_s], size.shape["vocab"])
        (self.prompt,) = clips.prompts
        self.inputs = {name: x for name, x in clips.inputs.items() if name != "use_cache"}
        self.ids_GC = torch.randint(1, AUDIO_ID, (self.n, self.C))  # where completions are given
        self.advantage_G = torch.linspace(-0.5, 1.0, self.n)

    # ---- ours ----

    def our_step(self, C):
        """A whole step of n completions of C tokens; the seconds of its parts."""
        self.trainer.stage = replace(self.stage, max_new_tokens=C)
        began, wall = time.process_time(), time.monotonic()
        with mock.patch.object(time, "perf_counter", time.process_time):  # with which grpo_step times its parts
            metrics = self.trainer.grpo_step([(self.prompt, ITEM)])
        self.trainer.step += 1
        rollout_s = metrics["encode_s"] + metrics["prefill_s"] + metrics["decode_s"]
        return {"rollout": rollout_s, "update": metrics["scoring_s"] + metrics["update_s"],
                "whole": time.process_time() - began, "wall": time.monotonic() - wall}

    def our_scores(self, groups):
        """(n C,) log-probabilities of the completions under the reference."""
        return reference_logprobs(self.trainer.reference.frozen_model(), [groups], self.trainer.vocabulary)

    def our_gradients(self, groups, old_T, ref_T):
        """Gradients of an update on completions that are given; returns the loss. old_T None: the policy's own."""
        weight_T = token_weights([self.C] * self.n, self.stage.aggregation)
        advantage_T = self.advantage_G.repeat_interleave(self.C)
        T = len(weight_T)
        rollout = Rollout([groups], len(groups), T, T, advantage_T=advantage_T, weight_T=weight_T, sampled_T=weight_T,
                          ref_T=ref_T, old_T=old_T)  # fmt: skip
        return self.trainer.policy_gradient(rollout)[0].item()

    # ---- transformers' ----

    def their_step(self, C):
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
        self.their_gradients(ids_GC, advantage_G, None, self.their_scores(ids_GC))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ended = time.process_time()
        return {"rollout": rolled - began, "update": ended - rolled, "whole": ended - began,
                "wall": time.monotonic() - wall}

    def their_logprobs(self, model, ids_GC):
        """(n C,) log-probabilities of the completions, over the ids that are not suppressed."""
        inputs = {name: x.expand(self.n, *x.shape[1:]) for name, x in self.inputs.items()}
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids_GC], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        hidden_GCD = model.model(**inputs, use_cache=False).last_hidden_state[:, len(self.prompt) - 1:-1]
        logp_GCV = model.lm_head(hidden_GCD)[..., :AUDIO_ID].log_softmax(-1)
        return logp_GCV.gather(2, ids_GC[..., None]).flatten()

    @torch.no_grad()
    def their_scores(self, ids_GC):
        return self.their_logprobs(self.their_reference, ids_GC)

    def their_gradients(self, ids_GC, advantage_G, old_T, ref_T):
        """Gradients of minus equation 2, for completions of equal lengths; old_T None: the policy's own."""
        stage, logp_T = self.stage, self.their_logprobs(self.theirs, ids_GC)
        if old_T is None:
            old_T = logp_T.detach()
        advantage_T = advantage_G.repeat_interleave(ids_GC.shape[1])
        ratio_T, delta_T = (logp_T - old_T).exp(), ref_T - logp_T
        bounded_T = ratio_T.clamp(1 - stage.clip_low, 1 + stage.clip_high)
        gain_T = torch.minimum(ratio_T * advantage_T, bounded_T * advantage_T)
        loss = (stage.beta * (delta_T.exp() - delta_T - 1) - gain_T).mean()
        loss.backward()
        return loss.item()


# ---- parity and shared FLOPs ----


def check_close(what, bound, ours, theirs):
    """The largest distance of two tensors of a name, as a share of the norm; ValueError above the bound."""
    worst = 0.0
    for name, x in theirs.items():
        error = ((ours[name] - x).norm() / x.norm()).nan_to_num(torch.inf).item()
        worst = max(worst, error)
    if not worst <= bound:
        raise ValueError(f"parity: {what} differ by {worst:.1e} of their norm, more than {bound}; nothing is timed")
    return worst


def counted(call):
    """(FLOPs of a call, what it returns)."""
    results = []
    flop, _ = count_flops(lambda: results.append(call()))
    return flop, results[0]


@dataclass
class Way:
    """One way to score given completions and to compute their gradients."""

    score: Callable  # () -> log-probs under the reference
    learn: Callable  # (old_T, ref_T) -> the loss; gradients are in `parameters`
    parameters: dict

    def clear(self):
        for p in self.parameters.values():
            p.grad = None


def parity(sides):
    """Scores and gradients of given completions: as one Group, as Sequences, and by transformers.

    Old and reference log-probs lie apart from the policy's, so that bounds and KL act. Returns the row "sharing", the
    errors against transformers, and the FLOPs of minixmd and transformers.
    """
    prompt, ids_GC = sides.trainer.model.encode_media(sides.prompt), sides.ids_GC
    ways = {}
    for name in ("shared", "apart"):
        groups = groups_of(prompt, ids_GC, shared=name == "shared")
        ways[name] = Way(partial(sides.our_scores, groups), partial(sides.our_gradients, groups),
                         sides.trainer.parameters)
    ways["transformers"] = Way(partial(sides.their_scores, ids_GC),
                               partial(sides.their_gradients, ids_GC, sides.advantage_G), sides.parameters)
    values, gradients, flop, old_T = {}, {}, {}, None
    for name, way in ways.items():
        scoring, logp_T = counted(way.score)
        if old_T is None:
            old_T, ref_T = logp_T + 0.3 * torch.randn(2, len(logp_T))
        update, _ = counted(partial(way.learn, None, ref_T))  # as in a step, where old log-probs are not given
        flop[name] = {"scoring": scoring, "update": update}
        way.clear()
        loss = way.learn(old_T, ref_T)
        values[name] = {"logp": logp_T, "loss": torch.tensor(loss)}
        gradients[name] = {parameter: p.grad for parameter, p in way.parameters.items()}
        way.clear()
    row = {"of": "sharing", "model": "timed", **share_of(flop["shared"], flop["apart"])}
    errors = {"loss": values["shared"]["loss"].item()}
    for side, bound, target in (("apart", 1e-5, row), ("transformers", 1e-4, errors)):
        target["value_error"] = check_close(f"values against {side}", bound, values["shared"], values[side])
        target["gradient_error"] = check_close(f"gradients against {side}", bound, gradients["shared"], gradients[side])
    return row, errors, {"minixmd": flop["shared"], "transformers": flop["transformers"]}


def share_of(shared, apart):
    share = {part: shared[part] / apart[part] for part in shared}
    share["both"] = sum(shared.values()) / sum(apart.values())
    listed = ", ".join(f"{part} {x:.3f}" for part, x in share.items())
    print(f"sharing: {listed} of the FLOPs apart, target {TARGETS['sharing']}", flush=True)
    return {"flop": {"shared": shared, "apart": apart}, "share": share, "target": TARGETS["sharing"]}


def sharing_7b(P, ids_GC):
    """The row "sharing" of the published model, without memory."""
    model, flop = build(read_config(json.loads(SEVEN_B.read_text()))), []
    prompt = Prompt(torch.zeros(P, dtype=torch.int64), torch.arange(P).expand(3, -1))
    for shared in (True, False):
        batch = pack(groups_of(prompt, ids_GC, shared)).to("meta")
        body, hidden_TD = counted(lambda batch=batch: model(batch)[batch.target_row_T])
        head, logits_TV = counted(partial(model.logits, hidden_TD))
        back, _ = counted(logits_TV.sum().backward)
        flop.append({"scoring": body + head, "update": body + 2 * head + back})  # by the head twice: see above
    return {"of": "sharing", "model": "Qwen2-Audio-7B", **share_of(*flop)}


# ---- memory, encoders, time ----


def memory(N, D, V):
    """bench_head's sides at this size: at ratio 1 and KL 0 their gradients are the same."""
    case, results, peaks = Case(N, D, V, "cpu"), {}, {}

    def call(side, function):
        results[side] = dict(enumerate(function()))

    for side, function in (("log_softmax", partial(case.eager, plain)), ("minixmd", partial(case.grpo, "torch"))):
        peaks[side] = measure.peak(partial(call, side, function), "cpu")
        case.old_N = results["log_softmax"][0]
    share = peaks["minixmd"] / peaks["log_softmax"]
    print(f"memory: peak of a frozen head {peaks['minixmd'] / 2**20:.0f} MiB of {peaks['log_softmax'] / 2**20:.0f}, "
          f"{share:.3f}", flush=True)
    return {"of": "memory", "N": N, "D": D, "V": V, "peak_bytes": peaks, "share": share,
            "error": check_close("the heads", 1e-4, results["log_softmax"], results["minixmd"])}  # fmt: skip


def encoders(sides):
    """The row "encoders"; by a step of short completions, in which AdamW makes its moments."""
    models = {"minixmd": (sides.trainer.model, sides.trainer.reference.frozen_model()),
              "transformers": (sides.theirs.model, sides.their_reference.model)}
    clips = {}
    for name, step in (("minixmd", sides.our_step), ("transformers", sides.their_step)):
        batches = []  # clips of each call of a tower
        hooks = []
        for model in models[name]:
            count = partial(lambda batches, tower, args, out: batches.append(len(args[0])), batches)
            hooks.append(model.audio_tower.register_forward_hook(count))
        step(4)
        clips[name] = sum(batches)
        for hook in hooks:
            hook.remove()
    print(f"encoders: {clips['minixmd']} clips a step of one prompt, transformers {clips['transformers']}", flush=True)
    return {"of": "encoders", "clips": clips, "target": TARGETS["encoders"]}


def timed(sides, rounds):
    """Seconds of whole steps, median and quantiles; and transformers' medians over ours."""
    steps = {"minixmd": sides.our_step, "transformers": sides.their_step}
    times, order = {name: [] for name in steps}, list(steps)
    for i in range(rounds):
        for name in order[::-1] if i % 2 else order:
            times[name].append(steps[name](sides.C))
    found = {}
    for name, rows in times.items():
        found[name] = {part: quantiles([row[part] for row in rows]) for part in rows[0]}
    ours, theirs, ratio = found["minixmd"], found["transformers"], {}
    for part in ours:
        ratio[part] = theirs[part]["median"] / ours[part]["median"]
        target = f", target {TARGETS[part]}" if part in TARGETS else ""
        print(f"  {part:9} {ours[part]['median']:6.2f} s, transformers {theirs[part]['median']:6.2f} s: "
              f"{ratio[part]:.2f} times{target}", flush=True)
    return {"seconds": found, "ratio": ratio, "target": {part: TARGETS[part] for part in ("update", "whole")}}


def pool():
    """The row "pool"."""
    text = read_config(json.loads(SEVEN_B.read_text())).text
    count = pool_bytes(text, 8, 850, 64, 512, torch.bfloat16)
    print(f"pool: {count / 2**30:.2f} GiB, target {TARGETS['pool'] / 2**30:.0f}")
    return {"of": "pool", "prompts": 8, "rollouts": 64, "bytes": count, "target": TARGETS["pool"]}


def main(argv=None):
    args = reference.parse_arguments(__doc__, argv, rounds=3)
    torch.manual_seed(0)
    size = SMALL if args.small else FULL
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(size, folder)
    result = {"bench": "bench_grpo_step", "device": "cpu", "small": args.small, **environment()}
    P, audio_tokens = len(sides.prompt), len(sides.prompt.media[0].rows_P)
    row, errors, flop = parity(sides)
    rows = [row, sharing_7b(P, sides.ids_GC), memory(*size.head), encoders(sides)]
    rows.append({"of": "step", "parity": errors, "flop": flop, **timed(sides, args.rounds)})
    rows.append(pool())
    reference.write_result({**result, "size": asdict(size), "prompt_tokens": P, "audio_tokens": audio_tokens,
                            "rounds": args.rounds, "rows": rows}, args.out)  # fmt: skip


if __name__ == "__main__":
    main()
