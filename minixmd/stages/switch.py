"""Stage Switch: a Cnn14 that predicts from the sound, per clip, whether the teacher beats the student.

Section 4.2 of "Bridging Ears and Eyes". Every clip of the analysis split gets its class's label: 1 where the teacher got
more of the class right than the student, 0 where it got fewer or as many (a tie leaves the student its own answer,
whichever of the two is the teacher). The Cnn14 learns that label on nine clips in ten of each class; the others validate
it. Then it decides for every clip of another split. That split's own labels, where it has any, are read for two things
only: how often the decision is right, and "oracle", what the true class would have said.
"""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.examples import check_media, read_manifest
from minixmd.inputs.media import read_audio
from minixmd.inputs.panns import log_mel
from minixmd.inputs.prompts import prefetch
from minixmd.learning.optim import learning_rate, optimizer_tensors, restore_optimizer
from minixmd.models.cnn14 import load_weights, make_cnn14, mixup, spec_augment
from minixmd.runs.device import resolve_device
from minixmd.runs.distributed import compute_shards
from minixmd.runs.files import write_json
from minixmd.runs.records import answers_beside, bad_record, count_bad, write_jsonl
from minixmd.runs.seeds import hash_seed
from minixmd.runs.state import load_state, save_state
from minixmd.tasks.statistics import digest, leads, pairs, summary, tabulate

PAPER = {"validation": 88.8, "training": 89.1}  # % of clips for which the paper's switch was right


def run(stage, folder, log):
    """Writes results.json and switch.jsonl, {"id", "p_teacher", "oracle" if it is known} or {"id", "bad", "detail"}."""
    examples, clips = read_manifest(stage.manifest), read_manifest(stage.train_manifest)
    check_media(stage.name, stage.manifest, examples, "audio")
    check_media(stage.name, stage.train_manifest, clips, "audio")
    gain = gains(stage, examples)
    results = count_classes(stage.name, gain, {example.label for example in examples})
    model, results["validation"] = fit(stage, folder, log, [e for e in examples if e.label in gain], gain)
    with tqdm(total=len(clips), desc=f"{stage.name}: decisions", unit="clip") as bar:
        records = compute_shards(lambda part: decide(model, part, stage.clip_s, stage.batch_size), clips,
                                 folder / "shards", bar.update, first_process_only=True)
    results["bad"] = count_bad(records, stage.name, stage.max_bad)
    results["clips"] = len(records) - sum(results["bad"].values())
    results["clips_to_teacher"] = sum(record.get("p_teacher", 0) >= 0.5 for record in records)
    known = []
    for example, record in zip(clips, records, strict=True):
        if "p_teacher" in record and example.label in gain:
            record["oracle"] = float(gain[example.label] > 0)
            known.append(record)
    if known:
        results["training"] = tally([record["p_teacher"] for record in known], [record["oracle"] for record in known])
        results["note"] = (f"the labels of {stage.train_manifest} were read for the figures under 'training' and for "
                           "'oracle' only")
    write_jsonl(folder / "switch.jsonl", records)
    write_json(folder / "results.json", results)
    log(results)
    print_results(stage.name, results)


def count_classes(name, gain, labels):
    """How many classes the teacher wins, ties and loses, and how many were left out; said on the screen."""
    won, lost = sum(g > 0 for g in gain.values()), sum(g < 0 for g in gain.values())
    counts = {"classes_won": won, "classes_tied": len(gain) - won - lost, "classes_lost": lost,
              "classes_left_out": len(labels) - len(gain)}
    line = (f"{name}: the teacher wins {won} classes, ties {counts['classes_tied']}, loses {lost} "
            "(the paper: 226 to 60)")
    if counts["classes_left_out"]:
        line += f"; {counts['classes_left_out']} left out, whose clips were all bad for one of the two"
    tqdm.write(line)
    return counts


def print_results(name, results):
    for split, paper in PAPER.items():
        if split in results:
            right, majority = 100 * results[split]["accuracy"], 100 * results[split]["majority"]
            tqdm.write(f"{name}: right for {right:.1f} % of the {split} clips (the paper: {paper} %); always giving the "
                       f"more frequent answer would be for {majority:.1f} %")
    bad = f", bad: {results['bad']}" if results["bad"] else ""
    tqdm.write(f"{name}: {results['clips_to_teacher']} of {results['clips']} clips go to the teacher{bad}")


def gains(stage, examples):
    """{class: the teacher's accuracy less the student's} on the analysis split, of the classes that both answered.

    Raises:
        ValueError: an example without a class, answers to other questions than theirs, or no class that both answered.
    """
    for example in examples:
        if example.label is None:
            raise ValueError(f"{stage.name}: {stage.manifest}: example {example.id!r} has no label, by which the switch "
                             "learns who is better")
    questions = [{"id": example.id, "question": digest(example)} for example in examples]
    classes = []
    for path in (stage.teacher, stage.student):
        try:
            answers = [answer for _, answer in pairs(questions, answers_beside(path))]
        except ValueError as error:
            raise ValueError(f"{stage.name}: {stage.manifest} and {path}: {error}") from None
        classes.append(tabulate(examples, answers)["classes"])
    gain = leads(*classes)
    if not gain:
        raise ValueError(f"{stage.name}: {stage.teacher} and {stage.student} have no class that both answered")
    return gain


def tally(p_N, truth_N):
    """Accuracy with its interval, the more frequent answer's share, and the confusion matrix.

    Its rows are the truth, its columns the decision, each first the student and then the teacher.
    """
    decided = [(bool(truth), p >= 0.5) for p, truth in zip(p_N, truth_N, strict=True)]
    confusion = [[decided.count((truth, decision)) for decision in (False, True)] for truth in (False, True)]
    return {**summary([truth == decision for truth, decision in decided]),
            "majority": max(map(sum, confusion)) / len(decided), "confusion": confusion}


def split(seed, examples):
    """Indices of (training, validation) clips: of every class one clip in ten validates, at least one of two."""
    members = defaultdict(list)
    for i, example in enumerate(examples):
        members[example.label].append(i)
    train, val = [], []
    for label, indices in sorted(members.items()):
        generator = torch.Generator().manual_seed(hash_seed(seed, "split", label))
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        held_out = min(max(1, round(len(order) / 10)), len(order) - 1)
        val += order[:held_out]
        train += order[held_out:]
    return train, val


def load_logmel(path, clip_s):
    """The log-mel frames (A, M) of a clip's first clip_s seconds, then of silence. Raises MediaError."""
    wave_S = read_audio(path)
    return log_mel(F.pad(wave_S, (0, round(clip_s * SAMPLE_RATE) - len(wave_S))))  # a negative padding cuts


def load_logmels(examples, clip_s):
    """Their log-mel frames, and {index: bad record} of those that have none (None stands in their place)."""
    bad = {}

    def on_bad(indexed, error):
        i, example = indexed
        bad[i] = bad_record(example.id, error)

    frames = list(prefetch(lambda indexed: load_logmel(indexed[1].audio, clip_s), enumerate(examples), on_bad))
    return frames, bad


def fit(stage, folder, log, examples, gain):
    """The Cnn14 that has learnt which clips are the teacher's, and the tally of its validation.

    The frames of all clips are held in memory, 256 KB a clip of 10 s. The state after every epoch is kept, so a stopped
    stage goes on and, on the CPU, ends with the same weights.
    """
    frames, bad = load_logmels(examples, stage.clip_s)
    count_bad([bad.get(i, {}) for i in range(len(examples))], stage.name, stage.max_bad)
    train, val = ([i for i in indices if i not in bad] for indices in split(stage.seed, examples))
    if len(train) < 2 or not val:
        raise ValueError(f"{stage.manifest}: {len(examples)} examples are too few to learn from and to validate")
    target_N = torch.tensor([int(gain[example.label] > 0) for example in examples])
    device = resolve_device(stage.name, stage.device)
    model = make_cnn14(2, stage.width, stage.seed)
    if stage.weights:
        load_weights(model, stage.weights, head=False)
    model.to(device)
    if device == "cpu":
        model.to(memory_format=torch.channels_last)  # at 1/16 width 91 ms a step instead of 170
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=stage.lr)
    lines = resume(folder, model, optimizer, parameters)
    if not lines:
        lines = [{"epoch": 0, "train_clips": len(train), "validation_clips": len(val), "bad": len(bad),
                  "parameters": sum(p.numel() for p in parameters.values())}]
        log(lines[0])
    val_frames = [frames[i] for i in val]
    with tqdm(total=stage.epochs, initial=len(lines) - 1, desc=stage.name, unit="epoch") as bar:
        for epoch in range(len(lines) - 1, stage.epochs):
            loss = train_epoch(stage, epoch, model, optimizer, frames, target_N, train)
            accuracy = tally(teacher_probabilities(model, val_frames, stage.batch_size), target_N[val])["accuracy"]
            lines.append({"epoch": epoch + 1, "loss": loss, "val_accuracy": accuracy})
            log(lines[-1])
            save_state(folder, {**model.state_dict(), **optimizer_tensors(optimizer, parameters)}, {"log": lines})
            bar.set_postfix_str(f"loss {loss:.3f}, validation {100 * accuracy:.1f} %", refresh=False)
            bar.update()
    return model, tally(teacher_probabilities(model, val_frames, stage.batch_size), target_N[val])


def resume(folder, model, optimizer, parameters):
    """Goes on from the state of the last whole epoch, if there is one; the log becomes its lines, which are returned."""
    tensors, meta = load_state(folder) or ({}, {"log": []})
    if tensors:
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        restore_optimizer(optimizer, parameters, tensors)
    write_jsonl(folder / "log.jsonl", meta["log"])
    return meta["log"]


def train_epoch(stage, epoch, model, optimizer, frames, target_N, train):
    """One pass over the training clips in a new order, a smaller last batch left out. Returns the mean loss."""
    device = model.fc1.weight.device
    mixed = stage.augment in ("both", "mixup")
    shuffle = torch.Generator().manual_seed(hash_seed(stage.seed, "order", epoch))
    noise = torch.Generator(device).manual_seed(hash_seed(stage.seed, "noise", epoch))
    order = [train[i] for i in torch.randperm(len(train), generator=shuffle).tolist()]
    size = min(stage.batch_size * (2 if mixed else 1), len(order) // 2 * 2)
    steps = len(order) // size
    losses = []
    model.train()
    for step in range(steps):
        chosen = order[step * size:(step + 1) * size]
        x_B1AM = model.normalise(torch.stack([frames[i] for i in chosen]).to(device))
        target_BK = F.one_hot(target_N[chosen], 2).float().to(device)
        if stage.augment in ("both", "spec"):
            x_B1AM = spec_augment(x_B1AM, noise)
        if mixed:
            x_B1AM, target_BK = mixup(x_B1AM, target_BK, noise)
        loss = F.cross_entropy(model.fc_audioset(model.embed(x_B1AM, noise)), target_BK)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * steps + step, stage.epochs * steps, stage.lr, stage.warmup_ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        raise ValueError(f"{stage.name}: the loss of epoch {epoch + 1} is {mean}; stopped")
    return mean


@torch.inference_mode()
def teacher_probabilities(model, frames, batch_size):
    """p(the teacher is better) of clips' frames, a list of floats."""
    model.eval()
    device = model.fc1.weight.device
    probabilities = []
    for start in range(0, len(frames), batch_size):
        batch = torch.stack(frames[start:start + batch_size]).to(device)
        probabilities += model(batch).softmax(-1)[:, 1].tolist()
    return probabilities


def decide(model, clips, clip_s, batch_size):
    """A record a clip."""
    frames, bad = load_logmels(clips, clip_s)
    p = iter(teacher_probabilities(model, [f for f in frames if f is not None], batch_size))
    records = []
    for i, example in enumerate(clips):
        records.append(bad[i] if i in bad else {"id": example.id, "p_teacher": round(next(p), 6)})
    return records
