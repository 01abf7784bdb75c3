"""Some completions of a training step in completions.jsonl: text, rewards, and what a teacher says of them."""
import torch

from minixmd.inputs.batch import send
from minixmd.learning.logprobs import SampledVocabulary
from minixmd.models.head import raw_logits
from minixmd.runs.records import append_jsonl

COMPLETIONS = 4  # of a step


def show_completions(folder, step, rollout, completions, items, rewards, teacher):
    """Appends lines on one prompt of a step, the first that is learnt from. rewards: as of policy.score_completions.
    teacher: the Teacher that has read the rollout, or None."""
    p, numbers = 0, []
    if rollout.pieces:
        p, numbers = rollout.pieces[0]
    said = {}
    if teacher is not None and numbers and items[p].teacher_prompt is not None:
        said = dict(zip(numbers, comments(teacher, rollout), strict=False))
    for i, completion in enumerate(completions[p][:COMPLETIONS]):
        line = {"step": step, "id": items[p].example.id}
        for name, reward_PG in rewards.items():
            line[name] = reward_PG[p, i].item()
        line |= {"finished": completion.finished, "text": completion.text}
        if i in said:
            line["teacher"] = said[i]
        append_jsonl(folder / "completions.jsonl", line)


@torch.no_grad()
def comments(teacher, rollout):
    """What it says of the first Group's first completions. Yields for each a list of [token, its log-probability under
    the student, under the teacher, what the teacher would have written there, that one's under the teacher] for every
    token up to an id that it does not know. Log-probabilities are at the stage's temperature, the teacher's over the
    common ids."""
    vocabulary = SampledVocabulary(teacher.stage.temperature, teacher.suppressed_Z, teacher.common_vocab)
    end = 0
    for ids_T in rollout.micro_batches[0][0].completions[:COMPLETIONS]:
        begin, end = end, end + len(ids_T)
        ids_T = ids_T[:teacher.count_known(ids_T)]
        read = slice(begin, begin + len(ids_T))
        logp_TV = vocabulary.log_softmax(raw_logits(rollout.teacher_TE[read], teacher.head_VE))
        best = logp_TV.max(-1)
        [id_T] = send([ids_T], teacher.device)
        own_T = logp_TV.gather(1, id_T[:, None])[:, 0]
        columns = [
            tokens_of(teacher, ids_T),
            rollout.sampled_T[read].tolist(),
            own_T.tolist(),
            tokens_of(teacher, best.indices),
            best.values.tolist(),
        ]
        yield list(zip(*columns, strict=True))


def tokens_of(teacher, ids_T):
    tokenizer, tokens = teacher.processor.tokenizer, []
    for i in ids_T.tolist():
        tokens.append(tokenizer.decode([i], skip_special_tokens=False))
    return tokens
