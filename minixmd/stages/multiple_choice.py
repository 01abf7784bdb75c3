"""Puts a manifest's multiple-choice questions to a model: by the letters' logits, or by what the model writes."""
import math
import shutil
from dataclasses import dataclass, field, fields
from functools import cache, partial
from string import ascii_uppercase

import torch

from minixmd import load
from minixmd.config import Label
from minixmd.config.prompts import PromptFormat
from minixmd.config.stages import MOST_SLOTS
from minixmd.inputs.batch import pack
from minixmd.inputs.examples import Example, check_answers, read_examples
from minixmd.inputs.prompts import batch_by_tokens, build_prompt, prefetch
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.rollout import Usage, decode, uniforms
from minixmd.models.hub import base_and_adapters, model_folder
from minixmd.models.sharding import finish_passes
from minixmd.runs.device import runtime_of
from minixmd.runs.distributed import compute_shards, gather, rank_and_world_size, written_shard
from minixmd.runs.heartbeat import beat
from minixmd.runs.records import bad_record, count_bad, write_jsonl
from minixmd.runs.seeds import shuffled
from minixmd.stages.endpoint import ask_about
from minixmd.tasks.answers import parse_answer
from minixmd.tasks.benchmarks import vote
from minixmd.tasks.statistics import tabulate

BATCH_TOKENS = 8192  # packed into a forward pass


@dataclass(frozen=True)
class Writing:
    max_new_tokens: int  # of an answer, the end of turn included
    num_samples: int = 1  # answers of a question, of which the most frequent counts
    temperature: float = 0.0  # 0 = greedy
    stop: tuple[str, ...] = ()  # strings that end an answer, as in generate
    rule: str = "option"  # "option" | "mmau", by which answers are read (tasks/benchmarks.py)
    seed: int = 0  # a sampled token depends on (seed, the example's id, the sample's number, the position) alone
    slots: int = MOST_SLOTS  # answers that are written at once

    @classmethod
    def of(cls, stage):
        """How a stage's model writes; a label is one greedy answer."""
        if isinstance(stage, Label):  # its temperature is that of the distillation
            return cls(stage.max_new_tokens, slots=stage.slots)
        return cls(**{f.name: getattr(stage, f.name) for f in fields(cls) if hasattr(stage, f.name)})


def model_of(stage):
    """(A function that gives the (MultimodalLM, Processor) of a stage, where and as it says, loaded in the first call:
    a stage that has nothing left to compute loads none; compute_shards' `finish`)."""
    sharded = getattr(stage, "sharded", False) and rank_and_world_size()[1] > 1
    get_model = cache(lambda: load(stage.model, **runtime_of(stage), sharded=sharded))
    finish = torch.inference_mode()(lambda: finish_passes(get_model()[0]))
    return get_model, finish if sharded else None


def answer_examples(stage, folder, examples, log, traces=None):
    """The records of an Evaluate or Label stage's examples; None on all processes but the first. traces: Questions'."""
    if stage.endpoint is not None:
        return ask_for_answers(stage, folder, examples, traces)
    get_model, finish = model_of(stage)
    ask, shard_size, room, usage = score_letters, None, 0, Usage()
    if stage.answer == "generate":
        ask = partial(write_answers, writing=Writing.of(stage), kept={}, usage=usage)
        shard_size, room = written_shard(len(examples)), stage.max_new_tokens
    top = {}
    if isinstance(stage, Label):
        top = dict(top_k=stage.top_k, top_temperature=stage.temperature)

    def compute(examples):
        model, processor = get_model()
        questions = Questions(processor, examples, stage.prompt_format, room, traces or {}, **top)
        return ask(model, questions, batch_tokens=stage.batch_tokens)

    records = compute_shards(compute, examples, folder / "shards", stage.name, "clip", shard_size, finish)
    usage.write_to(log)
    if records is not None and top.get("top_k"):
        copy_tokenizer(stage, folder)
    return records


def copy_tokenizer(stage, folder):
    """Copies the tokenizer.json of a stage's model beside what it writes: it says what stored ids mean."""
    base, _ = base_and_adapters(model_folder(stage.model))
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")


def ask_for_answers(stage, folder, examples, traces):
    """As answer_examples, from the stage's endpoint; endpoint.jsonl keeps the answers."""
    writing, letters = Writing.of(stage), stage.prompt_format.asks_for_letter
    by_letters = stage.answer == "letters"
    answers = ask_about(stage, examples, folder / "endpoint.jsonl", "answer", num_samples=writing.num_samples,
                        traces=traces, max_tokens=writing.max_new_tokens, temperature=writing.temperature,
                        logprobs=by_letters, needs_logprobs=by_letters)
    records = []
    for example, own in zip(examples, answers, strict=True):
        record = {"id": example.id}
        good = [(answer["text"], answer["finished"]) for answer in own if "bad" not in answer]
        if not good:
            record.update(bad=own[0]["bad"], detail=own[0]["detail"])
        elif by_letters:
            read_logprobs(record, example, own[0].get("top", {}))
        else:
            read_texts(record, example, good, writing.rule, letters)
        records.append(record)
    return records


def read_logprobs(record, example, top):
    """Adds to an example's record the option whose letter is likeliest. top: {token: log-prob} of the first token."""
    logprobs = []
    for letter in ascii_uppercase[:len(example.options)]:
        found = [logprob for token, logprob in top.items() if token.strip() == letter]
        logprobs.append(max(found, default=-math.inf))
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    if logprobs[best] == -math.inf:
        record.update(bad="no letter", detail=f"none among the likeliest first tokens: {list(top)}")
    else:
        record.update(answer=best, option=example.options[best])


@dataclass
class Questions:
    """Examples whose questions are put to a model: the Prompts of those that can be used, and a record of each."""
    processor: Processor
    examples: list[Example]
    prompt_format: PromptFormat
    max_new_tokens: int = 0  # room that each prompt leaves for an answer; 0 = none is written
    traces: dict = field(default_factory=dict)  # {id: text for the prompt's {trace}}; empty for an id that is not there
    top_k: int = 0  # best ids to keep that are not suppressed, with the logsumexp of all such at `top_temperature`
    top_temperature: float = 1.0
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
        record = {"id": example.id, "answer": best, "option": example.options[best], "logits": logits}
        if self.top_k:
            allowed_V = logits_V.index_fill(0, torch.tensor(self.processor.suppressed_ids), -torch.inf)
            logits_K, ids_K = allowed_V.topk(self.top_k)
            logsumexp = (allowed_V / self.top_temperature).logsumexp(0).item()
            record["top"] = {
                "ids": ids_K.tolist(),
                "logits": [round(logit, 4) for logit in logits_K.tolist()],
                "temperature": self.top_temperature,
                "logsumexp": round(logsumexp, 5),
            }
        self.records[example.id] = record

    def in_order(self):
        return [self.records[example.id] for example in self.examples]


def next_token_logits(model, items):
    """Logits of the first token after each Prompt, and each completion of a Group, in order: (B, V) on the CPU."""
    beat()
    batch = pack(items).to(model.device)
    parents = {segment.parent for segment in batch.segments}
    ends = [segment for number, segment in enumerate(batch.segments) if number not in parents]
    last_B = torch.tensor([segment.start + segment.length - 1 for segment in ends], device=model.device)
    return model.logits(model(batch)[last_B]).cpu()


@torch.inference_mode()
def score_letters(model, questions, batch_tokens=BATCH_TOKENS):
    """Reads the letters' logits where the answers of Questions would start, in one forward pass a batch.

    Returns a JSON-able record an example, in order: {"id", "answer": index, "option", "logits"} or {"id", "bad",
    "detail"}; with top_k also "top": {"ids", "logits", "temperature", "logsumexp"}. Raises ValueError for an example
    that lacks the medium, a prompt over the limit, or logits that are not finite."""
    for pairs in batch_by_tokens(questions.prompts(), batch_tokens):
        logits_BV = next_token_logits(model, [prompt for _, prompt in pairs])
        for (example, _), logits_V in zip(pairs, logits_BV, strict=True):
            questions.read_letters(example, logits_V)
    return questions.in_order()


def write(model, questions, writing, *, prefill_tokens=BATCH_TOKENS, on_prompts=None, kept=None, usage=None):
    """[(Example, its num_samples Completions)] of the usable Questions, in order. on_prompts: function([Example],
    logits_GV) that takes the logits that follow the next prompts. kept, usage: as in rollout.decode."""
    n = writing.num_samples
    asked = []  # Examples whose prompts were read

    def prompts():
        for example, prompt in questions.prompts():
            asked.append(example)
            yield prompt

    def draw(i):
        return uniforms(writing.seed, 0, asked[i // n].id, i % n, writing.max_new_tokens)

    def hand_out(first, logits_GV):
        on_prompts(asked[first:first + len(logits_GV)], logits_GV)

    completions = decode(
        model, questions.processor, prompts(), len(questions.examples), draw, num_samples=n,
        max_new_tokens=writing.max_new_tokens, temperature=writing.temperature, stop=writing.stop,
        decode_slots=writing.slots, prefill_tokens=prefill_tokens, on_prompts=on_prompts and hand_out, kept=kept,
        usage=usage)
    pairs = []
    for p, example in enumerate(asked):
        pairs.append((example, completions[n * p:n * (p + 1)]))
    return pairs


@torch.inference_mode()
def write_answers(model, questions, writing, *, batch_tokens=BATCH_TOKENS, kept=None, usage=None):
    """Lets the model answer Questions, and reads which option each answer means. Returns and raises as score_letters,
    where "answer" and "option" may be None, with "by_letters": index by the logits, "how": one of benchmarks.WAYS,
    "text", and "finished": the model ended its turn or wrote a stop. With num_samples > 1 those are of the sample that
    was chosen by vote, beside "votes": {option: count} and all "texts"."""
    prompt_format = questions.prompt_format

    def read_first_letters(examples, logits_GV):
        for example, logits_V in zip(examples, logits_GV.cpu(), strict=True):
            questions.read_letters(example, logits_V)

    for example, own in write(model, questions, writing, prefill_tokens=batch_tokens, on_prompts=read_first_letters,
                              kept=kept, usage=usage):
        record = questions.records[example.id]
        if "{options}" in prompt_format.template:  # else no letter was shown
            record["by_letters"] = record["answer"]
        texts = [(completion.text, completion.finished) for completion in own]
        read_texts(record, example, texts, writing.rule, prompt_format.asks_for_letter)
    return questions.in_order()


def read_texts(record, example, completions, rule, letters):
    """Adds to an example's record what most of its completions, [(text, finished)], mean, by benchmarks.vote."""
    texts = [text for text, _ in completions]
    chosen, index, how, votes = vote(texts, example.options, rule, letters)
    option = None if index is None else example.options[index]
    text, finished = completions[chosen]
    record.update(answer=index, option=option, how=how, text=text, finished=finished)
    if len(texts) > 1:
        record.update(votes=votes, texts=texts)


def read_validation(stage):
    """The Examples that a training stage validates on: val_manifest's or, of more than val_limit, a sample by seed."""
    if stage.val_manifest is None:
        return []
    examples = read_examples(stage, "val_manifest")
    check_answers(examples, stage.val_manifest, "validate against")
    if len(examples) <= stage.val_limit:
        return examples
    return shuffled(examples, stage.seed, "validation")[:stage.val_limit]


def validation_accuracy(model, processor, examples, stage, file):
    """(accuracy, {reason: number of bad clips}) on a training stage's validation examples: by letters, or in GRPO and
    with traces by greedily written answers, read as strictly as the reward reads them. file: of the records."""
    rank, world_size = rank_and_world_size()
    own = examples[rank::world_size]
    if getattr(stage, "writes", False):
        writing = Writing(stage.max_new_tokens, stop=getattr(stage, "stop", ()), slots=stage.slots)
        questions = Questions(processor, own, stage.prompt_format, stage.max_new_tokens)
        records = write_answers(model, questions, writing)
        for example, record in zip(own, records, strict=True):
            if "bad" not in record:
                record["answer"] = parse_answer(record["text"], example.options, stage.prompt_format.asks_for_letter)
    else:
        records = score_letters(model, Questions(processor, own, stage.prompt_format))
    shares = gather(records)
    records = [shares[i % world_size][i // world_size] for i in range(len(examples))]
    bad = count_bad(records, stage.name, stage.max_bad)
    if rank == 0:
        file.parent.mkdir(exist_ok=True)
        write_jsonl(file, records)
    return tabulate(examples, records)["accuracy"], bad
