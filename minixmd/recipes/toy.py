"""XMD on the toy world: a vision model teaches an audio model on the same clips, gated by a switch.

    python -m minixmd.train toy            (another world: python -m minixmd.train toy seed=1 run_dir=runs/toy-1)

CPU, 2 cores, about 5 minutes, 0.9 GB. The last table shows the teacher, the student before and the student after.
"""
from minixmd.config import Distill, Evaluate, Label, Report, Switch, Toy

FRAMES = dict(min_pixels=3_136, max_pixels=3_136)  # the clips are 56 x 56
AUDIO, VIDEO = dict(media="audio"), dict(media="video", **FRAMES)

stages = [
    Toy(name="toy"),
    # both models before distillation
    *(Evaluate(name=f"teacher_{split}", model="@toy/teacher", manifest=f"@toy/{split}.jsonl", **VIDEO)
      for split in ("analysis", "test", "unseen")),
    *(Evaluate(name=f"student_{split}", model="@toy/student", manifest=f"@toy/{split}.jsonl", **AUDIO)
      for split in ("analysis", "test", "unseen")),
    Evaluate(name="student_alone", model="@toy/student", manifest="@toy/test.jsonl", media="none"),
    # each model's own answers on the train split, which has no true labels
    Label(name="teacher_labels", model="@toy/teacher", manifest="@toy/train.jsonl", **VIDEO),
    Label(name="student_labels", model="@toy/student", manifest="@toy/train.jsonl", **AUDIO),
    # the switch: a small Cnn14 that learns on the analysis split's sound which clips the teacher gets right more often
    Switch(name="switch", teacher="@teacher_analysis", student="@student_analysis", manifest="@toy/analysis.jsonl",
           train_manifest="@toy/train.jsonl", width=1 / 16, clip_s=1.0, epochs=6, lr=3e-3, augment="spec"),
    # the student learns the teacher's label where the switch says so, and its own elsewhere
    Distill(name="distilled", model="@toy/student", manifest="@toy/train.jsonl",
            teacher_labels="@teacher_labels", student_labels="@student_labels", switch="@switch", gate="learned",
            trainable="full", lr=6e-4, epochs=2, batch_size=32, **AUDIO),
    *(Evaluate(name=f"distilled_{split}", model="@distilled", manifest=f"@toy/{split}.jsonl", **AUDIO)
      for split in ("analysis", "test", "unseen")),
    Report(name="report", tables={
        "teacher (video)": {split: f"@teacher_{split}" for split in ("analysis", "test", "unseen")},
        "student before (audio)": {split: f"@student_{split}" for split in ("analysis", "test", "unseen")},
        "student after (audio)": {split: f"@distilled_{split}" for split in ("analysis", "test", "unseen")},
        "student before, question alone": {"test": "@student_alone"},
    }, published="xmd", roles=("teacher (video)", "student before (audio)", "student after (audio)"),
        bars=("test", "unseen"), clips="@toy/test.jsonl", switch="@switch",
        curves={"Distillation": {"distilled": "@distilled/log.jsonl"}, "Switch": {"switch": "@switch/log.jsonl"}}),
]  # fmt: skip
