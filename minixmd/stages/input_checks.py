"""Opens and checks all files that the stages of a config will read, before the first of them runs; those that an
earlier stage has yet to write ("@name") are left out."""
import os

from minixmd.config import TRAINING, Answers, Distill, Evaluate, FactCheck, OnPolicy, Report, Switch
from minixmd.inputs.examples import MEDIA_KINDS, check_answers, check_media, read_manifest
from minixmd.learning.targets import follows_teacher, resolve_targets
from minixmd.models.cnn14 import make_cnn14
from minixmd.runs.records import read_decisions, read_labels, read_traces, read_verdicts
from minixmd.stages import answers
from minixmd.stages.evaluate import first_traces
from minixmd.stages.factcheck import select_traces
from minixmd.stages.switch import check_labels

MANIFESTS = ("manifest", "val_manifest", "train_manifest", "clips")
READERS = {
    "traces": lambda path: [None for _ in read_traces(path)],
    "verdicts": read_verdicts,
    "switch": read_decisions,
    "teacher_labels": read_labels,
    "student_labels": read_labels,
}


def check_inputs(config, clips=True):
    """Checks the files of a Config's unfinished stages. Raises ValueError. Files that are not there are passed over:
    references.check_files names those. clips: whether a manifest's must be there, for a stage that has read none."""
    for stage in config.stages:
        folder = config.run_dir / stage.name
        if not (folder / "done.json").exists():
            check_stage(stage, clips and not (folder / "shards").exists())


def check_stage(stage, look_for_clips):
    files = {}  # field -> path of a file that is there; others, and outputs to come, are left out
    for name in (*MANIFESTS, *READERS, "weights"):
        path = getattr(stage, name, None)
        if path and not path.startswith("@") and os.path.exists(path):
            files[name] = path
    media = getattr(stage, "media", "none" if isinstance(stage, (Answers, Report)) else "audio")
    examples = {}
    for name in MANIFESTS:
        if name in files:
            examples[name] = read_manifest(files[name], stage.allow_outside)
            shown = [media]
            if name == "manifest" and getattr(stage, "teacher_weight", 0):
                shown.append(stage.teacher_format.media)
            for medium in shown:
                check_media(stage.name, files[name], medium, examples[name])
                if look_for_clips and getattr(stage, "checker", None) != "verdicts":
                    check_clips(examples[name], files[name], MEDIA_KINDS[medium])
    check_answers(examples.get("val_manifest", ()), files.get("val_manifest"), "validate against")
    clips = examples.get("manifest", ())
    needed = [name for name in READERS if getattr(stage, name, None)]
    if isinstance(stage, (Answers, Evaluate)):
        check_answers(clips, stage.manifest, "evaluate against")
    if isinstance(stage, Switch):
        check_labels(stage, clips)
    if clips and isinstance(stage, TRAINING) and files.keys() >= set(needed):
        resolve_targets(stage, clips)  # it reads them all
        needed = []
    for name in needed:
        if name in files:
            READERS[name](files[name])
    if clips and isinstance(stage, Answers) and os.path.exists(stage.file):
        answers.read(stage, clips)
    if clips and "traces" in files:
        if isinstance(stage, FactCheck):
            select_traces(stage, {example.id: example for example in clips})
        if isinstance(stage, Evaluate):
            first_traces(stage, clips)
    if clips and "switch" in needed and "switch" in files and isinstance(stage, (Distill, OnPolicy)):
        follows_teacher(stage, clips)
    if "weights" in files:
        make_cnn14(2, stage.width, 0, files["weights"])


def check_clips(examples, manifest, kinds):
    """Raises ValueError where none of the files of these kinds that a manifest names is there."""
    paths = []
    for example in examples:
        paths += [getattr(example, kind) for kind in kinds]
    if paths and not any(map(os.path.exists, paths)):
        raise ValueError(f"{manifest}: none of the {len(paths)} files that it names is there, such as {paths[0]}")
