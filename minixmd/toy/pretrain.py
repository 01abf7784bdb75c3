"""Stage Toy: makes the world (world.py) and trains the two models that start out in it, from random weights.

Trained on clips alone a decoder does not learn what the options are for. So training is a curriculum, whose phases 2 to
4 use the base split only:

1. text QA: the decoder, which both models share, learns the question on text, first with two options, then with ten;
   the category's name in capitals ("Low Bell"), repeated, stands in for the clip
2. tower alignment: each encoder learns to map a clip to the decoder's embeddings of its category's capitalised words
3. joint QA: encoder and decoder learn the question on clips
4. chain of thought, with stage.thinking: the teacher's; the student meets such text, without a clip, in phase 3"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minixmd.inputs.examples import read_manifest
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.optim import learning_rate
from minixmd.models.multimodal import DECODER
from minixmd.models.weights import save_model
from minixmd.runs.files import write_safetensors, write_text
from minixmd.runs.seeds import hash_seed
from minixmd.toy.checker import train_checker
from minixmd.toy.lessons import DIRECT, THINKING, Fit, batches, cut_context, lesson_loss, make_lesson, read_contexts
from minixmd.toy.models import make_model, write_processor
from minixmd.toy.world import LETTERS, NAMES, OPTIONS, draw_options, make_world

MODEL_TYPE = {"student": "qwen2_audio", "teacher": "qwen2_vl"}
MEDIA = {"student": "audio", "teacher": "video"}
SEPARABLE = {"student": ("both", "ear"), "teacher": ("both", "eye")}  # groups that the model's modality tells apart
NUM_TRACED = 144  # clips of the train split that the teacher thinks about, on average 6 a category


@dataclass(frozen=True)
class Level:
    """A level of text QA. It ends when the mean loss of the last 20 steps falls below the target, or at max_steps."""
    num_options: int
    batch_size: int
    max_steps: int
    target_loss: float  # as a share of chance's, log(num_options)
    decay: bool = False  # the learning rate falls to 0 over max_steps, whatever the loss


# with all options at once the decoder learns nothing, with two it soon does
LEVELS = (
    Level(2, 20, 600, 0.35),
    Level(OPTIONS, 12, 600, 0.12),
)
LAST_LEVEL = Level(OPTIONS, 12, 100, 0.1, decay=True)
MAX_REPEATS = 5  # of the last level, until it ends below its target
TEXT_LR = 1e-3
ALIGN_STEPS = 200
ALIGN_BATCH = 16
ALIGN_LR = 1e-3
QA_BATCH = 16
QA_MAX_STEPS = 900  # before the learning rate decays
QA_DECAY_STEPS = 60
QA_LR = 1e-3
QA_TARGET_LOSS = 0.3  # on SEPARABLE groups; on the others the loss stays high for as long as it trains
TEXT_PER_STEP = 4  # chain-of-thought lessons of text beside the student's QA_BATCH of clips
FALSE_SHARE = 0.3  # of the teacher's thoughts, which name a random option


def run(stage, folder, log):
    """Writes <split>.jsonl and their clips, language.safetensors (the decoder after text QA), student/ and teacher/;
    with stage.thinking also checker/ and traced.jsonl, the first clips of the train split."""
    make_world(folder, stage.seed)
    if stage.thinking:
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        write_text(folder / "traced.jsonl", "".join(lines[:NUM_TRACED]))
    language = folder / "language.safetensors"
    if not language.exists():
        write_safetensors(language, train_text_qa(folder, stage.seed, log))
    for name, model_type in MODEL_TYPE.items():
        if not (folder / name / "config.json").exists():  # written last
            model, processor = new_model(folder / name, model_type, stage.seed)
            load_decoder(model, load_file(language))
            training = ClipTraining(name, model, processor, folder, stage, log)
            training.align_tower()
            text_per_step = TEXT_PER_STEP if stage.thinking and name == "student" else 0
            training.learn_qa("joint QA", [DIRECT], text_per_step)
            if stage.thinking and name == "teacher":
                training.learn_qa("chain of thought", [DIRECT, THINKING[stage.thoughts]])
            save_model(model, processor.folder, folder / name)
    if stage.thinking and not (folder / "checker" / "config.json").exists():
        train_checker(folder, stage.seed, stage.thoughts, log)


def new_model(folder, model_type, seed):
    write_processor(folder, model_type)
    model = make_model(folder, model_type, hash_seed(seed, "weights"))
    model.set_trainable("full")
    return model, Processor(folder, model.config)


@torch.no_grad()
def load_decoder(model, language):
    """Loads the decoder of train_text_qa; of embedding and head only the rows that both families share."""
    for name, rows in language.items():
        model.get_parameter(name)[:len(rows)] = rows


def train_text_qa(folder, seed, log):
    """Phase 1. Returns the decoder's parameters; of embedding and head, the rows of ids that both families share."""
    model, processor = new_model(folder / "student", MODEL_TYPE["student"], seed)
    rng = np.random.default_rng([seed, 1])
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(DECODER)}
    fit = Fit("text QA, loss as a share of chance's", parameters.values(), weight_decay=0.0)
    for level in LEVELS + (LAST_LEVEL,) * MAX_REPEATS:
        chance = np.log(level.num_options)
        for i in range(level.max_steps):
            repeats = 6 if i % 2 else 3
            lessons = []
            for _ in range(level.batch_size):
                lessons.append(text_lesson(processor, rng, level.num_options, repeats, DIRECT))
            loss, choice_losses = lesson_loss(model, lessons)
            lr = TEXT_LR * min(1.0, (len(fit.losses) + 1) / 30)
            if level.decay:
                lr *= 1 - i / level.max_steps
            fit.step(loss, lr, choice_losses.mean() / chance)
            reached = fit.last_loss() < level.target_loss
            if reached and i + 1 >= 20 and not level.decay:
                break
        log({
            "phase": "text QA",
            "options": level.num_options,
            "step": len(fit.losses),
            "loss": fit.last_loss() * chance,
        })
        if level.decay and reached:
            break
    return {name: p[:processor.end_id + 1] for name, p in parameters.items()}  # all others have fewer rows


def text_lesson(processor, rng, num_options, repeats, qa_format):
    """A lesson in which the right option's name in capitals, repeated `repeats` times, stands in for the clip: written
    as in the options, the words of earlier options would be taken for it."""
    options = rng.choice(NAMES, num_options, replace=False)
    right = rng.integers(num_options)
    letters = sorted(rng.choice(list(LETTERS), num_options, replace=False))
    prompt = processor([{"role": "user", "content": f" {options[right].title()}" * repeats}])
    return make_lesson(processor, cut_context(processor, prompt), options, right, letters, qa_format)


class ClipTraining:
    """Phases 2 to 4 of one model."""

    def __init__(self, name, model, processor, folder, stage, log):
        self.name = name
        self.model = model
        self.processor = processor
        self.log = log
        examples = read_manifest(folder / "base.jsonl")
        self.contexts = read_contexts(processor, examples, MEDIA[name])
        self.labels = [example.label for example in examples]
        self.separable = [example.meta["group"] in SEPARABLE[name] for example in examples]
        self.names = sorted(set(self.labels))
        self.thoughts = stage.thoughts
        self.rng = np.random.default_rng([stage.seed, 2])

    def align_tower(self):
        """Phase 2, a classification: each token of a clip should match the frozen embeddings of its name's words."""
        right_B = torch.tensor(list(map(self.names.index, self.labels)))
        word_ids = torch.tensor(self.processor.encode(" " + " ".join(self.names).title()))  # two a name
        names_CD = self.model.token_embeddings(word_ids).detach().unflatten(0, (-1, 2)).sum(1)
        scale = 4 / names_CD.shape[1] ** 0.5
        fit = Fit(f"{self.name}, tower alignment", self.model.parameters())  # the decoder gets no gradient
        indices = batches(len(self.labels), ALIGN_BATCH, self.rng)
        for step in range(ALIGN_STEPS):
            chosen = next(indices)
            clips = [self.contexts[i].media[0] for i in chosen]
            tokens_PD = self.model.encode(clips[0].kind, clips)
            num_tokens = len(tokens_PD) // len(clips)  # all clips are equally long
            loss = F.cross_entropy(tokens_PD @ names_CD.T * scale, right_B[chosen].repeat_interleave(num_tokens))
            lr = learning_rate(step, ALIGN_STEPS, ALIGN_LR, warmup_ratio=0.1)
            fit.step(loss, lr, loss.item())
        self.log({"phase": "tower alignment", "model": self.name, "loss": fit.last_loss()})

    def learn_qa(self, phase, formats, text_per_step=0):
        """Phases 3 and 4: trains the whole model on the question until the loss of separable clips, in the last format,
        is on target and the learning rate has then decayed to 0. text_per_step: lessons of text, all with thoughts."""
        fit = Fit(f"{self.name}, {phase}", self.model.parameters())
        formats = formats * (QA_BATCH // len(formats))
        separable_losses, decay_steps = [], 0
        for step, chosen in enumerate(batches(len(self.labels), QA_BATCH, self.rng), 1):
            lessons = list(map(self.clip_lesson, chosen, formats))
            for _ in range(text_per_step):
                lessons.append(text_lesson(self.processor, self.rng, OPTIONS, 12, THINKING[self.thoughts]))
            loss, choice_losses = lesson_loss(self.model, lessons)
            lr = QA_LR * min(1.0, step / 40) * (1 - decay_steps / QA_DECAY_STEPS)
            fit.step(loss, lr, choice_losses[:QA_BATCH].mean())
            judged = [n for n, i in enumerate(chosen) if self.separable[i] and formats[n] == formats[-1]]
            if judged:
                separable_losses.append(choice_losses[judged].mean())
            on_target = step > 40 and np.mean(separable_losses[-40:]) < QA_TARGET_LOSS
            if decay_steps or on_target or step >= QA_MAX_STEPS:
                decay_steps += 1
            if decay_steps == QA_DECAY_STEPS:
                break
        self.log({
            "phase": phase,
            "model": self.name,
            "steps": step,
            "loss": fit.last_loss(),
            "separable_loss": np.mean(separable_losses[-20:]),
        })

    def clip_lesson(self, i, qa_format):
        """A lesson about clip i. Of those with a chain of thought the share FALSE_SHARE names a random option in it."""
        options, right = draw_options(self.labels[i], self.names, self.rng)
        thought = None
        if qa_format.thoughts and self.rng.random() < FALSE_SHARE:
            thought = self.rng.choice(options)
        return make_lesson(self.processor, self.contexts[i], options, right, LETTERS, qa_format, thought)
