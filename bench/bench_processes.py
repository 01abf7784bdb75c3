"""bench_processes: training and labelling on 2 processes of one thread each against 1, over gloo, on a CPU.

The model is bench_memory's (a Qwen2-Audio of 60 M parameters, clips of 10 s), or a tiny one with --small.

    work     SFT and GRPO of an adapter and Label, 1 process and 2 taking turns, rounds in turning order. Timed from
             within, without start-up and the first step (of Label each process's first pass); the ratio is taken
             within a round. decode_slots, here as on a card, bounds what a process decodes at once. By CPU time (of
             the process that takes most) it is what the ratio would be if nobody else wanted a core.
    bytes    that a process sends in a step: every collective of c10d is seen by a dispatch mode, and counted as rings
             send it (an all-gather or reduce-scatter N - 1 of N parts, an all-reduce both), against arithmetic:
             adapter   an all-reduce of its gradients in fp32
             sharded   for each pass two all-gathers of the blocks that train and one of the rest (the root), and a
                       reduce-scatter of all in fp32
             GRPO      also an all-gather of all that trains to sample, and of the reference to score; in the first step
                       one more, to check the reference
             Pickled objects (counts, metrics) are listed apart. Beside it stands what loopback carried in a step, with
             what else ran on it: gloo makes a reduce-scatter of an all-reduce, so one counts twice there.
    memory   of GRPO of the decoder with its reference, between rollouts: bytes of the tensors after an optimizer step,
             gradients included, and RssAnon as the next step begins; and RssAnon's peak in each phase of the second
             step, against the dry run's estimate. Measured as in bench_memory, in the second of two runs.

Run: python -m bench.bench_processes [--rounds 5] [--only work|bytes|memory] [--out bench/results/processes_cpu.json]
Exit status 1 if a target is missed. Takes a quarter of an hour of two cores that do nothing else. The last line of
stdout is JSON.
"""
import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import measure
from bench.bench_memory import GIVE_BACK, SHAPE, Peak, rss_anon, write_data, write_model
from minixmd import train
from minixmd.config import GRPO, SFT, Label
from minixmd.dryrun.memory_estimate import estimate
from minixmd.dryrun.plan import plan_stage
from minixmd.models.lora import named_linears
from minixmd.models.weights import build, config_of
from minixmd.runner import RUN
from minixmd.runs import distributed
from minixmd.runs.files import write_json
from minixmd.stages import multiple_choice

COUNTS = (1, 2)  # processes
TARGETS = {"work": 1.7, "bytes": 0.10, "tensors": 0.55, "peaks": 0.05}
SMALL = {
    "text_config": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=2, max_position_embeddings=2048),
    "audio_config": dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32),
}  # fmt: skip
CLIPS = 32
LETTERS = dict(batch_size=4, micro_batch_tokens=600)  # a clip a pass
ROLLOUTS = dict(batch_size=4, group_size=4, max_new_tokens=64, micro_batch_tokens=900, decode_slots=8)  # 1 x 4 a pass
JOBS = {  # title -> (class, its fields)
    "work": {
        "SFT, LoRA": (SFT, dict(max_steps=4, **LETTERS)),
        "GRPO, LoRA": (GRPO, dict(max_steps=3, **ROLLOUTS | dict(batch_size=2, group_size=8, max_new_tokens=48))),
        "Label": (Label, dict(batch_tokens=1200)),
    },
    "bytes": {
        "SFT, LoRA": (SFT, dict(max_steps=2, **LETTERS)),
        "SFT, full": (SFT, dict(max_steps=2, trainable="full", **LETTERS)),
        "GRPO, full": (GRPO, dict(max_steps=2, trainable="full", **ROLLOUTS)),
    },
    # all prompts are computed at once, as the dry run assumes
    "memory": {"GRPO, decoder": (GRPO, dict(max_steps=2, trainable="decoder", **ROLLOUTS | dict(decode_slots=16)))},
}
SHORT = dict(max_new_tokens=8)  # with --small
PHASES = ("rollout", "scoring", "update", "optimizer")


def make_stage(job, title, home, small):
    cls, fields = JOBS[job][title]
    if small and cls is GRPO:
        fields = {**fields, **SHORT}
    return cls(name="case", model=str(home / "model"), manifest=str(home / "clips.jsonl"), device="cpu",
               cache=str(home / "cache"), **fields)


def launch(job, processes, home, small, number=0):
    """Runs a job's stages in so many processes of one thread; returns {title: [what each process found]}."""
    line = [sys.executable]
    if processes > 1:
        line += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
                 "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
    folder = home / f"{job}-{processes}-{number}"
    folder.mkdir()
    line += ["-m", "bench.bench_processes", "--job", job, str(home), str(folder), *["--small"] * small]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(GIVE_BACK if job == "memory" else {})}
    done = subprocess.run(line, cwd=measure.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    shares = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {title: [share[title] for share in shares] for title in JOBS[job]}


def run_job(job, home, folder, small):
    """What one of the launched processes does."""
    torch.set_num_threads(1)
    rank, found = distributed.init(os.environ, timeout_s=600), {}
    distributed.SHARD = CLIPS // distributed.rank_and_world_size()[1]  # of Label; a new shard starts new readers
    for i, title in enumerate(JOBS[job]):
        stage = make_stage(job, title, home, small)
        for again in range(1 + (job == "memory")):
            place = folder / f"{i}-{again}"
            place.mkdir(exist_ok=True)
            distributed.gather(None)
            found[title] = {"work": time_stage, "bytes": count_stage, "memory": weigh_stage}[job](stage, place)
    write_json(folder / f"{rank}.json", found)
    distributed.destroy()


# ---- work ----


def time_stage(stage, folder):
    """[(seconds of the machine's clock, of this process's CPU time, log line)] as each step ends; of Label, with the
    number of clips, each pass."""
    ended = []

    def log(line):
        if "loss" in line:
            ended.append((time.monotonic(), time.process_time(), line))

    def timed_pass(model, prompts, compute=multiple_choice.next_token_logits):
        logits_BV = compute(model, prompts)
        ended.append((time.monotonic(), time.process_time(), len(prompts)))
        return logits_BV

    with mock.patch.object(multiple_choice, "next_token_logits", timed_pass):
        RUN[type(stage)](stage, folder, log)
    return ended


def rollout_seconds(line):
    return line["encode_s"] + line["prefill_s"] + line["decode_s"]


def rates(title, shares):
    """{what: how much a second} of one launch."""
    wall = max(share[-1][0] for share in shares) - min(share[0][0] for share in shares)
    cpu = max(share[-1][1] - share[0][1] for share in shares)
    done = [[line for *_, line in share[1:]] for share in shares]
    steps = done[0]  # of training: its steps are those of all
    if title == "Label":
        clips = sum(map(sum, done))
        return {"Label: clips": clips / wall, "Label: clips, CPU time": clips / cpu}
    if title.startswith("SFT"):
        tokens = sum(line["tokens"] for line in steps)
        return {"SFT: tokens": tokens / wall, "SFT: tokens, CPU time": tokens / cpu}
    rollouts_s = sum(max(rollout_seconds(line) for line in lines) for lines in zip(*done, strict=True))
    return {"GRPO: rollouts": len(steps) / rollouts_s, "GRPO: steps": len(steps) / wall,
            "GRPO: steps, CPU time": len(steps) / cpu}


def measure_work(home, small, rounds):
    found = {processes: [] for processes in COUNTS}
    for i in range(rounds):
        for processes in COUNTS if i % 2 == 0 else COUNTS[::-1]:
            launched, rate = launch("work", processes, home, small, i), {}
            for title, shares in launched.items():
                rate |= rates(title, shares)
            found[processes].append(rate)
            print(f"round {i}, {processes} processes, a second:",
                  ", ".join(f"{what} {value:.3g}" for what, value in rate.items()), flush=True)
    rows = []
    for what in found[1][0]:
        one, two = ([rate[what] for rate in found[processes]] for processes in COUNTS)
        ratio = measure.quantiles([b / a for a, b in zip(one, two, strict=True)])
        rows.append({"what": f"{what} a second", "one": measure.quantiles(one), "two": measure.quantiles(two),
                     "ratio": ratio, "ok": what.endswith("CPU time") or ratio["median"] >= TARGETS["work"]})
        print(f"{what} a second: {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f}) times")
    return rows


# ---- bytes ----


class Collectives(TorchDispatchMode):
    """Adds up in `sent`, by kind, the bytes that this process sends: of tensors, and in "objects" of pickled ones."""

    SILENT = {"wait_tensor", "_wrap_tensor_autograd", "barrier"}

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        library, _, name = func._schema.name.partition("::")
        if "c10d" in library and name not in self.SILENT:
            others = torch.distributed.get_world_size() - 1
            kind, position, parts = {  # each sends N - 1 times what is given there, or less
                "allreduce_": ("all-reduce", 0, 2 * others / (others + 1)),
                "_allgather_base_": ("all-gather", 1, others),
                "allgather_": ("all-gather", 1, others),
                "all_gather_into_tensor": ("all-gather", 0, others),
                "_reduce_scatter_base_": ("reduce-scatter", 0, others),
                "broadcast_": ("broadcast", 0, others * (torch.distributed.get_rank() == 0)),
            }[name]  # a KeyError: one of which this does not know what it sends
            for tensor in tree_leaves(args[position]):
                self.sent["objects" if tensor.dtype in (torch.uint8, torch.int64) else kind] += parts * tensor.nbytes
        return func(*args, **(kwargs or {}))


def loopback_bytes():
    """That this machine has sent to itself."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def count_stage(stage, folder):
    """What this process sent in each step."""
    found, before = [], 0

    def log(line):
        nonlocal before
        if "loss" in line:
            found.append({"sent": dict(counter.sent), "loopback": loopback_bytes() - before})
        counter.sent.clear()
        before = loopback_bytes()

    with Collectives() as counter:
        train.train(stage, folder, log)
    return found


def expected_bytes(stage, step, N):
    """What each of N processes should send in a step, by the model's shapes."""
    model = build(config_of(stage.model))
    if stage.trainable == "lora":
        linears = [layer for name, layer in named_linears(model).items()
                   if name.startswith("model.layers.") and name.endswith("_proj")]
        return 2 * (N - 1) / N * 4 * stage.lora_rank * sum(sum(layer.weight.shape) for layer in linears)
    model.set_trainable(stage.trainable)
    sizes = {name: p.nbytes for name, p in model.named_parameters() if p.requires_grad}
    trained = sum(sizes.values())
    root = sum(size for name, size in sizes.items() if "layers." not in name)
    passes = stage.batch_size / N  # a clip, or a prompt with its completions, each
    moved = passes * (2 * (trained - root) + root + trained)
    if isinstance(stage, GRPO):
        moved += (3 if step == 1 else 2) * trained
    return (N - 1) / N * moved


def count_bytes(home, small):
    rows, N = [], 2
    for title, shares in launch("bytes", N, home, small).items():
        for step, found in enumerate(shares[0], 1):
            sent = found["sent"]
            objects = sent.pop("objects", 0)
            counted, computed = sum(sent.values()), expected_bytes(make_stage("bytes", title, home, small), step, N)
            ratio = counted / computed
            rows.append({"case": title, "step": step, "counted": counted, "computed": computed, "ratio": ratio,
                         "by": sent, "objects": objects, "loopback_a_process": found["loopback"] / N,
                         "ok": abs(ratio - 1) <= TARGETS["bytes"]})  # fmt: skip
            print(f"{title:12} step {step}: {counted / 1e6:9.3f} MB sent, {computed / 1e6:9.3f} MB computed, "
                  f"{objects:,.0f} B of objects, {found['loopback'] / N / 1e6:9.3f} MB over loopback", flush=True)
    return rows


# ---- memory ----


class Phases(Peak):
    """The most that rss_anon was in each phase, by name."""

    def __enter__(self):
        self.phase, self.peaks, self.lock = "setup", Counter(), threading.Lock()
        return super().__enter__()

    def read(self):
        self.peaks[self.phase] = max(self.peaks[self.phase], rss_anon())

    def watch(self):
        while not self.ended.wait(0.002):
            with self.lock:
                self.read()

    def enter(self, phase):
        with self.lock:
            self.read()
            self.phase = phase

    def inside(self, phase, function):
        """The function, for whose time it is another phase."""
        def wrapped(*args):
            outer = self.phase
            self.enter(phase)
            result = function(*args)
            self.enter(outer)
            return result

        return wrapped


def weigh_stage(stage, folder):
    """Bytes of this process: tensors after the last optimizer step, RssAnon then and as a step begins, and its peaks
    in the phases of the last step; RssAnon above what it was before the stage."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found, phases, before = {}, Phases(), rss_anon()

    class Watched(train.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.optimizer.register_step_post_hook(lambda *_: self.weigh())

        def weigh(self):
            parts = self.parameters.values()
            tensors = {"trained": parts, "gradients": [part.grad for part in parts],
                       "optimizer": [x for part in parts for x in self.optimizer.state[part].values()],
                       "reference": self.reference.values.values(),
                       "frozen": [p for p in self.model.parameters() if not p.requires_grad]}  # fmt: skip
            found["tensors"] = {name: sum(x.nbytes for x in group) for name, group in tensors.items()}
            found["rss_after_step"] = rss_anon() - before

        def grpo_step(self, samples):
            found["rss_between"] = rss_anon() - before
            phases.peaks.clear()  # of an earlier step
            return phases.inside("rollout", super().grpo_step)(samples)  # what is in no other phase is short

        def policy_update(self, rollout):
            return phases.inside("update", super().policy_update)(rollout)

        def update(self, values):
            return phases.inside("optimizer", super().update)(values)

    scored = phases.inside("scoring", train.logprobs.reference_logprobs)
    frozen = phases.inside("scoring", train.Reference.frozen_model)  # gathered there
    with (mock.patch.object(train, "Trainer", Watched), mock.patch.object(train.Reference, "frozen_model", frozen),
          mock.patch.object(train.logprobs, "reference_logprobs", scored), phases):
        train.train(stage, folder, lambda line: None)
    return found | {"peaks": {name: phases.peaks[name] - before for name in PHASES}}


def weigh(home, small):
    [title], rows = JOBS["memory"], []
    stage = make_stage("memory", title, home, small)
    plan = plan_stage(stage, [stage], home)
    for processes in COUNTS:
        phases = estimate(stage, plan.model, plan.prompt, gpus=processes)
        estimated = {phase.name: phase.total for phase in phases}
        for rank, found in enumerate(launch("memory", processes, home, small)[title]):
            row = {"case": title, "processes": processes, "rank": rank, **found, "estimated": estimated}
            row["tensor_bytes"] = sum(found["tensors"].values())
            row["over"] = {name: estimated[name] / peak for name, peak in found["peaks"].items()}
            one = rows[0] if rows else row
            row["of_one"] = {name: row[name] / one[name] for name in ("tensor_bytes", "rss_between", "rss_after_step")}
            row["ok"] = all(abs(over - 1) <= TARGETS["peaks"] for over in row["over"].values())
            row["ok"] &= processes == 1 or row["of_one"]["tensor_bytes"] <= TARGETS["tensors"]
            rows.append(row)
            print(f"{title}, process {rank} of {processes}, MB: tensors {row['tensor_bytes'] / 1e6:.1f}, RssAnon "
                  f"between rollouts {row['rss_between'] / 1e6:.1f}; of one process's: "
                  + ", ".join(f"{name} {share:.3f}" for name, share in row["of_one"].items()))
            for name, peak in found["peaks"].items():
                print(f"  {name:10} {peak / 1e6:8.1f}, estimated {estimated[name] / 1e6:8.1f} "
                      f"({100 * (row['over'][name] - 1):+.1f} %)", flush=True)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=JOBS, help="one part")
    parser.add_argument("--small", action="store_true", help="tiny sizes: tries the script, measures nothing")
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    parser.add_argument("--job", nargs=3, metavar=("JOB", "HOME", "FOLDER"), help="run one here; of its own use")
    args = parser.parse_args(argv)
    if args.job:
        run_job(args.job[0], Path(args.job[1]), Path(args.job[2]), args.small)
        return 0
    result = {"bench": "bench_processes", "small": args.small, "env": measure.env(), "targets": TARGETS}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        result["parameters"] = write_model(home / "model", SMALL if args.small else SHAPE)
        write_data(home, CLIPS)
        for part, run in {"work": lambda *to: measure_work(*to, args.rounds), "bytes": count_bytes,
                          "memory": weigh}.items():  # fmt: skip
            if args.only in (None, part):
                result[part] = run(home, args.small)
    result["ok"] = all(row["ok"] for part in JOBS for row in result.get(part, []))
    return measure.report(result, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
