"""The toy's checker, which says whether a trace is true of its clip: the student, trained on with more true labels."""
from collections import defaultdict

import numpy as np
import torch

from minixmd import load
from minixmd.inputs.batch import pack
from minixmd.inputs.examples import read_manifest
from minixmd.models.head import CrossEntropy
from minixmd.models.weights import save_model
from minixmd.toy.lessons import Fit, answer_prompt, batches, read_contexts, thoughts_of
from minixmd.toy.world import CHECK_PROMPT

STEPS = 300
BATCH_SIZE = 24
LR = 5e-4


def train_checker(folder, seed, thoughts, log):
    """Fine-tunes student/ and writes checker/, in a toy world's folder. thoughts: "short" | "long"."""
    model, processor = load(folder / "student")
    model.set_trainable("full")
    examples = read_manifest(folder / "base.jsonl") + read_manifest(folder / "analysis.jsonl")
    contexts = read_contexts(processor, examples, "audio")
    labels_of = defaultdict(set)
    for example in examples:
        labels_of[example.meta["group"]].add(example.label)
        labels_of["all"].add(example.label)
    rng = np.random.default_rng([seed, 3])
    indices = batches(len(examples), BATCH_SIZE, rng)
    fit = Fit("checker", model.parameters())
    for step in range(STEPS):
        prompts = []
        for i in next(indices):
            label = examples[i].label
            group = examples[i].meta["group"]
            is_true = rng.random() < 0.5
            others = labels_of[group if rng.random() < 0.5 else "all"] - {label}
            thought = label if is_true else rng.choice(sorted(others))
            text = CHECK_PROMPT.format(trace=thoughts_of(thought, thoughts))
            prompts.append(answer_prompt(processor, contexts[i], text, "yes" if is_true else "no"))
        batch = pack(prompts)
        row_loss = CrossEntropy(batch.target_id_T, batch.target_weight_T / len(batch.target_id_T), "torch")
        loss, columns = model.head_loss(model(batch), batch.target_row_T, row_loss)
        first_B = torch.searchsorted(batch.target_segment_T, torch.arange(BATCH_SIZE))
        lr = LR * min(1.0, (step + 1) / 40)
        lr *= min(1.0, 2 * (1 - step / STEPS))  # decays over the second half
        first_loss = columns["nll"][first_B].mean().item()  # of the answers' first tokens
        fit.step(loss, lr, first_loss)
    log({"phase": "checker", "steps": STEPS, "loss": fit.last_loss()})
    save_model(model, processor.folder, folder / "checker")
