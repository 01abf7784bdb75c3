"""Puts a manifest's multiple-choice questions to a model: by the letters' logits, or by what the model writes. A clip
that cannot be used becomes a record with the reason."""
from dataclasses import dataclass, field
from functools import partial

import torch

from minixmd import load
from minixmd.config import GRPO
from minixmd.config.prompts import PromptFormat
from minixmd.inputs.batch import pack
from minixmd.inputs.examples import Example
from minixmd.inputs.prompts import batch_by_tokens, build_prompt, prefetch
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.rollout import decode, uniforms
from minixmd.runs.device import runtime_of
from minixmd.runs.distributed import gather, rank_and_world_size
from minixmd.runs.heartbeat import beat
from minixmd.runs.records import bad_record, count_bad
from minixmd.tasks.answers import parse_answer
from minixmd.tasks.benchmarks import vote
from minixmd.tasks.statistics import tabulate

BATCH_TOKENS = 8192  # packed into a forward pass
SAMPLED_TO_PACKED = 4  # tokens of the answers sampled at once, in batch_tokens; by default 64 answers of 512 tokens


@dataclass(frozen=True)
class Writing:
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
        return max(self.num_samples, SAMPLED_TO_PACKED * batch_tokens // self.max_new_tokens)


def load_model(stage):
    """(MultimodalLM, Processor) of a stage, where and as it says."""
    sharded = getattr(stage, "sharded", False) and rank_and_world_size()[1] > 1
    return load(stage.model, **runtime_of(stage), sharded=sharded)


@dataclass
class Questions:
    """Examples whose questions are put to a model: the Prompts of those that can be used, and a record of each."""
    processor: Processor
    examples: list[Example]
    prompt_format: PromptFormat
    max_new_tokens: int = 0  # room that each prompt leaves for an answer; 0 = none is written
    traces: dict = field(default_factory=dict)  # {id: text for the prompt's {trace}}; empty for an id that is not there
    records: dict = field(default_factory=dict)  # {id: record}, filled while the examples are computed

    def prompts(self):
        """Yields (Example, Prompt) of every usable example; the others get bad records."""
        built = prefetch(self._build, self.examples, bad_record, reading=self.prompt_format.reading)
        for example, prompt in zip(self.examples, built, strict=True):
            if isinstance(prompt, dict):
                self.records[example.id] = prompt
                continue
            yield example, prompt

    def _build(self, example, load):
        trace = self.traces.get(example.id, "")
        return build_prompt(self.processor, example, self.prompt_format, None, trace, load, self.max_new_tokens)

    def read_letters(self, example, logits_V):
        """Makes an example's record from the logits (on the CPU) where its answer would start."""
        letters = logits_V[self.processor.letter_ids(len(example.options))]
        if not letters.isfinite().all():
            raise ValueError(f"the logits of example {example.id!r} are not finite: the weights of "
                             f"{self.processor.folder} are broken, or too large for the dtype they were loaded as")
        best = int(letters.argmax())
        logits = [round(logit, 4) for logit in letters.tolist()]
        self.records[example.id] = {"id": example.id, "answer": best, "option": example.options[best], "logits": logits}

    def in_order(self):
        return [self.records[example.id] for example in self.examples]


def next_token_logits(model, prompts):
    """Logits of the first token after each Prompt, from one packed forward pass: (B, V) on the CPU."""
    beat()
    batch = pack(prompts).to(model.device)
    last_B = torch.tensor([end - 1 for _, end in batch.spans], device=model.device)
    return model.logits(model(batch)[last_B]).cpu()


@torch.inference_mode()
def score_letters(model, processor, examples, prompt_format, *, batch_tokens=BATCH_TOKENS, traces=None, top_k=0,
                  top_temperature=1.0):
    """Reads the letters' logits where the answer would start, in one forward pass a batch. prompt_format, traces: as in
    Questions. top_k: best ids to keep that are not suppressed, with the logsumexp of all such at `top_temperature`.

    Returns a JSON-able record an example, in order: {"id", "answer": index, "option", "logits"} or {"id", "bad",
    "detail"}; with top_k also "top": {"ids", "logits", "temperature", "logsumexp"}. Raises ValueError for an example
    that lacks the medium, a prompt over the limit, or logits that are not finite."""
    questions = Questions(processor, examples, prompt_format, traces=traces or {})
    suppressed = torch.tensor(processor.suppressed_ids, dtype=torch.long)
    for pairs in batch_by_tokens(questions.prompts(), batch_tokens):
        logits_BV = next_token_logits(model, [prompt for _, prompt in pairs])
        for (example, _), logits_V in zip(pairs, logits_BV, strict=True):
            questions.read_letters(example, logits_V)
            if top_k:
                allowed_V = logits_V.index_fill(0, suppressed, -torch.inf)
                logits_K, ids_K = allowed_V.topk(top_k)
                logsumexp = (allowed_V / top_temperature).logsumexp(0).item()
                questions.records[example.id]["top"] = {
                    "ids": ids_K.tolist(), "logits": [round(logit, 4) for logit in logits_K.tolist()],
                    "temperature": top_temperature, "logsumexp": round(logsumexp, 5)}
    return questions.in_order()


@torch.inference_mode()
def write_answers(model, processor, examples, prompt_format, writing, *, batch_tokens=BATCH_TOKENS, traces=None):
    """Lets the model write its answers, and reads which option each means. Returns and raises as score_letters, where
    "answer" and "option" may be None, with "by_letters": index by the logits, "how": one of benchmarks.WAYS, "text",
    and "finished": the model ended its turn or wrote a stop. With num_samples > 1 those are of the sample that was
    chosen by vote, beside "votes": {option: count} and all "texts"."""
    questions = Questions(processor, examples, prompt_format, writing.max_new_tokens, traces or {})
    n, letters = writing.num_samples, prompt_format.asks_for_letter
    for pairs in batch_by_tokens(questions.prompts(), batch_tokens):
        uniform = []
        for example, _ in pairs:
            uniform += [uniforms(writing.seed, 0, example.id, i, writing.max_new_tokens) for i in range(n)]
        completions = decode(model, processor, [prompt for _, prompt in pairs], torch.stack(uniform), num_samples=n,
                             max_new_tokens=writing.max_new_tokens, temperature=writing.temperature, stop=writing.stop,
                             decode_slots=writing.decode_slots(batch_tokens),
                             on_prompts=partial(_read_first_logits, questions, iter(pairs)))
        for i, (example, _) in enumerate(pairs):
            own = completions[n * i:n * (i + 1)]
            texts = [completion.text for completion in own]
            chosen, index, how, votes = vote(texts, example.options, writing.rule, letters)
            option = None if index is None else example.options[index]
            record = questions.records[example.id]
            record.update(by_letters=record["answer"], answer=index, how=how, text=texts[chosen], option=option,
                          finished=own[chosen].finished)
            if n > 1:
                record.update(votes=votes, texts=texts)
    return questions.in_order()


def _read_first_logits(questions, pairs, logits_GV):
    """Reads the letters' logits of the next G of the pairs, which were just prefilled."""
    for logits_V in logits_GV.cpu():
        example, _ = next(pairs)
        questions.read_letters(example, logits_V)


def validation_accuracy(model, processor, examples, stage):
    """(accuracy, {reason: number of bad clips}) on a training stage's validation examples: by letters, or in GRPO and
    with traces by greedily written answers, read as strictly as the reward reads them."""
    rank, world_size = rank_and_world_size()
    own = examples[rank::world_size]
    if isinstance(stage, GRPO) or getattr(stage, "traces", None):
        writing = Writing(stage.max_new_tokens, stop=getattr(stage, "stop", ()))
        records = write_answers(model, processor, own, stage.prompt_format, writing)
        for example, record in zip(own, records, strict=True):
            if "bad" not in record:
                record["answer"] = parse_answer(record["text"], example.options, stage.prompt_format.asks_for_letter)
    else:
        records = score_letters(model, processor, own, stage.prompt_format)
    shares = gather(records)
    records = [shares[i % world_size][i // world_size] for i in range(len(examples))]
    return tabulate(examples, records)["accuracy"], count_bad(records, stage.name, stage.max_bad)
