"""The stages of XMD ("Bridging Ears and Eyes") over any two models and manifests: recipes differ in those alone.

`recipes/toy.py` has the same stages written out; read that first. Here one model hears ("audio"), the other sees
("video"), and either may be the one that learns.
"""
from dataclasses import dataclass, field

from minixmd.config import SFT, Distill, Evaluate, Label, Report, Switch

OTHER = {"audio": "video", "video": "audio"}
SWITCHED = dict(gate="learned")  # by the switch; where it is open the student keeps its own answers
ABLATION = {  # row, as the paper's Table 2 calls it where it has it -> name of its stage, and how it differs
    "KL on teacher's logits": ("kl", dict(teacher_loss="kl", **SWITCHED)),
    "KL on teacher's logits + labels": ("kl_ce", dict(teacher_loss="kl+ce", **SWITCHED)),
    "Ground-truth labels (upper bound)": ("truth", None),  # None: SFT on the true labels
    "Teacher's labels (default)": ("distilled", SWITCHED),
    "Teacher's labels without anti-forgetting loss": ("forgetting", dict(student_labels=None, **SWITCHED)),
    "Switch by the true class (oracle)": ("oracle", dict(gate="oracle")),
    "Always the teacher, no switch": ("always", dict(gate="always", student_labels=None)),
    "Never the teacher, own answers only": ("never", dict(gate="never", teacher_labels=None)),
}


@dataclass(frozen=True)
class XMD:
    """Two models and what they are asked. Each method returns a list of stages; their names are what it says."""

    models: dict[str, str]  # {"audio": the model that hears, "video": the one that sees}
    train: str  # manifest that is learnt from
    truth: str  # the same clips with true answers and classes: an ablation's upper bound and oracle, the switch's tally
    splits: dict[str, str]  # {column of the tables: manifest}; "analysis" is the one that teaches the switch
    asking: dict[str, dict]  # fields of Evaluate, Label and Train alike, media included: {"audio": …, "video": …}
    evaluating: dict = field(default_factory=dict)  # more fields of Evaluate
    learning: dict = field(default_factory=dict)  # of Train
    switching: dict = field(default_factory=dict)  # of Switch

    def evaluated(self, name, model, sense):
        """`{name}_{split}` for every split."""
        fields = self.asking[sense] | self.evaluating
        return [Evaluate(name=f"{name}_{split}", model=model, manifest=manifest, **fields)
                for split, manifest in self.splits.items()]

    def before(self):
        """audio_* and video_*: what each model knows. audio_labels, video_labels: its own answers on the train split,
        with what KL needs."""
        return [stage for sense, model in self.models.items() for stage in (
            *self.evaluated(sense, model, sense),
            Label(name=f"{sense}_labels", model=model, manifest=self.train, top_k=64, **self.asking[sense]))]

    def switch(self, learner, name="switch"):
        """Which clips the other model teaches; both directions are told by ear. True classes only judge it."""
        return [Switch(name=name, teacher=f"@{OTHER[learner]}_analysis", student=f"@{learner}_analysis",
                       manifest=self.splits["analysis"], train_manifest=self.truth, **self.switching)]

    def distilled(self, learner, name="distilled", switch="@switch", **changes):
        """`name` and `{name}_{split}`: `learner` taught by the other model. changes: fields of Distill."""
        fields = dict(teacher_labels=f"@{OTHER[learner]}_labels", student_labels=f"@{learner}_labels")
        fields |= SWITCHED | changes
        if fields["gate"] in ("learned", "oracle"):
            fields["switch"] = switch
        stage = Distill(name=name, model=self.models[learner], manifest=self.train, **fields, **self.asking[learner],
                        **self.learning)
        return [stage, *self.evaluated(name, f"@{name}", learner)]

    def supervised(self, learner, name="truth"):
        """`name` and `{name}_{split}`: `learner` trained on the true labels, an upper bound."""
        stage = SFT(name=name, model=self.models[learner], manifest=self.truth, **self.asking[learner], **self.learning)
        return [stage, *self.evaluated(name, f"@{name}", learner)]

    def ablation(self, learner):
        """Every row of ABLATION; the one named "distilled" is what `distilled` gives."""
        stages = []
        for name, changes in ABLATION.values():
            if changes is None:
                stages += self.supervised(learner, name)
            else:
                stages += self.distilled(learner, name, **changes)
        return stages

    def cells(self, name):
        """A row of a report's table: the results of `evaluated`."""
        return {split: f"@{name}_{split}" for split in self.splits}

    def report(self, titles, learner, name="distilled", switch="@switch", *, rows=None, ablation=False):
        """The report of `learner`'s distillation.

        Args:
            titles: of the two models and of the distilled one, {"audio", "video", "distilled"}.
            rows: more of them, {title: cells}. ablation: with the table of `ablation`.
        """
        teacher = OTHER[learner]
        tables = {titles[sense]: self.cells(sense) for sense in (teacher, learner)}
        tables |= {titles["distilled"]: self.cells(name)} | (rows or {})
        runs = {title: run for title, (run, _) in ABLATION.items()} if ablation else {titles["distilled"]: name}
        return [Report(name="ablation_report" if ablation else f"{name}_report", published="xmd", tables=tables,
                       roles=(titles[teacher], titles[learner], titles["distilled"]),
                       ablation={title: self.cells(run) for title, run in runs.items()} if ablation else None,
                       bars=tuple(split for split in self.splits if split != "analysis"), clips=self.splits["test"],
                       switch=switch,
                       curves={"Distillation": {title: f"@{run}/log.jsonl" for title, run in runs.items()},
                               "Switch": {"switch": f"{switch}/log.jsonl"}})]


TITLES = {"audio": "Qwen2-Audio-7B-Instruct", "video": "Qwen2-VL-7B-Instruct"}  # of the rows, as the paper has them


def vggsound(*, audio="Qwen/Qwen2-Audio-7B-Instruct", video="Qwen/Qwen2-VL-7B-Instruct", data="data",
             cnn14="models/Cnn14_16k_mAP=0.438.pth", **learning):
    """The paper's models, data and settings on one CUDA GPU; what it does not state is said beside the value.

    Args:
        audio, video: the two checkpoints, folders or names on the hub; these are the 7B ones.
        data: folder with vggsound/ and audioset/ as tools/prepare_vggsound.py and prepare_audioset.py write them.
        cnn14: PANN's checkpoint, from which the switch starts. learning: fields of Train to change.
    """
    gpu = dict(device="cuda", dtype="bfloat16")
    seen = dict(fps=1.0, min_pixels=100_352, max_pixels=262_144, **gpu)
    return XMD(
        models={"audio": audio, "video": video},
        train=f"{data}/vggsound/train.jsonl",
        truth=f"{data}/vggsound/train.jsonl",
        splits={"analysis": f"{data}/vggsound/analysis.jsonl", "test": f"{data}/vggsound/test.jsonl",
                "unseen": f"{data}/audioset/unseen.jsonl"},
        asking={"audio": dict(media="audio", **gpu), "video": dict(media="video", **seen),
                "sounded": dict(media="sounded", **seen)},
        evaluating=dict(answer="generate"),
        # not stated: alpha, the adapted layers (here every projection of the decoder), weight decay, clipping
        learning=dict(epochs=1, batch_size=8, micro_batch_size=4, lr=1e-4, warmup_ratio=0.1, lora_rank=16, lora_alpha=32.0,
                      weight_decay=0.0, max_grad_norm=1.0, save_every=500) | learning,
        switching=dict(weights=cnn14, epochs=30, batch_size=32, lr=1e-4, warmup_ratio=0.1, device="cuda"),
    )  # fmt: skip
