"""bench_train: one LoRA distillation step of a Qwen2-Audio model, minixmd against transformers + PEFT, same weights.

A clip's letter is one token and its end another, so 2 of a sequence's 360 rows need logits, and a 10 s clip fills a third
of the 30 s that the published audio tower runs on. A step is forward, backward through the frozen weights to rank-16
adapters on every decoder linear, clipping and AdamW. In products, for N tokens, decoder weights W and tower cost A:

    transformers as it comes     A(30 s)  +  4 N W  +  4 N V D     N counts the padding of a batch of mixed lengths
    head on the needed rows      A(30 s)  +  4 N W                 (2 forward, 2 backward; the tower has no backward)
    minixmd                      A(clip)  +  4 n W                 n counts the tokens that exist

The timed model has the 7B's proportions (printed): head 8-10 % of the decoder's FLOPs, tower on 30 s 25-30 % of the
baseline's forward. So by FLOPs alone clips of equal length can gain no more than about 1 + A(30 s) / 4 N W; what is
measured above that is attention without a mask, and less memory traffic. With the published vocabulary of 152,064 the
baseline's peak is its logits: N V fp32 values several times over.

The two sides must agree (loss, every adapter's gradient) before anything is timed. Rounds interleave the sides, and each
ratio is taken within a round, so that a busy machine disturbs both alike. Peak memory is what torch's CPU allocator
hands out during one step, above what was alive when it began (weights, adapters, AdamW's moments), from the profiler's
record of every allocation, those inside operators included.

Run: python bench/bench_train.py [--rounds 9] [--out bench/results/NAME.json]    needs transformers and peft; about 5 min
The last line of stdout is JSON.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minixmd.inputs.audio import SAMPLE_RATE, log_mel, num_audio_tokens, num_mel_frames  # noqa: E402
from minixmd.inputs.batch import Media, Prompt, positions_of  # noqa: E402
from minixmd.learning.checkpoint import versions  # noqa: E402
from minixmd.learning.optim import adamw  # noqa: E402
from minixmd.models.lora import add_lora  # noqa: E402
from minixmd.models.weights import load_model, save_adapter  # noqa: E402
from minixmd.train import Run, accumulate, update  # noqa: E402

THREADS = 2
AUDIO_ID, PAD_ID = 4_990, 0
BEFORE, AFTER = 20, 90  # text tokens around a clip: the system turn; question, options, answer
STAGE = SimpleNamespace(lr=1e-4, warmup=0.0, clip=1.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
RANK, ALPHA, TARGETS = 16, 32, r"model\.layers\.\d+\..*_proj"
# The 7B: width 4096, mlp 11008, 32 layers, vocabulary 156,032; tower 1280 wide, 32 layers.
TIMED = dict(vocab=5_000, width=512, mlp=1_376, layers=8, heads=8, tower_width=320, tower_layers=1, tower_heads=5)
WIDE = dict(vocab=152_064, width=256, mlp=688, layers=4, heads=4, tower_width=64, tower_layers=1, tower_heads=1)
EQUAL_S = [10.0] * 8
MIXED_S = [5.4, 10.0, 2.0, 7.7, 3.1, 8.9, 4.3, 6.6]  # evenly over 2-10 s
MEMORY_S = [10.0] * 4


class Pair:
    """One checkpoint, written by the reference and read by minixmd, with one adapter, saved by minixmd and read by PEFT."""

    def __init__(self, shape, folder):
        text = dict(model_type="qwen2", vocab_size=shape["vocab"], hidden_size=shape["width"],
                    intermediate_size=shape["mlp"], num_hidden_layers=shape["layers"], rms_norm_eps=1e-5,
                    num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"], rope_theta=10000.0)
        tower = dict(model_type="qwen2_audio_encoder", num_mel_bins=128, encoder_layers=shape["tower_layers"],
                     d_model=shape["tower_width"], encoder_ffn_dim=4 * shape["tower_width"],
                     encoder_attention_heads=shape["tower_heads"], max_source_positions=1500)
        config = Qwen2AudioConfig(text_config=text, audio_config=tower, audio_token_index=AUDIO_ID)
        reference = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in reference.named_parameters():  # the default init would leave biases and gains unseen
                noise = torch.randn(p.shape, generator=generator)
                gain = p.ndim == 1 and name.endswith("weight")
                p.copy_(1 + 0.1 * noise if gain else noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
        reference.save_pretrained(folder / "model")
        self.ours = load_model(folder / "model")
        add_lora(self.ours, rank=RANK, alpha=ALPHA, targets=TARGETS, seed=0)
        parameters = {name: p for name, p in self.ours.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, p in parameters.items():  # B starts at zero, which would hide A's gradients
                if name.endswith("lora_B"):
                    p.normal_(0, 0.02, generator=generator)
        save_adapter(self.ours, folder / "model", folder / "adapter")
        self.run = Run(self.ours, parameters, adamw(parameters, STAGE), steps=10_000)
        self.peft = PeftModel.from_pretrained(reference, folder / "adapter", is_trainable=True)
        self.peft.train()
        self.reference = self.peft.base_model.model
        theirs = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        self.theirs = {theirs_to_ours(name): p for name, p in theirs.items()}
        self.optimizer = adamw(self.theirs, STAGE)

    def bytes(self):
        """Of the weights and adapters, alive in every step and the same on both sides."""
        return sum(p.numel() * p.element_size() for p in self.ours.parameters())


def theirs_to_ours(name):
    """base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight -> model.layers.0.….lora_A"""
    return name.replace("base_model.model.model.language_model.", "model.").removesuffix(".default.weight")


def clips(durations_s, vocab):
    """The same clips for both sides: Prompts, and the right-padded batch of transformers (its tower's 30 s as shipped)."""
    extractor = WhisperFeatureExtractor(feature_size=128)
    generator = torch.Generator().manual_seed(1)
    prompts, waves = [], []
    for i, duration_s in enumerate(durations_s):
        t_S = torch.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
        tones = sum(torch.sin(2 * torch.pi * f * t_S * (1 + 0.05 * t_S)) for f in (180 + 40 * i, 900 + 210 * i))
        wave_S = 0.2 * tones + 0.05 * torch.randn(len(t_S), generator=generator)
        frames = num_mel_frames(len(wave_S))
        media = Media("audio", log_mel(wave_S), BEFORE, num_audio_tokens(frames), frames=frames)
        text = torch.randint(1, min(vocab, AUDIO_ID), (BEFORE + AFTER,), generator=generator)
        ids_N = torch.cat([text[:BEFORE], torch.full((media.tokens,), AUDIO_ID), text[BEFORE:]])
        target_N = torch.arange(len(ids_N)) >= len(ids_N) - 2  # the letter and the end of the turn
        prompts.append(Prompt(ids_N, positions_of(len(ids_N), [media]), (media,), target_N))
        waves.append(wave_S.numpy())
    heard = extractor(waves, sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt")
    ids_BT = pad_sequence([p.ids_N for p in prompts], batch_first=True, padding_value=PAD_ID)
    target_BT = pad_sequence([p.target_N for p in prompts], batch_first=True)
    attention_BT = pad_sequence([torch.ones_like(p.ids_N) for p in prompts], batch_first=True)
    inputs = dict(input_ids=ids_BT, attention_mask=attention_BT, input_features=heard["input_features"],
                  feature_attention_mask=heard["attention_mask"], use_cache=False)
    return prompts, inputs, target_BT


def losses(pair, durations_s, vocab):
    """{side: function that runs forward and backward and returns the loss}, on the same clips."""
    prompts, inputs, target_BT = clips(durations_s, vocab)
    STAGE.micro_batch_size = len(prompts)
    labels_BT = inputs["input_ids"].masked_fill(~target_BT, -100)
    rows_BT = target_BT.roll(-1, dims=1)  # the row before a target predicts it

    def rows_only():
        hidden_BTD = pair.reference.model(**inputs).last_hidden_state
        loss = cross_entropy(pair.reference.lm_head(hidden_BTD[rows_BT]), inputs["input_ids"][target_BT])
        loss.backward()
        return loss.item()

    def as_it_comes():
        loss = pair.peft(**inputs, labels=labels_BT).loss
        loss.backward()
        return loss.item()

    return {"minixmd": lambda: accumulate(pair.run, STAGE, prompts), "needed rows": rows_only,
            "as it comes": as_it_comes}, inputs


def steps(pair, sides):
    """{side: function that makes one whole optimizer step}."""
    def theirs(loss):
        loss()
        torch.nn.utils.clip_grad_norm_(pair.theirs.values(), STAGE.clip)
        pair.optimizer.step()
        pair.optimizer.zero_grad(set_to_none=True)

    def ours():
        sides["minixmd"]()
        update(pair.run, STAGE)

    return {side: ours if side == "minixmd" else lambda loss=loss: theirs(loss) for side, loss in sides.items()}


def check_parity(pair, sides):
    """Raises unless every side has minixmd's loss (1e-4) and adapter gradients (1e-3 of each one's norm)."""
    mine, worst = sides["minixmd"](), 0.0
    for side in ("needed rows", "as it comes"):
        loss = sides[side]()
        if not abs(loss - mine) <= 1e-4 * abs(mine):
            raise ValueError(f"parity: {side} has loss {loss:.6f}, minixmd {mine:.6f}; nothing is timed")
        for name, p in pair.run.parameters.items():
            grad = pair.theirs[name].grad
            error = ((p.grad - grad).norm() / grad.norm()).item()
            if not error <= 1e-3:
                raise ValueError(f"parity: gradient of {name} is off by {error:.1e} of its norm against {side}")
            worst = max(worst, error)
            pair.theirs[name].grad = None
    for p in pair.run.parameters.values():
        p.grad = None
    return {"loss": mine, "worst_gradient_error": worst}


def flops(function):
    """(floating-point operations of a call, {module: of its forward}); attention counts as if nothing were masked."""
    aten = torch.ops.aten
    attention = {  # FlopCounterMode knows the CUDA kernels only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, depth=None, custom_mapping=attention) as counter:
        function()
    return counter.get_total_flops(), {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}


def proportions(pair, inputs):
    """The head's share of the decoder, and the 30 s tower's of the baseline's forward (head on the needed rows)."""
    with torch.no_grad():
        _, modules = flops(lambda: pair.reference(**inputs))
    name = type(pair.reference).__name__
    tower, decoder, head = (modules[f"{name}.{m}"] for m in ("model.audio_tower", "model.language_model", "lm_head"))
    return {"head_of_decoder": head / decoder, "tower_of_baseline_forward": tower / modules[f"{name}.model"]}


def quantiles(values):
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p20": ordered[round(0.2 * (len(ordered) - 1))],
            "p80": ordered[round(0.8 * (len(ordered) - 1))]}


def measure(sides, rounds, warmup=2):
    """Interleaved rounds. Returns {side: seconds and FLOPs of a step, and how many times minixmd's the step takes}."""
    times = {side: [] for side in sides}
    for i in range(warmup + rounds):
        for side, step in sides.items():
            began = time.perf_counter()
            step()
            if i >= warmup:
                times[side].append(time.perf_counter() - began)
    return {side: {"step_s": quantiles(values), "gflops": flops(sides[side])[0] / 1e9,
                   "ratio": quantiles([t / mine for t, mine in zip(values, times["minixmd"], strict=True)])}
            for side, values in times.items()}


def peak_bytes(step):
    """Most bytes alive at once during a step, above those alive when it began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def environment():
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    return {**versions(), "transformers": version("transformers"), "peft": version("peft"), "threads": THREADS,
            "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, 7 or more")
    parser.add_argument("--out", help="file to write the JSON to as well")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    result = {"environment": environment(), "timed_model": TIMED, "memory_model": WIDE, "text_tokens": BEFORE + AFTER,
              "lora_rank": RANK, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(TIMED, Path(folder))
        for name, durations_s, target in (("equal lengths", EQUAL_S, 1.3), ("mixed lengths", MIXED_S, 1.6)):
            sides, inputs = losses(pair, durations_s, TIMED["vocab"])
            parity = check_parity(pair, sides)
            if name == "equal lengths":
                result["proportions"] = proportions(pair, inputs)
                print("proportions:", {k: f"{v:.1%}" for k, v in result["proportions"].items()})
            table = measure(steps(pair, sides), args.rounds)
            result["rows"].append({"what": name, "durations_s": durations_s, "parity": parity, "target": target,
                                   "padded_tokens": inputs["input_ids"].numel(),
                                   "tokens": int(inputs["attention_mask"].sum()), "sides": table})
            for side, row in table.items():
                ms, ratio = ({k: v * scale for k, v in row[key].items()} for key, scale in (("step_s", 1e3), ("ratio", 1)))
                print(f"{name}, {side:12}: {ms['median']:6.0f} ms [{ms['p20']:.0f}, {ms['p80']:.0f}], {row['gflops']:5.0f} "
                      f"GFLOP, {ratio['median']:.2f} [{ratio['p20']:.2f}, {ratio['p80']:.2f}] x minixmd"
                      + (f", target {target}" if side == "needed rows" else ""), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(WIDE, Path(folder))
        sides, _ = losses(pair, MEMORY_S, WIDE["vocab"])
        parity, held, table = check_parity(pair, sides), pair.bytes(), {}
        for side, step in steps(pair, sides).items():
            step()  # AdamW makes its moments in the first one
            table[side] = peak_bytes(step)
    mine, theirs = table["minixmd"], table["as it comes"]
    result["rows"].append({"what": "memory", "durations_s": MEMORY_S, "parity": parity, "weight_bytes": held,
                           "peak_bytes": table, "share": mine / theirs, "target": 1 / 3,
                           "share_with_weights": (mine + held) / (theirs + held)})
    print(f"peak above {held / 2**20:.0f} MiB of weights: " + ", ".join(f"{s} {b / 2**20:.0f} MiB" for s, b in table.items())
          + f"; minixmd / as it comes {mine / theirs:.3f} ({(mine + held) / (theirs + held):.3f} with weights), target 0.333")
    line = json.dumps(result)
    if args.out:
        Path(args.out).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
