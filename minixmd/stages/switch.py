"""Stage Switch: for every clip of a split, is the teacher the stronger one?

Section 4.2 of "Bridging Ears and Eyes". Every clip of the analysis split is labelled by its class: 1 where the teacher
got more of the class right than the student, 0 where it got fewer or as many (a tie leaves the student its own answer,
whichever of the two is the teacher). On nine clips in ten of each class a Cnn14 learns that label from the sound; the
others validate it. Then it decides for every clip of another split. That split's own labels, where it has any, are read
for two things only: how often the decision is right, and "oracle", what the true class would have said.
"""
import json
import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.examples import read_manifest
from minixmd.inputs.media import MediaError, read_audio
from minixmd.inputs.panns import log_mel
from minixmd.learning.optim import learning_rate, optimizer_tensors, restore_optimizer
from minixmd.models.cnn14 import load_weights, make_cnn14, mixup, spec_augment
from minixmd.models.lora import hash_seed
from minixmd.runs.directory import load_state, save_state
from minixmd.runs.files import write_json, write_text
from minixmd.stages.multiple_choice import (
    SHARD,
    answers_beside,
    bad_record,
    check_media,
    count_bad,
    device_of,
    prefetch,
    read_records,
)
from minixmd.tasks.statistics import digest, leads, pairs, summary, tabulate


def run(stage, folder, log):
    """Writes results.json and switch.jsonl, {"id", "p_teacher", "oracle" if it can be told} or {"id", "bad", "detail"}
    for each clip to decide on."""
    examples, clips = read_manifest(stage.manifest), read_manifest(stage.train_manifest)
    for path, listed in ((stage.manifest, examples), (stage.train_manifest, clips)):
        check_media(stage.name, path, listed, "audio")
    gain = gains(stage, examples)
    won, lost = sum(g > 0 for g in gain.values()), sum(g < 0 for g in gain.values())
    left_out = len({e.label for e in examples}) - len(gain)
    results = {"classes_won": won, "classes_tied": len(gain) - won - lost, "classes_lost": lost,
               "classes_left_out": left_out}
    tqdm.write(f"{stage.name}: the teacher wins {won} classes, ties {results['classes_tied']}, loses {lost} "
               "(the paper: 226 to 60)" + (f"; {left_out} left out, whose clips were all bad for one of the two"
                                           if left_out else ""))
    model, results["validation"] = fit(stage, folder, log, [e for e in examples if e.label in gain], gain)
    records = decide(stage, folder, model, clips)
    results["bad"] = count_bad(records, stage)
    results["clips"] = len(records) - sum(results["bad"].values())
    results["clips_to_teacher"] = sum(record.get("p_teacher", 0) >= 0.5 for record in records)
    for e, record in zip(clips, records, strict=True):
        if "p_teacher" in record and e.label in gain:
            record["oracle"] = float(gain[e.label] > 0)
    if told := [record for record in records if "oracle" in record]:
        results["training"] = tally([record["p_teacher"] for record in told], [record["oracle"] for record in told])
        results["note"] = (f"the labels of {stage.train_manifest} were read for the figures under 'training' and for "
                           "'oracle' only")
    write_text(folder / "switch.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    write_json(folder / "results.json", results)
    log(results)
    for part, paper in (("validation", 88.8), ("training", 89.1)):
        if part in results:
            right, most = 100 * results[part]["accuracy"], 100 * results[part]["majority"]
            tqdm.write(f"{stage.name}: right for {right:.1f} % of the {part} clips (the paper: {paper} %); always "
                       f"giving the commoner answer would be for {most:.1f} %")
    tqdm.write(f"{stage.name}: {results['clips_to_teacher']} of {results['clips']} clips go to the teacher"
               + (f", bad: {results['bad']}" if results["bad"] else ""))


def gains(stage, examples):
    """{class: the teacher's accuracy less the student's} on the analysis split, of the classes that both answered.

    Raises:
        ValueError: an example without a class, answers to other questions than theirs, or no class that both answered.
    """
    if missing := next((e for e in examples if e.label is None), None):
        raise ValueError(f"{stage.name}: {stage.manifest}: example {missing.id!r} has no label, by which the switch "
                         "learns who is better")
    asked, classes = [{"id": e.id, "question": digest(e)} for e in examples], []
    for path in (stage.teacher, stage.student):
        try:
            answers = [answer for _, answer in pairs(asked, answers_beside(path))]
        except ValueError as error:
            raise ValueError(f"{stage.name}: {stage.manifest} and {path}: {error}") from None
        classes.append(tabulate(examples, answers)["classes"])
    if not (gain := leads(*classes)):
        raise ValueError(f"{stage.name}: {stage.teacher} and {stage.student} have no class that both answered")
    return gain


def tally(p_N, truth_N):
    """Accuracy with its interval, the commoner answer's share, and the confusion: rows are the truth, columns the
    decision, each first the student and then the teacher."""
    pairs = [(bool(truth), p >= 0.5) for p, truth in zip(p_N, truth_N, strict=True)]
    confusion = [[pairs.count((truth, said)) for said in (False, True)] for truth in (False, True)]
    return {**summary([truth == said for truth, said in pairs]), "majority": max(map(sum, confusion)) / len(pairs),
            "confusion": confusion}


def split(stage, examples):
    """Indices of (training, validation) clips: of every class one clip in ten validates, at least one of two."""
    members = defaultdict(list)
    for i, e in enumerate(examples):
        members[e.label].append(i)
    train, val = [], []
    for label, indices in sorted(members.items()):
        generator = torch.Generator().manual_seed(hash_seed(stage.seed, "split", label))
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        held = min(max(1, round(len(order) / 10)), len(order) - 1)
        val, train = val + order[:held], train + order[held:]
    return train, val


def hear(stage, example):
    """The log-mel frames (A, M) of a clip's first clip_s seconds, then of silence; or the MediaError it raised."""
    try:
        wave_S = read_audio(example.audio)
    except MediaError as error:
        return error
    return log_mel(F.pad(wave_S, (0, round(stage.clip_s * SAMPLE_RATE) - len(wave_S))))  # below 0 it cuts


def fit(stage, folder, log, examples, gain):
    """The Cnn14 that has learnt which clips are the teacher's, and the tally of its validation.

    The frames of all clips are held in memory, 256 KB a clip of 10 s. The state after every epoch is kept, so a stopped
    stage goes on and, on the CPU, ends with the same weights.
    """
    heard = list(tqdm(prefetch(lambda e: hear(stage, e), examples), f"{stage.name}: clips", len(examples), unit="clip"))
    bad = {i: bad_record(examples[i], h) for i, h in enumerate(heard) if isinstance(h, MediaError)}
    count_bad([bad.get(i, {}) for i in range(len(examples))], stage)
    train, val = ([i for i in part if i not in bad] for part in split(stage, examples))
    if len(train) < 2 or not val:
        raise ValueError(f"{stage.manifest}: {len(examples)} examples are too few to learn from and to validate")
    target_N = torch.tensor([int(gain[e.label] > 0) for e in examples])
    device = device_of(stage)
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
    with tqdm(total=stage.epochs, initial=len(lines) - 1, desc=stage.name, unit="epoch") as bar:
        for epoch in range(len(lines) - 1, stage.epochs):
            loss = train_epoch(stage, epoch, model, optimizer, heard, target_N, train)
            p_N = chances(model, [heard[i] for i in val], stage.batch_size)
            accuracy = tally(p_N, target_N[val])["accuracy"]
            lines.append({"epoch": epoch + 1, "loss": loss, "val_accuracy": accuracy})
            log(lines[-1])
            state = {**model.state_dict(), **optimizer_tensors(optimizer, parameters)}
            save_state(folder, state, {"log": lines})
            bar.set_postfix_str(f"loss {loss:.3f}, validation {100 * accuracy:.1f} %", refresh=False)
            bar.update()
    return model, tally(chances(model, [heard[i] for i in val], stage.batch_size), target_N[val])


def resume(folder, model, optimizer, parameters):
    """Go on from the state of the last whole epoch, if there is one; the log becomes its lines, which are returned."""
    tensors, meta = load_state(folder) or ({}, {"log": []})
    if tensors:
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        restore_optimizer(optimizer, parameters, tensors)
    write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in meta["log"]))
    return meta["log"]


def train_epoch(stage, epoch, model, optimizer, heard, target_N, train):
    """One pass over the training clips in an order of its own, a smaller last batch left out. Returns the mean loss."""
    device, mixed = device_of(stage), stage.augment in ("both", "mixup")
    shuffle = torch.Generator().manual_seed(hash_seed(stage.seed, "order", epoch))
    noise = torch.Generator(device).manual_seed(hash_seed(stage.seed, "noise", epoch))
    order = [train[i] for i in torch.randperm(len(train), generator=shuffle).tolist()]
    size = min(stage.batch_size * (2 if mixed else 1), len(order) // 2 * 2)
    steps = len(order) // size
    losses = []
    model.train()
    for step in range(steps):
        chosen = order[step * size:(step + 1) * size]
        x_B1AM = model.normalise(torch.stack([heard[i] for i in chosen]).to(device))
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
def chances(model, heard, batch_size):
    """p(teacher better) of clips' frames, a list of floats."""
    model.eval()
    device = model.fc1.weight.device
    batches = (torch.stack(heard[at:at + batch_size]) for at in range(0, len(heard), batch_size))
    return [p for batch in batches for p in model(batch.to(device)).softmax(-1)[:, 1].tolist()]


def decide(stage, folder, model, clips):
    """A record a clip, by shards that the manifest's order fixes, each written whole; finished ones are read back."""
    records = []
    with tqdm(total=len(clips), desc=f"{stage.name}: decisions", unit="clip") as bar:
        for start in range(0, len(clips), SHARD):
            part, path = clips[start:start + SHARD], folder / "shards" / f"{start:07d}.jsonl"
            if not path.exists():
                heard = list(prefetch(lambda e: hear(stage, e), part))
                p = iter(chances(model, [h for h in heard if not isinstance(h, MediaError)], stage.batch_size))
                lines = [bad_record(e, h) if isinstance(h, MediaError) else {"id": e.id, "p_teacher": round(next(p), 6)}
                         for e, h in zip(part, heard, strict=True)]
                write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            records += read_records(path)
            bar.update(len(part))
    return records
