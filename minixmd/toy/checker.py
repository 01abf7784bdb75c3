"""The toy's checker: an audio model that says whether a trace is true of what it hears.

It goes on from the student, which can hear and read, and has clips of its own to learn from: besides the base split the
analysis split, whose true labels it is told. So it hears better than the student, as GPT-4o-audio than Qwen2-Audio.
"""

import numpy as np
import torch
from tqdm import tqdm

from minixmd import load
from minixmd.inputs.batch import pack
from minixmd.inputs.examples import read_manifest
from minixmd.models.head import CrossEntropy
from minixmd.models.weights import save_model
from minixmd.toy.lessons import batches, descend, lesson_prompt, show
from minixmd.toy.world import CHECK_PROMPT

STEPS, BATCH, LR = 500, 32, 5e-4


def teach_checker(folder, seed, thought, log):
    """Writes checker/. thought: the form of what it shall judge, over {told}."""
    model, processor = load(folder / "student")
    examples = read_manifest(folder / "base.jsonl") + read_manifest(folder / "analysis.jsonl")
    shown, rng = show(processor, examples, "checker", "audio"), np.random.default_rng([seed, 3])
    names, alike = sorted({e.label for e in examples}), {}
    for e in examples:
        alike.setdefault(e.meta["group"], set()).add(e.label)
    trained = [p.requires_grad_(True) for n, p in model.named_parameters() if "embed_positions" not in n]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.05)
    losses = []
    with tqdm(total=STEPS, desc="toy: checker checks", unit="step") as bar:
        for step, chosen in zip(range(STEPS), batches(len(shown), BATCH, rng), strict=False):
            prompts = []
            for i in chosen:
                label, yes = examples[i].label, rng.random() < 0.5
                among = sorted(alike[examples[i].meta["group"]]) if rng.random() < 0.5 else names
                told = label if yes else rng.choice([other for other in among if other != label])
                text = CHECK_PROMPT.format(trace=thought.format(told=told))
                prompts.append(check_lesson(processor, *shown[i], text, yes))
            batch = pack(prompts)
            weight_T = batch.target_weight_T / len(batch.target_id_T)
            objective = CrossEntropy(batch.target_id_T, weight_T, "torch")
            loss, columns = model.head_loss(model(batch), batch.target_row_T, objective)
            rate = LR * min(1.0, (step + 1) / 40) * min(1.0, 2 * (1 - step / STEPS))  # the second half fades
            descend(optimizer, loss, rate)
            first = [batch.target_segment_T.tolist().index(segment) for segment in range(len(prompts))]
            losses.append(columns["nll"][first].mean().item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    log({"part": "checker", "steps": STEPS, "loss": float(np.mean(losses[-20:]))})
    save_model(model, processor.folder, folder / "checker")


def check_lesson(processor, before_N, clip, text, yes):
    """A Prompt that shows a clip, asks about it, and answers yes or no."""
    ids = [*before_N, *processor.encode(text + "<|im_end|>\n<|im_start|>assistant\n")]
    answer = [*processor.encode("yes" if yes else "no"), processor.end_id]
    return lesson_prompt(ids + answer, len(ids), [clip])
