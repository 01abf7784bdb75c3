"""Stage Toy: a world of clips (world.py) and two models that start out in it (toy_models.py).

From scratch a model cannot learn to answer by letter: nothing tells its decoder what the options are for. So the models
grow up as real ones do. The decoder, which both share, first learns the question alone, on text in which a name stands
where the clip will be. Then each tower learns to say, in the decoder's own embedding, what it hears or sees. Last,
tower and decoder learn the question together. Where they shall think, they then learn to answer in that form as well.
All steps but the first use the base split only.
"""
import json
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, cycle
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from minixmd.config import PROMPT
from minixmd.files import write_safetensors, write_text
from minixmd.inputs.batch import Prompt, pack
from minixmd.inputs.examples import build_conversation, read_manifest
from minixmd.inputs.positions import grid_offsets, positions_of
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.head import CrossEntropy, head_loss
from minixmd.learning.optim import learning_rate
from minixmd.models.lora import hash_seed
from minixmd.models.weights import save_model
from minixmd.stages.toy_models import make_model, write_processor
from minixmd.stages.world import KINDS, OPTIONS, QUESTION, THINK_PROMPT, draw_options, make_world


@dataclass(frozen=True)
class Form:
    """How a lesson asks, over {first} and {last} after the options, and answers, over {name} and then {letter}."""

    prompt: str
    answer: str


FAMILY = {"student": ("qwen2_audio", "audio"), "teacher": ("qwen2_vl", "video")}
PIXELS = dict(min_pixels=3_136, max_pixels=3_136)  # of a frame, which has 56 x 56
NAMES = [kind.name for kind in KINDS]
# (options, prompts a step, most steps, mean loss over 20 steps that ends it, as a share of guessing's): with all
# options at once the decoder learns nothing, with two it soon does
LESSONS = ((2, 20, 600, 0.3), (4, 16, 800, 0.3), (7, 12, 600, 0.3), (OPTIONS, 12, 800, 0.1))
# then the learning rate fades to 0, and again, at most five times, while the loss at the end is above that
LAST, REPEATS = (OPTIONS, 12, 150, 0.02), 5
HINT = 0.3  # weight of the hint, see `lesson`
TEXT_LR, NAMING_LR, ASKING_LR = 1.5e-3, 1e-3, 1e-3
NAMING_STEPS, NAMING_BATCH = 400, 32
ASKING_BATCH, ASKING_MOST, ASKING_FADE = 24, 900, 150
# the rate fades once the loss over 40 steps is below this on the classes that a model's sense tells apart; on the
# others it goes on guessing for as long as it learns
ASKING_PASSED = 0.15
DIRECT = Form(PROMPT, "{letter}")
THINKING = Form(THINK_PROMPT, "<think>I hear {name}.</think><answer>{letter}</answer>")
TRACED = 10
TOLD_APART = {"student": ("both", "ear"), "teacher": ("both", "eye")}


def run(stage, folder, log):
    """Writes <split>.jsonl and their clips, language.safetensors (the decoder that has read), student/ and teacher/;
    where they think, also traces.jsonl: what was heard, and the answer, of some train clips."""
    make_world(folder, stage.seed)
    if stage.thinking == "both":
        write_text(folder / "traces.jsonl", traces(read_manifest(folder / "train_truth.jsonl")))
    language = folder / "language.safetensors"
    if not language.exists():
        write_safetensors(language, teach_language(folder, stage.seed, log))
    for name in FAMILY:
        if not (folder / name / "config.json").exists():  # written last
            model, processor = new_model(folder / name, name, stage.seed)
            adopt(model, load_file(language))
            teach_tower(model, processor, folder, name, stage, log)
            save_model(model, processor.folder, folder / name)


def traces(examples):
    """JSON lines {"id", "text"} in the form THINKING, of the first TRACED clips of each class."""
    lines, seen = [], Counter()
    for e in examples:
        seen[e.label] += 1
        if seen[e.label] <= TRACED:
            text = THINKING.answer.format(name=e.label, letter=ascii_uppercase[e.answer])
            lines.append(json.dumps({"id": e.id, "text": text}) + "\n")
    return "".join(lines)


def new_model(folder, name, seed):
    """An untrained model and its processor, whose files are written to `folder`."""
    write_processor(folder, FAMILY[name][0])
    model = make_model(folder, FAMILY[name][0], hash_seed(seed, "weights"))
    return model, Processor(folder, model.config)


def decoder_parameters(model):
    return {name: p for name, p in model.named_parameters() if name.startswith(("model.", "lm_head."))}


def adopt(model, language):
    """Take over a decoder. Of the embedding and the head only the rows that mean the same in both families."""
    with torch.no_grad():
        for name, p in decoder_parameters(model).items():
            rows = len(language[name])
            p[:rows] = language[name]


# ---- lessons: prompts made of pieces, so that a clip can be asked about with new options every time ----


def lesson(processor, before_N, media, right, options, letters, form):
    """A Prompt that ends with its answer, and a hint for the decoder.

    The hint: the row of every option's name predicts its letter if it is the right one, and what follows anyway if not.
    Without it the last row alone has to find out what options are, and does not (bench/LOG.md).

    Args:
        before_N: ids up to the question. media: the clips in them. right: index into options. letters: of the options.
        form: how it is asked and answered.
    Returns:
        (Prompt, [(row, id to predict), ...], the letter's place among the answer's tokens, from the end).
    """
    ids, hints = [*before_N, *processor.encode(QUESTION + "\n")], []
    for i, (letter, name) in enumerate(zip(letters, options, strict=True)):
        line = processor.encode(f"{letter}. {name}\n")
        hints.append((len(ids) + 2, line[0] if i == right else line[3]))
        ids += line
    _, _, after = form.prompt.partition("{options}\n")
    after = after.format(first="A", last=ascii_uppercase[OPTIONS - 1])
    ids += processor.encode(after + "<|im_end|>\n<|im_start|>assistant\n")
    asked = len(ids)
    before, _, after = form.answer.partition("{letter}")
    after = [*processor.encode(after), processor.end_id]
    ids += processor.encode(before.format(name=options[right]) + letters[right]) + after
    blocks = [(int(m.rows_P[0]), grid_offsets(m.grid_thw)) for m in media if m.grid_thw]
    prompt = Prompt(torch.tensor(ids), positions_of(len(ids), blocks), tuple(media), torch.arange(len(ids)) >= asked)
    return prompt, hints, len(after) + 1


def lesson_loss(model, lessons):
    """(mean loss of a batch of lessons, answer and hints; the loss of each one's letter, floats)"""
    batch = pack([prompt for prompt, *_ in lessons])
    hints = torch.tensor([(start + row, token) for (start, _), (_, pairs, _) in zip(batch.spans, lessons, strict=True)
                          for row, token in pairs])
    ends = accumulate(int(prompt.target_N.sum()) for prompt, *_ in lessons)
    letters = [end - back for end, (*_, back) in zip(ends, lessons, strict=True)]
    row_T = torch.cat([batch.target_row_T, hints[:, 0]])
    objective = CrossEntropy(torch.cat([batch.target_id_T, hints[:, 1]]),
                             torch.cat([batch.target_weight_T, torch.full((len(hints),), HINT)]), "torch")
    loss, columns = head_loss(model(batch), model.lm_head.weight, row_T, objective)
    return loss / len(lessons), columns["nll"][letters].tolist()


def descend(optimizer, loss, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


# ---- the three steps ----


def teach_language(folder, seed, log):
    """Step 1, text only. Returns the decoder's parameters, of the embedding and the head the families' common rows."""
    model, processor = new_model(folder / "student", "student", seed)
    system = processor.family.system
    before = processor.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    rng = np.random.default_rng([seed, 1])
    optimizer = torch.optim.AdamW(decoder_parameters(model).values(), betas=(0.9, 0.98), weight_decay=0.0)
    step = 0
    with tqdm(desc="toy: language", unit="step") as bar:
        for number, (count, size, most, passed) in enumerate((*LESSONS, *[LAST] * REPEATS)):
            recent, fades = [], number >= len(LESSONS)
            for i in range(most):
                lessons = []
                for _ in range(size):
                    options = rng.choice(NAMES, count, replace=False).tolist()
                    right = int(rng.integers(count))
                    letters = [ascii_uppercase[j] for j in sorted(rng.choice(OPTIONS, count, replace=False))]
                    heard = processor.encode(" " + options[right]) * (12 if i % 2 else 6)
                    lessons.append(lesson(processor, before + heard, (), right, options, letters, DIRECT))
                loss, answers = lesson_loss(model, lessons)
                answer = np.mean(answers)
                fade = 1 - i / most if fades else 1.0
                descend(optimizer, loss, TEXT_LR * min(1.0, (step + 1) / 30) * fade)
                recent.append(answer / np.log(count))
                step += 1
                bar.set_postfix_str(f"{count} options, loss {answer:.3f}", refresh=False)
                bar.update()
                if len(recent) >= 20 and np.mean(recent[-20:]) < passed and not fades:
                    break
            share = np.mean(recent[-20:])
            log({"part": "language", "options": count, "step": step, "loss": float(share * np.log(count))})
            if fades and share < passed:
                break
    common = processor.end_id + 1
    return {name: p[:common] if p.shape[0] == model.config.text.vocab_size else p
            for name, p in decoder_parameters(model).items()}


def teach_tower(model, processor, folder, name, stage, log):
    """Steps 2 to 4 of a model, on the base split."""
    media = FAMILY[name][1]
    examples = read_manifest(folder / "base.jsonl")
    shown = []  # (ids up to the question, the clip) of every example
    question = len(processor.encode(QUESTION + "<|im_end|>\n<|im_start|>assistant\n"))
    for example in tqdm(examples, desc=f"toy: {name} reads", unit="clip"):
        prompt = processor(build_conversation(example, media=media, prompt=QUESTION,
                                              video_options=PIXELS if media == "video" else None))
        shown.append((prompt.ids_N[:-question].tolist(), prompt.media[0]))
    rng = np.random.default_rng([stage.seed, 2])
    teach_naming(model, processor, shown, examples, name, rng, log)
    teach_asking(model, processor, shown, examples, name, rng, log, (DIRECT,))
    if stage.thinking == "both" or (stage.thinking == "teacher" and name == "teacher"):
        teach_asking(model, processor, shown, examples, name, rng, log, (DIRECT, THINKING))


def batches(count, size, rng):
    """Endless index lists, one permutation after the other."""
    order = []
    while True:
        while len(order) < size:
            order += rng.permutation(count).tolist()
        yield order[:size]
        order = order[size:]


def teach_naming(model, processor, shown, examples, name, rng, log):
    """Step 2: the mean of a clip's tokens should point at the embedding of its class's name, which does not move."""
    seen = sorted({example.label for example in examples})
    right_B = torch.tensor([seen.index(example.label) for example in examples])
    ids = torch.tensor([processor.encode(" " + label)[0] for label in seen])
    names_BD = model.model.embed_tokens.weight[ids].detach()
    decoder = decoder_parameters(model)
    tower = [p for n, p in model.named_parameters() if n not in decoder and "embed_positions" not in n]
    optimizer = torch.optim.AdamW(tower, betas=(0.9, 0.98), weight_decay=0.05)
    steps, losses = NAMING_STEPS, []
    with tqdm(total=steps, desc=f"toy: {name} names", unit="step") as bar:
        for step, chosen in zip(range(steps), batches(len(shown), NAMING_BATCH, rng), strict=False):
            clips = [shown[i][1] for i in chosen]
            tokens = model.encode(clips[0].kind, clips).unflatten(0, (len(clips), -1))  # clips are equally long
            score = tokens.mean(1) @ names_BD.T * (4 / names_BD.shape[1] ** 0.5)
            loss = F.cross_entropy(score, right_B[chosen])
            descend(optimizer, loss, learning_rate(step, steps, NAMING_LR, 0.1))
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    log({"part": name, "step": "naming", "loss": float(np.mean(losses[-20:]))})


def teach_asking(model, processor, shown, examples, name, rng, log, forms):
    """Steps 3 and 4: all of the model learns the question, with new options at every turn, in several forms by turns.
    What is passed is the last form."""
    frequency = {label: 1 for label in sorted({example.label for example in examples})}
    trained = [p for n, p in model.named_parameters() if "embed_positions" not in n]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.05)
    losses, told, faded = [], [], 0
    does = "thinks" if THINKING in forms else "answers"
    with tqdm(desc=f"toy: {name} {does}", unit="step") as bar:
        for step, chosen in enumerate(batches(len(shown), ASKING_BATCH, rng)):
            lessons = []
            for i, form in zip(chosen, cycle(forms), strict=False):
                options, right = draw_options(examples[i].label, frequency, OPTIONS, rng)
                lessons.append(lesson(processor, shown[i][0], [shown[i][1]], right, options, ascii_uppercase[:OPTIONS],
                                      form))
            loss, answers = lesson_loss(model, lessons)
            descend(optimizer, loss, ASKING_LR * min(1.0, (step + 1) / 40) * (1 - faded / ASKING_FADE))
            losses.append(np.mean(answers))
            apart = [loss for i, loss, form in zip(chosen, answers, cycle(forms), strict=False)
                     if form == forms[-1] and examples[i].meta["group"] in TOLD_APART[name]]
            told += [np.mean(apart)] if apart else []
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
            if faded or step + 1 >= ASKING_MOST or (step >= 40 and np.mean(told[-40:]) < ASKING_PASSED):
                faded += 1
            if faded == ASKING_FADE:
                break
    log({"part": name, "step": does, "steps": step + 1, "loss": float(np.mean(losses[-20:])),
         "told_apart": float(np.mean(told[-20:]))})
