"""Stage Label: a model's predicted letters for a split, with the letters' logits, as labels.jsonl."""
import json
import shutil
from functools import partial

from tqdm import tqdm

from minixmd.runs.files import write_text
from minixmd.stages.evaluate import score
from minixmd.stages.multiple_choice import count_bad, score_letters


def run(stage, folder, log):
    """The manifest's true answers are not read: a record depends on the clip, the question and the model alone."""
    ask = partial(score_letters, stage=stage, batch_tokens=stage.batch_tokens, top_k=stage.top_k,
                  top_temperature=stage.temperature)
    _, records, processor = score(stage, folder, ask)
    bad = count_bad(records, stage)
    if stage.top_k:  # what the stored ids mean
        shutil.copyfile(processor.folder / "tokenizer.json", folder / "tokenizer.json")
    write_text(folder / "labels.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    log({"count": len(records), "bad": bad})
    tqdm.write(f"{stage.name}: {len(records) - sum(bad.values())} clips labelled" + (f", bad: {bad}" if bad else ""))
