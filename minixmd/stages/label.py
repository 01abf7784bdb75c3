"""Stage Label: a model's predicted letters for a split, with the letters' logits, as labels.jsonl."""
import shutil
from functools import partial

from tqdm import tqdm

from minixmd.inputs.examples import read_examples
from minixmd.models.sharding import finish_passes
from minixmd.runs.distributed import compute_shards
from minixmd.runs.records import count_bad, write_jsonl
from minixmd.stages.multiple_choice import load_model, score_letters


def run(stage, folder, log):
    """The manifest's true answers are not read: a record depends on the clip, the question and the model alone."""
    examples = read_examples(stage)
    model, processor = load_model(stage)
    compute = partial(score_letters, model, processor, prompt_format=stage.prompt_format,
                      batch_tokens=stage.batch_tokens, top_k=stage.top_k, top_temperature=stage.temperature)
    records = compute_shards(compute, examples, folder / "shards", stage.name, "clip",
                             finish=partial(finish_passes, model))
    if records is None:
        return
    bad = count_bad(records, stage.name, stage.max_bad)
    if stage.top_k:  # the tokenizer says what the stored ids mean
        shutil.copyfile(processor.folder / "tokenizer.json", folder / "tokenizer.json")
    write_jsonl(folder / "labels.jsonl", records)
    log({"count": len(records), "bad": bad})
    tqdm.write(f"{stage.name}: {len(records) - sum(bad.values())} clips labelled" + (f", bad: {bad}" if bad else ""))
