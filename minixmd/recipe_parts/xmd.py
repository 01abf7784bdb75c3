"""XMD ("Bridging Ears and Eyes") as lists of stages, for any two models and manifests:

    before ─ switch ─ distilled ─ report        (`ablation` has every way to distil in place of `distilled`)

`recipes/toy.py` has them written out; read that first. "audio" hears the clips, "video" sees them; either may learn."""
from dataclasses import dataclass, field

from minixmd.config import SFT, Answers, Distill, Evaluate, Label, Report, Switch

OTHER = {"audio": "video", "video": "audio"}
ABLATION = {  # row, by its name in the paper's Table 2 where it has one -> its training stage
    "KL on teacher's logits": "kl",
    "KL on teacher's logits + labels": "kl_ce",
    "Ground-truth labels (upper bound)": "truth",
    "Teacher's labels (default)": "distilled",
    "Teacher's labels without anti-forgetting loss": "forgetting",
    "Switch by the true class (oracle)": "oracle",
    "Always the teacher, no switch": "always",
    "Never the teacher, own answers only": "never",
}
ABLATED = {  # stage -> the fields by which it differs from "distilled", the default; "truth" is SFT
    "kl": dict(teacher_loss="kl"),
    "kl_ce": dict(teacher_loss="kl+ce"),
    "forgetting": dict(student_labels=None),
    "oracle": dict(gate="oracle"),
    "always": dict(gate="always", student_labels=None),
    "never": dict(gate="never", teacher_labels=None),
}


def short_name(model):
    """How a table calls a checkpoint: its last part, without a revision."""
    path, _, _ = model.removeprefix("@").partition("@")
    return path.rpartition("/")[2]


@dataclass(frozen=True)
class XMD:
    """The two models, their data, and fields for their stages."""
    models: dict[str, str]  # {"audio": the model that hears, "video": the one that sees}
    train: str  # manifest of the clips to distil on
    truth: str  # the same clips with labels: for the upper bound, the oracle, and to judge the switch
    splits: dict[str, str]  # {column of the tables: manifest}; "analysis" is the split that the switch learns from
    model_fields: dict[str, dict]  # {"audio", "video"}: fields of every stage that runs that model, media included
    evaluate_fields: dict = field(default_factory=dict)  # more fields of Evaluate and Label
    train_fields: dict = field(default_factory=dict)  # of Distill and SFT
    switch_fields: dict = field(default_factory=dict)  # of Switch

    def evaluated(self, name, model, medium, splits=None, **changes):
        """`{name}_{split}`: a model's accuracy on every split, or on those of `splits`. changes: fields of Evaluate."""
        fields = self.model_fields[medium] | self.evaluate_fields | changes
        stages = []
        for split in splits or self.splits:
            stages.append(Evaluate(name=f"{name}_{split}", model=model, manifest=self.splits[split], **fields))
        return stages

    def before(self):
        """Both models: `{medium}_{split}`; `{medium}_alone_{split}`, answers to the question without a clip; and
        `{medium}_labels`, answers on the train split with the KL's logits."""
        stages = []
        for medium, model in self.models.items():
            fields = self.model_fields[medium] | self.evaluate_fields
            stages += self.evaluated(medium, model, medium)
            stages += self.evaluated(f"{medium}_alone", model, medium, media="none", batch_tokens=4096)
            stages.append(Label(name=f"{medium}_labels", model=model, manifest=self.train, top_k=64, **fields))
        return stages

    def answered(self, name, folder, splits=("analysis", "test")):
        """`{name}_{split}`: another system's answers. folder: with {name}_{split}.jsonl of tools/answers_of.py."""
        stages = []
        for split in splits:
            stage = f"{name}_{split}"
            stages.append(Answers(name=stage, manifest=self.splits[split], file=f"{folder}/{stage}.jsonl"))
        return stages

    def people(self, folder):
        """people_ears, people_eyes, people_both. folder: as tools/listening_test.py made it, with `returned`, the files
        that were sent back."""
        fields = dict(manifest=f"{folder}/manifest.jsonl", file=f"{folder}/returned", max_bad=1.0)
        stages = []
        for condition in ("ears", "eyes", "both"):
            stages.append(Answers(name=f"people_{condition}", condition=condition, **fields))
        return stages

    def switch(self, student, name="switch"):
        """Which clips of the train split the other model teaches; it listens, whoever the student is."""
        return [Switch(name=name, teacher=f"@{OTHER[student]}_analysis", student=f"@{student}_analysis",
                       manifest=self.splits["analysis"], train_manifest=self.truth, **self.switch_fields)]

    def distilled(self, student, name="distilled", switch="@switch", **changes):
        """`name` and its evaluation: the student, taught by the other model. changes: fields of Distill."""
        labels = dict(teacher_labels=f"@{OTHER[student]}_labels", student_labels=f"@{student}_labels")
        fields = dict(gate="learned") | labels | changes
        if fields["gate"] in ("learned", "oracle"):
            fields["switch"] = switch
        return self.trained(Distill, student, name, self.train, fields)

    def trained(self, stage, student, name, manifest, fields):
        fields = fields | self.model_fields[student] | self.train_fields
        training = stage(name=name, model=self.models[student], manifest=manifest, **fields)
        return [training, *self.evaluated(name, f"@{name}", student)]

    def ablation(self, student):
        """Every row of ABLATION; the default row is what `distilled` gives."""
        stages = []
        for name in ABLATION.values():
            if name == "truth":
                stages += self.trained(SFT, student, name, self.truth, {})
            else:
                stages += self.distilled(student, name, **ABLATED.get(name, {}))
        return stages

    def cells(self, name, splits=None):
        return {split: f"@{name}_{split}" for split in splits or self.splits}

    def titles(self, student):
        """Of the rows "audio", "video" and "distilled": the names of the models, as the papers write them."""
        names = {}
        for medium, model in self.models.items():
            names[medium] = short_name(model)
        return names | {"distilled": f"{names[student]} distilled from {names[OTHER[student]]}"}

    def report(self, student, name="distilled", switch="@switch", *, rows=None, ablation=False, senses=None):
        """rows: {title: cells} of more. ablation: adds its table. senses: Report's."""
        titles = self.titles(student)
        stages = {OTHER[student]: OTHER[student], student: student, "distilled": name}
        roles = {titles[key]: self.cells(stage) for key, stage in stages.items()}
        alone = {}
        for medium in self.models:
            alone[f"{titles[medium]}, question alone"] = self.cells(f"{medium}_alone")
        trained = ABLATION if ablation else {titles["distilled"]: name}
        curves = {title: f"@{stage}/log.jsonl" for title, stage in trained.items()}
        return [Report(
            name="ablation_report" if ablation else f"{name}_report", published="xmd",
            tables=roles | (rows or {}) | alone, roles=tuple(roles),
            ablation={title: self.cells(stage) for title, stage in trained.items()} if ablation else None,
            bars=tuple(split for split in ("test", "unseen") if split in self.splits),
            clips=self.splits["test"], switch=switch,
            curves={"Distillation": curves, "Switch": {"switch": f"{switch}/log.jsonl"}}, senses=senses,
        )]  # fmt: skip


def vggsound(*, audio="Qwen/Qwen2-Audio-7B-Instruct", video="Qwen/Qwen2-VL-7B-Instruct", data="data",
             cnn14="models/Cnn14_16k_mAP=0.438.pth", **train_fields):
    """The paper's models, data and settings on one CUDA GPU; "not stated" marks what the paper leaves open. data: has
    vggsound/ and audioset/ as tools/prepare_*.py write them. cnn14: PANN's checkpoint, where the switch starts."""
    gpu = dict(device="cuda", dtype="bfloat16")
    frames = dict(fps=1.0, min_pixels=100_352, max_pixels=262_144, **gpu)
    training = dict(epochs=1, batch_size=8, micro_batch_tokens=4096, lr=1e-4, warmup_ratio=0.1, save_every=500)
    # not stated: alpha, the adapted layers (here every projection of the decoder), weight decay, clipping
    training |= dict(lora_rank=16, lora_alpha=32.0, weight_decay=0.0, max_grad_norm=1.0)
    return XMD(
        models={"audio": audio, "video": video},
        train=f"{data}/vggsound/train.jsonl",
        truth=f"{data}/vggsound/train.jsonl",
        splits={
            "analysis": f"{data}/vggsound/analysis.jsonl",
            "test": f"{data}/vggsound/test.jsonl",
            "unseen": f"{data}/audioset/unseen.jsonl",
            "audioset": f"{data}/audioset/evaluation.jsonl",
        },
        model_fields={"audio": dict(media="audio", **gpu), "video": dict(media="video", **frames),
                      "sounded": dict(media="sounded", **frames)},
        evaluate_fields=dict(answer="generate"),
        train_fields=training | train_fields,
        switch_fields=dict(weights=cnn14, epochs=30, batch_size=32, lr=1e-4, warmup_ratio=0.1, device="cuda"),
    )  # fmt: skip
