"""Stage Switch: a Cnn14 that predicts from the sound, per clip, whether the teacher beats the student.

Section 4.2 of "Bridging Ears and Eyes". Every clip of the analysis split gets its class's label: 1 where the teacher
got more of the class right than the student, else 0 (a tie leaves the student its own answer). The Cnn14 learns that
label on nine clips in ten of each class; the others validate it. Then it decides for every clip of another split, whose
labels are read for two figures only: how often the decision is right, and "oracle", what the true class would say."""
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minixmd.inputs.examples import read_examples
from minixmd.learning.optim import optimizer_tensors, restore_optimizer
from minixmd.models.cnn14 import make_cnn14, mixup, spec_augment
from minixmd.runs.device import resolve_device
from minixmd.runs.distributed import compute_shards, gather, rank_and_world_size
from minixmd.runs.files import write_json
from minixmd.runs.records import answers_beside, count_bad, write_jsonl
from minixmd.runs.seeds import shuffled
from minixmd.runs.training_state import fill, load_state, save_state, tensor_files
from minixmd.stages.cnn14_training import load_logmels, train_epochs
from minixmd.tasks.statistics import digest, leads, pairs, tabulate
from minixmd.tasks.yes_no import tally


def run(stage, folder, log):
    examples = read_examples(stage)
    clips = read_examples(stage, "train_manifest")
    gain = gains(stage, examples)
    results = count_classes(stage.name, gain, {example.label for example in examples})
    usable = [example for example in examples if example.label in gain]
    if rank_and_world_size()[0] == 0:  # one is enough: by the dry run a quarter of an hour in the paper's setting
        results["validation"] = fit(stage, folder, log, usable, gain)
    gather(None)
    model, _ = restore(stage, folder)

    def decide(clips):
        logmels, records = load_logmels(clips, stage)
        probabilities = teacher_probabilities(model, list(logmels.values()), stage.batch_size)
        for clip_id, p in zip(logmels, probabilities, strict=True):
            records[clip_id] = {"id": clip_id, "p_teacher": round(p, 6)}
        return [records[example.id] for example in clips]

    records = compute_shards(decide, clips, folder / "shards", f"{stage.name}: decisions", "clip")
    if records is not None:
        collect(stage, folder, log, clips, records, gain, results)


def collect(stage, folder, log, clips, records, gain, results):
    """Writes results.json and switch.jsonl, {"id", "p_teacher", "oracle" if it is known} or {"id", "bad", "detail"}."""
    results["bad"] = count_bad(records, stage.name, stage.max_bad)
    results["clips"] = len(records) - sum(results["bad"].values())
    results["clips_to_teacher"] = sum(record.get("p_teacher", 0) >= 0.5 for record in records)
    known = []
    for example, record in zip(clips, records, strict=True):
        if "p_teacher" in record and example.label in gain:
            record["oracle"] = float(gain[example.label] > 0)
            known.append((record["p_teacher"], record["oracle"]))
    if known:
        results["training"] = tally(*zip(*known, strict=True))
        results["note"] = (f"the labels of {stage.train_manifest} were read for the figures under 'training' and for "
                           "'oracle' only")
    write_jsonl(folder / "switch.jsonl", records)
    write_json(folder / "results.json", results)
    log(results)
    for part in ("validation", "training"):
        if part in results:
            right, majority = results[part]["accuracy"], results[part]["majority"]
            tqdm.write(f"{stage.name}: right for {100 * right:.1f} % of the {part} clips; always giving the more "
                       f"frequent answer would be for {100 * majority:.1f} %")
    bad = f", bad: {results['bad']}" if results["bad"] else ""
    if not results["clips_to_teacher"]:
        tqdm.write(f"{stage.name}: note: no clip goes to the teacher: by this switch a student learns its own answers")
    tqdm.write(f"{stage.name}: {results['clips_to_teacher']} of {results['clips']} clips go to the teacher{bad}")


def count_classes(name, gain, labels):
    """How many classes the teacher wins, ties and loses, and how many were left out; also printed."""
    won = sum(g > 0 for g in gain.values())
    lost = sum(g < 0 for g in gain.values())
    counts = {
        "classes_won": won,
        "classes_tied": len(gain) - won - lost,
        "classes_lost": lost,
        "classes_left_out": len(labels) - len(gain),
    }
    line = f"{name}: the teacher wins {won} classes, ties {counts['classes_tied']}, loses {lost}"
    if counts["classes_left_out"]:
        line += f"; {counts['classes_left_out']} left out, whose clips were all bad for one of the two"
    tqdm.write(line)
    return counts


def check_labels(stage, examples):
    for example in examples:
        if example.label is None:
            raise ValueError(f"{stage.name}: {stage.manifest}: example {example.id!r} has no label, by which the "
                             "switch learns who is better")


def gains(stage, examples):
    """{class: the teacher's accuracy less the student's} on the analysis split, of the classes that both answered.
    Raises ValueError for an example without a class, answers to other questions, or no class that both answered."""
    check_labels(stage, examples)
    questions = [{"id": example.id, "question": digest(example)} for example in examples]
    classes = []
    for path in (stage.teacher, stage.student):
        try:
            answers = [answer for _, answer in pairs(questions, answers_beside(path))]
        except ValueError as error:
            raise ValueError(f"{stage.name}: {stage.manifest} and {path}: {error}") from None
        for example, answer in zip(examples, answers, strict=True):
            if (answer.get("answer") or 0) >= len(example.options):
                raise ValueError(f"{path}: clip {example.id!r} is answered {answer['answer']}, which is no option")
        classes.append(tabulate(examples, answers)["classes"])
    gain = leads(*classes)
    if not gain:
        raise ValueError(f"{stage.name}: {stage.teacher} and {stage.student} have no class that both answered")
    return gain


def split(seed, examples):
    """(training, validation) examples: of every class one clip in ten validates, at least one of two."""
    classes = defaultdict(list)
    for example in examples:
        classes[example.label].append(example)
    train, val = [], []
    for label, members in sorted(classes.items()):
        order = shuffled(members, seed, "split", label)
        held_out = min(max(1, round(len(order) / 10)), len(order) - 1)
        val += order[:held_out]
        train += order[held_out:]
    return train, val


def restore(stage, folder):
    """(the Cnn14 as it was after the last whole epoch, the state of training then); at first a new one and None."""
    device = resolve_device(stage.name, stage.device)
    model = make_cnn14(2, stage.width, stage.seed, stage.weights).to(device)
    if device == "cpu":
        model.to(memory_format=torch.channels_last)  # at 1/16 width 91 ms a step instead of 170
    state = load_state(folder)
    if state is not None:
        fill(model.state_dict(), tensor_files(folder, "weights", state["step"]))
    return model, state


def fit(stage, folder, log, examples, gain):
    """Trains the Cnn14; returns the tally of its validation. All clips' frames are held in memory, 256 KB a clip of
    10 s. The state is saved after every epoch: a stopped stage resumes and, on the CPU, ends with the same weights."""
    logmels, bad = load_logmels(examples, stage)
    count_bad([bad.get(example.id, {}) for example in examples], stage.name, stage.max_bad)
    train, val = split(stage.seed, examples)
    train = [example for example in train if example.id in logmels]
    val = [example for example in val if example.id in logmels]
    if len(train) < 2 or not val:
        raise ValueError(f"{stage.manifest}: {len(examples)} examples are too few to learn from and to validate")
    model, state = restore(stage, folder)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=stage.lr)
    lines = []
    if state is not None:
        lines = state["log"]
        restore_optimizer(optimizer, parameters, tensor_files(folder, "optimizer", state["step"]))
    write_jsonl(folder / "log.jsonl", lines)  # rewinds the log to it
    if not lines:
        lines.append({"epoch": 0, "train_clips": len(train), "validation_clips": len(val), "bad": len(bad),
                      "parameters": sum(p.numel() for p in parameters.values())})
        log(lines[0])
    batch_size = stage.batch_size
    if stage.augment in ("both", "mixup"):
        batch_size *= 2  # two clips in a row
    batch_size = min(batch_size, len(train) // 2 * 2)
    compute_loss = partial(batch_loss, model, logmels, gain, stage.augment)

    def validate():
        p_N = teacher_probabilities(model, [logmels[example.id] for example in val], stage.batch_size)
        return tally(p_N, [gain[example.label] > 0 for example in val])

    for epoch, loss_S in train_epochs(stage, model, optimizer, compute_loss, train, batch_size, len(lines) - 1):
        lines.append({"epoch": epoch, "loss": loss_S.mean().item(), "val_accuracy": validate()["accuracy"]})
        log(lines[-1])
        progress = {"step": epoch, "log": lines}
        save_state(folder, model.state_dict(), optimizer_tensors(optimizer, parameters), progress)
    return validate()


def batch_loss(model, logmels, gain, augment, examples, noise):
    """Cross-entropy of a batch's examples. augment: as in config.Switch, drawn from the generator `noise`."""
    x_B1AM = model.normalise(torch.stack([logmels[example.id] for example in examples]).to(noise.device))
    target_B = torch.tensor([int(gain[example.label] > 0) for example in examples], device=noise.device)
    target_BK = F.one_hot(target_B, 2).float()
    if augment in ("both", "spec"):
        x_B1AM = spec_augment(x_B1AM, noise)
    if augment in ("both", "mixup"):
        x_B1AM, target_BK = mixup(x_B1AM, target_BK, noise)
    return F.cross_entropy(model.fc_audioset(model.embed(x_B1AM, noise)), target_BK)


@torch.inference_mode()
def teacher_probabilities(model, frames, batch_size):
    model.eval()
    device = model.fc1.weight.device
    probabilities = []
    for start in range(0, len(frames), batch_size):
        batch = torch.stack(frames[start:start + batch_size]).to(device)
        probabilities += model(batch).softmax(-1)[:, 1].tolist()
    return probabilities
