"""Judgements between yes and no: reading one from an answer or from its first token, and scores against the truth."""
import math
import re
from bisect import bisect_left, bisect_right

import numpy as np

from minixmd.tasks.statistics import summary


def yes_no(text):
    """True or False if the first word is yes or no, in any case and between any marks, else None."""
    return {"yes": True, "no": False}.get(_first_word(text))


def log_odds(top):
    """log p(yes) - log p(no), each over all its spellings, from the first token's {token: logprob}; None if neither is
    listed. If one is not listed, all that is known of it is that it is no likelier than the least likely token listed,
    nor than all that are not listed together. The smaller of the two (at least a millionth) stands in for it."""
    listed = {"yes": [], "no": []}
    for token, logprob in top.items():
        if _first_word(token) in listed:
            listed[_first_word(token)].append(logprob)
    if not any(listed.values()):
        return None
    unlisted = max(1e-6, 1 - sum(math.exp(logprob) for logprob in top.values()))
    bound = min(*top.values(), math.log(unlisted))
    yes = np.logaddexp.reduce(listed["yes"] or [bound])
    no = np.logaddexp.reduce(listed["no"] or [bound])
    return float(yes - no)


def _first_word(text):
    found = re.search(r"[^\W_]+", text)
    return found.group().lower() if found else ""


def tally(p_N, truth_N):
    """How often decisions, yes from 0.5 on, are right. p_N: probabilities of yes. Returns summary's fields, "majority":
    share of the more frequent answer, and "confusion": rows are the truth, columns the decision, first no, then yes."""
    hits, confusion = [], [[0, 0], [0, 0]]
    for p, truth in zip(p_N, truth_N, strict=True):
        said = p >= 0.5
        confusion[bool(truth)][said] += 1
        hits.append(said == bool(truth))
    return {**summary(hits), "majority": max(map(sum, confusion)) / len(hits), "confusion": confusion}


def auc(scores, truths):
    """Area under the ROC curve: the chance that a true one outscores a false one, a tie half; None without both."""
    false, true = _by_truth(scores, truths)
    if not true or not false:
        return None
    false.sort()
    wins = sum(bisect_left(false, score) + bisect_right(false, score) for score in true) / 2
    return wins / (len(true) * len(false))


def roc(scores, truths, points=50):
    """[[false positive rate, true positive rate], …] at up to `points` thresholds, from (0, 0) to (1, 1)."""
    sides = _by_truth(scores, truths)
    thresholds = sorted(set(scores), reverse=True)
    curve = [[0.0, 0.0]]
    for threshold in thresholds[::math.ceil(len(thresholds) / points)]:
        curve.append([sum(score >= threshold for score in side) / max(1, len(side)) for side in sides])
    return [*curve, [1.0, 1.0]]


def agreement(scores, truths):
    """{"count", "agreement", "confusion": as tally's, "auc", "roc"} of scores, which say yes above 0."""
    counts = tally([float(score > 0) for score in scores], truths)
    return {"count": len(truths), "agreement": counts["accuracy"], "confusion": counts["confusion"],
            "auc": auc(scores, truths), "roc": roc(scores, truths)}


def _by_truth(scores, truths):
    """(scores of the false ones, scores of the true ones)."""
    sides = [], []
    for score, truth in zip(scores, truths, strict=True):
        sides[bool(truth)].append(score)
    return sides
