"""The lessons of the toy models: prompts made of pieces, so that a clip can be asked about with new options every time.
"""
from dataclasses import dataclass
from itertools import accumulate
from string import ascii_uppercase

import torch
from tqdm import tqdm

from minixmd.inputs.batch import Prompt, pack
from minixmd.inputs.examples import build_conversation
from minixmd.inputs.positions import grid_offsets, positions_of
from minixmd.models.head import CrossEntropy
from minixmd.toy.world import OPTIONS, QUESTION

PIXELS = dict(min_pixels=3_136, max_pixels=3_136)  # of a frame, which has 56 x 56
HINT = 0.3  # weight of the hint, see `lesson`


@dataclass(frozen=True)
class Form:
    """How a lesson asks, over {first} and {last} after the options, and answers: {letter} or " {name}" of the right
    option, a token each; {told} before it is a name too."""

    prompt: str
    answer: str



def lesson(processor, before_N, media, right, options, letters, form, told=None):
    """A Prompt that ends with its answer, and a hint for the decoder.

    The hint: the row of every option's name predicts its letter if it is the right one, and what follows anyway if not.
    Without it the last row alone has to find out what options are, and does not (bench/LOG.md).

    Args:
        before_N: ids up to the question. media: the clips in them. right: index into options. letters: of the options.
        form: how it is asked and answered. told: None = the right name.
    Returns:
        (Prompt, [(row, id to predict), ...], the place of letter or name among the answer's tokens, from the end).
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
    place = "{letter}" if "{letter}" in form.answer else " {name}"
    before, _, after = form.answer.partition(place)
    after = [*processor.encode(after), processor.end_id]
    said = before.format(told=told or options[right]) + place.format(letter=letters[right], name=options[right])
    ids += processor.encode(said) + after
    return lesson_prompt(ids, asked, media), hints, len(after) + 1


def lesson_loss(model, lessons):
    """(mean loss of a batch of lessons, answer and hints; the loss of each one's letter or name, floats)"""
    batch = pack([prompt for prompt, *_ in lessons])
    hints = torch.tensor([(start + row, token) for (start, _), (_, pairs, _) in zip(batch.spans, lessons, strict=True)
                          for row, token in pairs])
    ends = accumulate(int(prompt.target_N.sum()) for prompt, *_ in lessons)
    letters = [end - back for end, (*_, back) in zip(ends, lessons, strict=True)]
    row_T = torch.cat([batch.target_row_T, hints[:, 0]])
    objective = CrossEntropy(torch.cat([batch.target_id_T, hints[:, 1]]),
                             torch.cat([batch.target_weight_T, torch.full((len(hints),), HINT)]), "torch")
    loss, columns = model.head_loss(model(batch), row_T, objective)
    return loss / len(lessons), columns["nll"][letters].tolist()


def descend(optimizer, loss, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def lesson_prompt(ids, asked, media):
    """The Prompt of a lesson whose answer starts at row `asked`."""
    blocks = [(int(m.rows_P[0]), grid_offsets(m.grid_thw)) for m in media if m.grid_thw]
    return Prompt(torch.tensor(ids), positions_of(len(ids), blocks), tuple(media), torch.arange(len(ids)) >= asked)


def show(processor, examples, name, media):
    """[(ids up to the question, the clip)] of examples."""
    shown, question = [], len(processor.encode(QUESTION + "<|im_end|>\n<|im_start|>assistant\n"))
    for example in tqdm(examples, desc=f"toy: {name} reads", unit="clip"):
        prompt = processor(build_conversation(example, media=media, prompt=QUESTION,
                                              video_options=PIXELS if media == "video" else None))
        shown.append((prompt.ids_N[:-question].tolist(), prompt.media[0]))
    return shown


def batches(count, size, rng):
    """Endless index lists, one permutation after the other."""
    order = []
    while True:
        while len(order) < size:
            order += rng.permutation(count).tolist()
        yield order[:size]
        order = order[size:]
