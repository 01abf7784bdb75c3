"""Putting a manifest's multiple-choice questions to a model: by the letters' logits, or by what the model writes.

A clip that cannot be used never stops a run and never vanishes: it becomes a record with the reason, and a stage fails
only when more than its `max_bad` share are bad.
"""
from dataclasses import dataclass
from functools import partial

import torch

from minixmd.config import GRPO
from minixmd.inputs.batch import pack
from minixmd.inputs.prompts import batch_by_tokens, build_prompt, check_length, prefetch
from minixmd.learning.rollout import decode, uniforms
from minixmd.runs.records import bad_record, count_bad
from minixmd.tasks.answers import parse_answer
from minixmd.tasks.benchmarks import vote
from minixmd.tasks.statistics import tabulate

BATCH_TOKENS = 8192  # packed into a forward pass
SAMPLED_TOKENS = 4  # times batch_tokens: tokens of the answers sampled at once; by default 64 answers of 512 tokens


@dataclass(frozen=True)
class Writing:
    """How answers are written and read."""

    max_new_tokens: int  # of an answer, the end of turn included
    num_samples: int = 1  # answers of a question, of which the most frequent counts
    temperature: float = 0.0  # 0 = greedy
    stop: tuple[str, ...] = ()  # strings that end an answer, as in generate
    rule: str = "option"  # "option" | "mmau", by which answers are read (tasks/benchmarks.py)
    seed: int = 0  # a sampled token depends on (seed, the example's id, the sample's number, the position) alone

    def decode_slots(self, batch_tokens):
        """Answers decoded at once: those of a whole batch where they are greedy (None), else as many as fit."""
        if not self.temperature:
            return None
        return max(self.num_samples, SAMPLED_TOKENS * batch_tokens // self.max_new_tokens)


class _Asked:
    """The records of some examples while they are computed, and the Prompts of those that can be used."""

    def __init__(self, processor, examples, prompt_format, traces, max_new_tokens):
        self.processor, self.examples, self.prompt_format = processor, examples, prompt_format
        self.traces, self.max_new_tokens = traces or {}, max_new_tokens
        self.records = {}

    def prompts(self):
        """(Example, Prompt) of every usable example; the others get their records."""
        built = prefetch(self._build, self.examples, self._on_bad)
        for pair in built:
            if pair is not None:
                example, prompt = pair
                check_length(self.processor, example, prompt, self.max_new_tokens)
                yield pair

    def _build(self, example):
        return example, build_prompt(self.processor, example, self.prompt_format,
                                     trace=self.traces.get(example.id, ""))

    def _on_bad(self, example, error):
        self.records[example.id] = bad_record(example.id, error)

    def read_letters(self, example, logits_V):
        """Makes an example's record from the logits (on the CPU) where its answer would start."""
        letters = logits_V[self.processor.letter_ids(len(example.options))]
        if not letters.isfinite().all():
            raise ValueError(f"the logits of example {example.id!r} are not finite: the model's weights are broken, or "
                             "too large for its dtype")
        best = int(letters.argmax())
        self.records[example.id] = {"id": example.id, "answer": best, "option": example.options[best],
                                    "logits": [round(x, 4) for x in letters.tolist()]}

    def in_order(self):
        return [self.records[example.id] for example in self.examples]


@torch.inference_mode()
def score_letters(model, processor, examples, prompt_format, *, batch_tokens=BATCH_TOKENS, traces=None, top_k=0,
                  top_temperature=1.0):
    """Reads the letters' logits where the answer would start, in one forward pass a batch.

    Args:
        prompt_format: config.PromptFormat.
        batch_tokens: packed into a forward pass.
        traces: {id: text for the prompt's {trace}}; an id that is not there has an empty one. None = no ids.
        top_k: best ids to keep of those that are not suppressed, with the logsumexp of all of them at
            `top_temperature`.
    Returns:
        A JSON-able record an example, in order: {"id", "answer": index, "option", "logits"} or {"id", "bad", "detail"};
        with top_k also "top": {"ids", "logits", "temperature", "logsumexp"}.
    Raises:
        ValueError: an example that lacks the medium, a prompt over the model's limit, or logits that are not finite.
    """
    asked = _Asked(processor, examples, prompt_format, traces, max_new_tokens=0)
    suppressed = torch.tensor(processor.suppressed_ids if top_k else [], dtype=torch.long)
    for pairs in batch_by_tokens(asked.prompts(), batch_tokens):
        batch = pack([prompt for _, prompt in pairs]).to(model.device)
        last_B = torch.tensor([end - 1 for _, end in batch.spans], device=model.device)
        logits_BV = model.logits(model(batch)[last_B]).cpu()
        for (example, _), logits_V in zip(pairs, logits_BV, strict=True):
            asked.read_letters(example, logits_V)
            if top_k:
                asked.records[example.id]["top"] = _topk(logits_V, suppressed, top_k, top_temperature)
    return asked.in_order()


def _topk(logits_V, suppressed, top_k, temperature):
    """The teacher's best ids as labels.jsonl stores them."""
    logits_V = logits_V.index_fill(0, suppressed, -torch.inf)
    top = logits_V.topk(top_k)
    return {"ids": top.indices.tolist(), "logits": [round(x, 4) for x in top.values.tolist()],
            "temperature": temperature, "logsumexp": round((logits_V / temperature).logsumexp(0).item(), 5)}


@torch.inference_mode()
def write_answers(model, processor, examples, prompt_format, writing, *, batch_tokens=BATCH_TOKENS, traces=None):
    """Lets the model write its answers, and reads which option each means (tasks/benchmarks.py).

    Args: as score_letters, and writing: Writing.
    Returns:
        A record an example as score_letters gives it, where "answer" and "option" may be None, and with "by_letters":
        index by the logits, "how": one of benchmarks.WAYS, "text", and "finished": the model ended its turn or wrote a
        stop. With num_samples > 1 those are the sample's that speaks for all, beside "votes": {option: count} and all
        "texts".
    Raises:
        ValueError: as score_letters.
    """
    asked = _Asked(processor, examples, prompt_format, traces, writing.max_new_tokens)
    n = writing.num_samples
    for pairs in batch_by_tokens(asked.prompts(), batch_tokens):
        uniform_BT = None
        if writing.temperature:
            uniform_BT = torch.stack([uniforms(writing.seed, 0, example.id, i, writing.max_new_tokens)
                                      for example, _ in pairs for i in range(n)])
        completions = decode(model, processor, [prompt for _, prompt in pairs], uniform_BT, num_samples=n,
                             max_new_tokens=writing.max_new_tokens, temperature=writing.temperature, stop=writing.stop,
                             suppressed_ids=processor.suppressed_ids, decode_slots=writing.decode_slots(batch_tokens),
                             on_prompts=partial(_read_first_logits, asked, iter(pairs)))
        for i, (example, _) in enumerate(pairs):
            group = completions[n * i:n * (i + 1)]
            texts = [completion.text for completion in group]
            chosen, index, how, votes = vote(texts, example.options, writing.rule)
            record = asked.records[example.id]
            record.update(by_letters=record["answer"], answer=index, how=how, text=texts[chosen],
                          option=None if index is None else example.options[index], finished=group[chosen].finished)
            if n > 1:
                record.update(votes=votes, texts=texts)
    return asked.in_order()


def _read_first_logits(asked, pairs, logits_GV):
    """Reads the letters' logits of the next G of the pairs, which were just prefilled."""
    for logits_V in logits_GV.cpu():
        example, _ = next(pairs)
        asked.read_letters(example, logits_V)


def validation_accuracy(model, processor, examples, stage):
    """(accuracy, {reason: number of bad clips}) on a training stage's validation examples.

    By letters, or in GRPO and with traces by greedily written answers, read as strictly as the reward reads them.
    """
    prompt_format = stage.prompt_format
    if isinstance(stage, GRPO) or getattr(stage, "traces", None):
        writing = Writing(stage.max_new_tokens, stop=getattr(stage, "stop", ()))
        records = write_answers(model, processor, examples, prompt_format, writing)
        for example, record in zip(examples, records, strict=True):
            if "bad" not in record:
                record["answer"] = parse_answer(record["text"], example.options)
    else:
        records = score_letters(model, processor, examples, prompt_format)
    bad = count_bad(records, stage.name, stage.max_bad)
    return tabulate(examples, records)["accuracy"], bad
