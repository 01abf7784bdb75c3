"""Accuracies with their intervals, and the comparison of two models on the same questions."""
import hashlib
import json
from collections import Counter, defaultdict
from math import sqrt
from random import Random

from minixmd.tasks.benchmarks import FIELDS, TYPES, same

SUMMARY = {"count": int, "correct": int, "accuracy": float | None, "interval": tuple[float, float]}


def wilson(correct, count, z=1.959964):
    """95 % interval of a share; (0, 1) for no observation."""
    if count == 0:
        return 0.0, 1.0
    p = correct / count
    middle = p + z * z / (2 * count)
    half = z * sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale


def summary(hits):
    """{"count", "correct", "accuracy", "interval"} of a list of booleans."""
    correct = sum(hits)
    low, high = wilson(correct, len(hits))
    accuracy = correct / len(hits) if hits else None
    return {"count": len(hits), "correct": correct, "accuracy": accuracy, "interval": [low, high]}


def clustered_interval(clusters, draws=2000):
    """95 % interval of the share of true ones in lists of booleans that are not independent within a list, as one
    person's answers: percentiles of a bootstrap of whole lists, always the same, and at least the interval that they
    would have if they were. One list: (0, 1)."""
    if len(clusters) < 2:
        return [0.0, 1.0]
    random = Random(0)
    shares = []
    for _ in range(draws):
        drawn = random.choices(clusters, k=len(clusters))
        correct = sum(map(sum, drawn))
        shares.append(correct / sum(map(len, drawn)))
    shares.sort()
    correct = sum(map(sum, clusters))
    count = sum(map(len, clusters))
    low, high = wilson(correct, count)
    return [min(low, shares[draws // 40]), max(high, shares[-draws // 40 - 1])]


def tabulate(examples, records, rule="option"):
    """Overall, class and group summaries, without bad clips. rule: of benchmarks.same, by which an answer is right."""
    hits, classes, groups = [], defaultdict(list), defaultdict(list)
    for example, record in zip(examples, records, strict=True):
        if "bad" in record:
            continue
        hit = same(example.options, record["answer"], example.answer, rule)
        hits.append(hit)
        if example.label is not None:
            classes[example.label].append(hit)
        if example.meta.get("group") is not None:
            groups[example.meta["group"]].append(hit)
    return {**summary(hits),
            "groups": {name: summary(of_group) for name, of_group in sorted(groups.items())},
            "classes": {name: summary(of_class) for name, of_class in sorted(classes.items())}}


def breakdown(name, metas, rights):
    """Summaries of a benchmark's clips, from their Examples' metas and booleans: {"all": summary, field of FIELDS:
    {value: summary}}. Of MUSIC-AVQA {"audio": {type: summary, "all": summary}, "every": the same over all modalities,
    "pair": {"Audio Counting": summary}}, where "audio" is of audio and audio-visual questions, our reading of the
    paper's "7k"."""
    if name != "music_avqa":
        table = {"all": summary(rights)}
        for field in FIELDS[name]:
            table[field] = _by_value([meta[field] for meta in metas], rights)
        return table
    asked = list(zip(metas, rights, strict=True))
    heard = [pair for pair in asked if pair[0]["modality"] != "Visual"]
    table = {}
    for title, part in (("audio", heard), ("every", asked)):
        table[title] = {}
        for kind in TYPES:
            table[title][kind] = summary([right for meta, right in part if meta["type"] == kind])
        table[title]["all"] = summary([right for _, right in part])
    both = [f"{meta['modality']} {meta['type']}" for meta in metas]
    table["pair"] = _by_value(both, rights)
    return table


def _by_value(values, rights):
    hits = {value: [] for value in sorted(values)}
    for value, right in zip(values, rights, strict=True):
        hits[value].append(right)
    return {value: summary(of_value) for value, of_value in hits.items()}


def digest(example):
    """16 hex digits of what was asked: the question, the options in their order and the right one."""
    asked = json.dumps([example.question, example.options, example.answer])
    return hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()


def paired_interval(both, only_a, only_b, neither):
    """95 % interval of a's share less b's, from the counts of clips by who is right: Newcombe, Statistics in Medicine
    17 (1998) 2635-2650, method 10: their Wilson limits, joined by a correlation with a continuity correction."""
    n = both + only_a + only_b + neither
    if n == 0:
        return -1.0, 1.0
    a, b = both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = wilson(a, n), wilson(b, n)
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    spread = sqrt(a * (n - a) * b * (n - b))
    correlation = covariance / spread if spread else 0.0

    def joined(x, y):
        return sqrt(max(x * x - 2 * correlation * x * y + y * y, 0))

    below = joined(a / n - low_a, high_b - b / n)
    above = joined(high_a - a / n, b / n - low_b)
    return (a - b) / n - below, (a - b) / n + above


def pairs(a, b):
    """[(record of a, record of b)] clip by clip, in a's order; a record has "id" and "question", the digest. Raises
    ValueError for the first clip that only one has, or with two questions or a record that does not say which."""
    rest, matched = {record["id"]: record for record in b}, []
    for record in a:
        clip = f"clip {record['id']!r}"
        other = rest.pop(record["id"], None)
        if other is None:
            raise ValueError(f"{clip}: only the first of the two has it")
        if "question" not in record or "question" not in other:
            raise ValueError(f"{clip}: its record does not say what was asked: not an Evaluate stage's")
        if record["question"] != other["question"]:
            raise ValueError(f"{clip}: the two are different questions: other words, options or right answer")
        matched.append((record, other))
    if rest:
        raise ValueError(f"clip {next(iter(rest))!r}: only the second of the two has it")
    return matched


def compare(a, b):
    """Of two models' answers.jsonl: clips by who is right, a's accuracy less b's, and its 95 % interval. A clip that
    was bad for either is left out. Raises ValueError as pairs."""
    who = Counter()
    for record, other in pairs(a, b):
        if "bad" in record or "bad" in other:
            who["left_out"] += 1
        else:
            who[record["right"], other["right"]] += 1
    both, only_a, only_b, neither = who[True, True], who[True, False], who[False, True], who[False, False]
    count = len(a) - who["left_out"]
    return {
        "count": count,
        "left_out": who["left_out"],
        "both": both,
        "only_a": only_a,
        "only_b": only_b,
        "neither": neither,
        "difference": (only_a - only_b) / count if count else None,
        "interval": list(paired_interval(both, only_a, only_b, neither)),
    }


def leads(a, b):
    """{class: a's accuracy less b's} of the classes that both answered, from the "classes" of two results."""
    return {name: a[name]["accuracy"] - b[name]["accuracy"] for name in a if name in b}


def groups(lead):
    """{title: class names} by leads, {class: the teacher's accuracy less the student's}. The groups are disjoint, of at
    most 10 classes (as in the paper's Figures 1 and 3) and a third of all. A tie is broken by name."""
    size = min(10, -(-len(lead) // 3))
    by_name = sorted(lead)
    ahead = [name for name in sorted(by_name, key=lead.get, reverse=True)[:size] if lead[name] > 0]
    behind = [name for name in sorted(by_name, key=lead.get)[:size] if lead[name] < 0]
    others = [name for name in by_name if name not in ahead + behind]
    closest = sorted(others, key=lambda name: abs(lead[name]))[:size]
    return {"The teacher is ahead": ahead, "The student is ahead": behind,
            "The smallest gaps among the others": closest}
