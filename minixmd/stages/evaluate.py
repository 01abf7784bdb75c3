"""Stage Evaluate: letter accuracy of a model on a manifest, by class, by group and overall, with Wilson intervals."""
import json
from collections import defaultdict
from math import sqrt

from tqdm import tqdm

from minixmd import load
from minixmd.files import write_json, write_text
from minixmd.inputs.examples import read_manifest
from minixmd.learning.scoring import count_bad, device_of, dtype_of, impl_of, score_in_shards
from minixmd.models.lora import set_impl


def wilson(correct, count, z=1.959964):
    """95 % interval of a share; (0, 1) for no observation."""
    if count == 0:
        return 0.0, 1.0
    p = correct / count
    middle, half = p + z * z / (2 * count), z * sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def summary(hits):
    """{"count", "correct", "accuracy", "interval"} of a list of booleans."""
    correct = sum(hits)
    low, high = wilson(correct, len(hits))
    return {"count": len(hits), "correct": correct, "accuracy": correct / len(hits) if hits else None,
            "interval": [low, high]}


def tabulate(examples, records):
    """Overall, class and group summaries. A bad clip has no answer and is left out; its count stands beside."""
    hits, classes, groups = [], defaultdict(list), defaultdict(list)
    for example, record in zip(examples, records, strict=True):
        if "bad" in record:
            continue
        hit = record["answer"] == example.answer
        hits.append(hit)
        if example.label is not None:
            classes[example.label].append(hit)
        if "group" in example.meta:
            groups[example.meta["group"]].append(hit)
    return {**summary(hits), "groups": {name: summary(hits) for name, hits in sorted(groups.items())},
            "classes": {name: summary(hits) for name, hits in sorted(classes.items())}}


def score(stage, folder):
    """Load the stage's model and score its manifest: (examples, records), finished shards read back."""
    examples = read_manifest(stage.manifest)
    model, processor = load(stage.model, device=device_of(stage), dtype=dtype_of(stage))
    set_impl(model, impl_of(stage))
    with tqdm(total=len(examples), desc=stage.name, unit="clip", smoothing=0.1) as bar:
        return examples, score_in_shards(model, processor, stage, examples, folder / "shards", bar.update)


def run(stage, folder, log):
    """Writes answers.jsonl (one record a clip) and results.json."""
    if missing := next((e for e in read_manifest(stage.manifest) if e.answer is None), None):
        raise ValueError(f"{stage.manifest}: example {missing.id!r} has no answer to evaluate against")
    examples, records = score(stage, folder)
    results = {"model": str(stage.model), "manifest": str(stage.manifest), "media": stage.media,
               "bad": count_bad(records, stage), **tabulate(examples, records)}
    write_text(folder / "answers.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    write_json(folder / "results.json", results)
    log({name: results[name] for name in ("count", "correct", "accuracy", "interval", "bad")})
    low, high = results["interval"]
    tqdm.write(f"{stage.name}: {100 * results['accuracy']:.1f} % of {results['count']} right "
               f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
               + (f", bad: {results['bad']}" if results["bad"] else ""))
