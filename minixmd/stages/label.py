"""Stage Label: a model's predicted letters for a split, with the letters' logits, as labels.jsonl."""
from tqdm import tqdm

from minixmd.inputs.examples import read_examples
from minixmd.runs.records import count_bad, write_jsonl
from minixmd.stages.multiple_choice import answer_examples


def run(stage, folder, log):
    """The manifest's true answers are not read: a record depends on the clip, the question and the model alone."""
    examples = read_examples(stage)
    records = answer_examples(stage, folder, examples, log)
    if records is None:
        return
    count_bad(records, stage.name, stage.max_bad)
    for i, record in enumerate(records):
        if "bad" not in record and record["option"] is None:
            detail = f"its answer names none: {record['text']!r}"
            records[i] = {"id": record["id"], "bad": "no option", "detail": detail}
    bad = count_bad(records, stage.name, 1.0)
    write_jsonl(folder / "labels.jsonl", records)
    log({"count": len(records), "bad": bad})
    tqdm.write(f"{stage.name}: {len(records) - sum(bad.values())} clips labelled" + (f", bad: {bad}" if bad else ""))
