"""Stage Toy: a world of clips (world.py) and two models that start out in it (toy_models.py).

From scratch a model cannot learn to answer by letter: nothing tells its decoder what the options are for. So the models
grow up as real ones do. The decoder, which both share, first learns the question alone, on text in which a name stands
where the clip will be. Then each tower learns to say, in the decoder's own embedding, what it hears or sees. Last,
tower and decoder learn the question together. Where they shall think, the student meanwhile reads on, of names that are
thought about before the answer, and the teacher then learns to do so of what it sees. All steps but the first use the
base split only. The checker (toy_checker.py) goes on from the student.
"""
from itertools import cycle
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from minixmd.config import PROMPT
from minixmd.inputs.examples import read_manifest
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.optim import learning_rate
from minixmd.models.weights import save_model
from minixmd.runs.files import write_safetensors, write_text
from minixmd.runs.seeds import hash_seed
from minixmd.toy.checker import teach_checker
from minixmd.toy.lessons import Form, batches, descend, lesson, lesson_loss, show
from minixmd.toy.models import make_model, write_processor
from minixmd.toy.world import KINDS, OPTIONS, THINK_PROMPT, draw_options, make_world

FAMILY = {"student": ("qwen2_audio", "audio"), "teacher": ("qwen2_vl", "video")}
NAMES = [kind.name for kind in KINDS]
# (options, prompts a step, most steps, mean loss over 20 steps that ends it, as a share of guessing's): with all
# options at once the decoder learns nothing, with two it soon does
LESSONS = ((2, 20, 600, 0.3), (4, 16, 800, 0.3), (7, 12, 600, 0.3), (OPTIONS, 12, 800, 0.1))
# then the learning rate fades to 0, and again, at most five times, while the loss at the end is above that
LAST, REPEATS = (OPTIONS, 12, 150, 0.02), 5
TEXT_LR, NAMING_LR, ASKING_LR = 1.5e-3, 1e-3, 1e-3
NAMING_STEPS, NAMING_BATCH = 400, 32
ASKING_BATCH, ASKING_MOST, ASKING_FADE = 24, 900, 150
# the rate fades once the loss over 40 steps is below this on the classes that a model's sense tells apart; on the
# others it goes on guessing for as long as it learns
ASKING_PASSED = 0.15
DIRECT = Form(PROMPT, "{letter}")
THOUGHT = "I hear {told}."
THINKING = Form(THINK_PROMPT, f"<think>{THOUGHT}</think><answer> {{name}}</answer>")
TRACED = 72  # clips of the train split that the teacher thinks about, 3 a class on the average
FALSE = 0.3  # share of the thoughts from which the teacher learns that name any of the options
READ = 6  # lessons of text, beside 24 of clips
TOLD_APART = {"student": ("both", "ear"), "teacher": ("both", "eye")}


def run(stage, folder, log):
    """Writes <split>.jsonl and their clips, language.safetensors (the decoder that has read), student/ and teacher/.

    Where they think, also checker/ and traced.jsonl, the first clips of the train split."""
    make_world(folder, stage.seed)
    if stage.thinking:
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        write_text(folder / "traced.jsonl", "".join(lines[:TRACED]))
    language = folder / "language.safetensors"
    if not language.exists():
        write_safetensors(language, teach_language(folder, stage.seed, log))
    for name in FAMILY:
        if not (folder / name / "config.json").exists():  # written last
            model, processor = new_model(folder / name, name, stage.seed)
            adopt(model, load_file(language))
            teach_tower(model, processor, folder, name, stage, log)
            save_model(model, processor.folder, folder / name)
    if stage.thinking and not (folder / "checker" / "config.json").exists():
        teach_checker(folder, stage.seed, THOUGHT, log)


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


# ---- the steps ----


def teach_language(folder, seed, log):
    """Step 1, text only. Returns the decoder's parameters, of the embedding and the head the families' common rows."""
    model, processor = new_model(folder / "student", "student", seed)
    rng = np.random.default_rng([seed, 1])
    optimizer = torch.optim.AdamW(decoder_parameters(model).values(), betas=(0.9, 0.98), weight_decay=0.0)
    step = 0
    with tqdm(desc="toy: language", unit="step") as bar:
        for number, (count, size, most, passed) in enumerate((*LESSONS, *[LAST] * REPEATS)):
            recent, fades = [], number >= len(LESSONS)
            for i in range(most):
                lessons = [text_lesson(processor, rng, count, 12 if i % 2 else 6, DIRECT) for _ in range(size)]
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


def text_lesson(processor, rng, count, times, form):
    """A lesson of `count` options in which the right one's name stands `times` times where the clip will be."""
    options = rng.choice(NAMES, count, replace=False).tolist()
    right = int(rng.integers(count))
    letters = [ascii_uppercase[j] for j in sorted(rng.choice(OPTIONS, count, replace=False))]
    before = processor.encode(f"<|im_start|>system\n{processor.family.system}<|im_end|>\n<|im_start|>user\n")
    heard = processor.encode(" " + options[right]) * times
    return lesson(processor, before + heard, (), right, options, letters, form)


def teach_tower(model, processor, folder, name, stage, log):
    """Steps 2 to 4 of a model, on the base split."""
    media = FAMILY[name][1]
    examples = read_manifest(folder / "base.jsonl")
    shown = show(processor, examples, name, media)
    rng = np.random.default_rng([stage.seed, 2])
    teach_naming(model, processor, shown, examples, name, rng, log)
    teach_asking(model, processor, shown, examples, name, rng, log, (DIRECT,),
                 read=READ if stage.thinking and name == "student" else 0)
    if stage.thinking and name == "teacher":
        teach_asking(model, processor, shown, examples, name, rng, log, (DIRECT, THINKING))


def teach_naming(model, processor, shown, examples, name, rng, log):
    """Step 2: the mean of a clip's tokens should point at the embedding of its class's name, which does not move."""
    seen = sorted({example.label for example in examples})
    right_B = torch.tensor([seen.index(example.label) for example in examples])
    ids = torch.tensor([processor.encode(" " + label)[0] for label in seen])
    names_BD = model.token_embeddings(ids).detach()
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


def teach_asking(model, processor, shown, examples, name, rng, log, forms, read=0):
    """Steps 3 and 4: all of the model learns the question, with new options at every turn, in several forms by turns.
    What is passed is the last form. read: lessons of text a step, of thoughts."""
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
                name_told = rng.choice(options) if form == THINKING and rng.random() < FALSE else None
                lessons.append(lesson(processor, shown[i][0], [shown[i][1]], right, options, ascii_uppercase[:OPTIONS],
                                      form, name_told))
            lessons += [text_lesson(processor, rng, OPTIONS, 25, THINKING) for _ in range(read)]
            loss, answers = lesson_loss(model, lessons)
            descend(optimizer, loss, ASKING_LR * min(1.0, (step + 1) / 40) * (1 - faded / ASKING_FADE))
            answers = answers[:len(chosen)]
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
