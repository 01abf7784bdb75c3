"""Training sequences of the toy models. A clip is read once: its context, a Prompt up to the question."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minixmd.config import PROMPT
from minixmd.config.prompts import PromptFormat
from minixmd.inputs.batch import Prompt, pack
from minixmd.inputs.prompts import build_prompt
from minixmd.models.head import CrossEntropy
from minixmd.toy.world import ADJECTIVES, LETTERS, NOUNS, QUESTION, SIDE, THINK_PROMPT

HINT_WEIGHT = 0.3  # of the auxiliary targets, see Lesson
TURN_END = "<|im_end|>\n<|im_start|>assistant\n"
WORDS = [line["noun"] for line in NOUNS] + [line["adjective"] for line in ADJECTIVES]


@dataclass(frozen=True)
class QAFormat:
    prompt: str  # format string, as in Evaluate
    thoughts: str | None = None  # Toy's; None = the answer is a letter, else thoughts and a name


DIRECT = QAFormat(PROMPT)
THINKING = {thoughts: QAFormat(THINK_PROMPT, thoughts) for thoughts in ("short", "long")}


def thoughts_of(name, thoughts):
    """The chain of thought that a clip is of the category `name`. thoughts: "short" | "long", word by word."""
    if thoughts == "short":
        return f"I hear {name}."
    checks = [f"{word}: {'yes' if word in name.split() else 'no'}" for word in WORDS]
    return f"I listen for {', '.join(checks)}. I hear {name}."


@dataclass(frozen=True)
class Lesson:
    """A prompt whose target is the answer, and "hints": the row of every option's adjective and that of its noun
    predict the option's letter if the name is right so far, else the next token. Without them no model learns what
    options are for (bench/LOG.md)."""
    prompt: Prompt
    hints: dict[int, int]  # row -> id that it predicts
    choice_offset: int  # of the letter, or the name's first word, among the answer's tokens, counted from their end


def make_lesson(processor, context, options, right, letters, qa_format, thought=None):
    """right: index of the right one of the options. thought: name in the chain of thought; None = the right one."""
    text = qa_format.prompt.format(
        question=QUESTION,
        options="\n".join(map("{}. {}".format, letters, options)),
        first=LETTERS[0],
        last=LETTERS[-1],
    )
    name, choice = options[right], letters[right]
    answer = choice
    if qa_format.thoughts:
        choice = f" {name}</answer>"
        answer = f"<think>{thoughts_of(thought or name, qa_format.thoughts)}</think><answer>{choice}"
    prompt = answer_prompt(processor, context, text, answer)
    ids, hints = prompt.ids_N.tolist(), {}
    row = len(context) + len(processor.encode(QUESTION + "\n"))
    for option in options:  # a line's tokens: letter, dot, adjective, noun, newline
        hints[row + 2] = ids[row if option.split()[0] == name.split()[0] else row + 3]
        hints[row + 3] = ids[row if option == name else row + 4]
        row += 5
    return Lesson(prompt, hints, len(processor.encode(choice)) + 1)


def answer_prompt(processor, context, text, answer):
    """A Prompt of a context, the text that asks about it and an assistant turn, its target."""
    asked = processor.encode(text + TURN_END)
    added_N = torch.tensor([*asked, *processor.encode(answer), processor.end_id])
    positions_N = context.positions_3N.max() + 1 + torch.arange(len(added_N))
    ids_N = torch.cat([context.ids_N, added_N])
    positions_3N = torch.cat([context.positions_3N, positions_N.expand(3, -1)], 1)
    target_N = torch.arange(len(ids_N)) >= len(context) + len(asked)
    return Prompt(ids_N, positions_3N, context.media, target_N)


def lesson_loss(model, lessons):
    """(mean over B lessons of the summed loss of answer and hints, loss of the choice alone as an array (B,))"""
    batch = pack([lesson.prompt for lesson in lessons])
    hint_rows, hint_ids = [], []
    for lesson, (first_row, _) in zip(lessons, batch.spans, strict=True):
        hint_rows += [first_row + row for row in lesson.hints]
        hint_ids += lesson.hints.values()
    row_T = torch.cat([batch.target_row_T, torch.tensor(hint_rows)])
    id_T = torch.cat([batch.target_id_T, torch.tensor(hint_ids)])
    weight_T = F.pad(batch.target_weight_T, (0, len(hint_ids)), value=HINT_WEIGHT)
    row_loss = CrossEntropy(id_T, weight_T, "torch")
    loss, columns = model.head_loss(model(batch), row_T, row_loss)
    end_B = batch.target_segment_T.bincount().cumsum(0)  # where a lesson's targets end
    choice_B = end_B - torch.tensor([lesson.choice_offset for lesson in lessons])
    return loss / len(lessons), columns["nll"][choice_B].double().numpy()


def cut_context(processor, prompt):
    """A Prompt of a user turn, without the turn's end."""
    length = len(prompt) - len(processor.encode(TURN_END))
    return Prompt(prompt.ids_N[:length], prompt.positions_3N[:, :length], prompt.media)


def read_contexts(processor, examples, media):
    prompt_format = PromptFormat(media, "", {"min_pixels": SIDE * SIDE, "max_pixels": SIDE * SIDE})
    contexts = []
    for example in tqdm(examples, desc=f"toy: reading {media}", unit="clip"):
        contexts.append(cut_context(processor, build_prompt(processor, example, prompt_format)))
    return contexts


def batches(count, size, rng):
    """Endless lists of `size` indices below `count`, from one permutation after the other."""
    order = []
    while True:
        while len(order) < size:
            order += rng.permutation(count).tolist()
        yield order[:size]
        order = order[size:]


class Fit:
    def __init__(self, title, parameters, weight_decay=0.05):
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=weight_decay)
        self.bar = tqdm(desc=f"toy: {title}", unit="step")
        self.losses = []

    def step(self, loss, lr, logged_loss):
        """One update. logged_loss: kept in `losses` and shown."""
        [group] = self.optimizer.param_groups
        group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self.losses.append(logged_loss)
        self.bar.set_postfix_str(f"loss {logged_loss:.3f}", refresh=False)
        self.bar.update()

    def last_loss(self):
        """The mean of the last 20 steps."""
        return float(np.mean(self.losses[-20:]))
