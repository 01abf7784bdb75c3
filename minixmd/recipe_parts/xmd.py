"""XMD ("Bridging Ears and Eyes") as lists of stages, for any two models and manifests:

    before ─ switch ─ distilled ─ report        (`ablation` has every way to distil in place of `distilled`)

`recipes/toy.py` has them written out; read that first. "audio" hears the clips, "video" sees them; either may learn."""
from dataclasses import dataclass, field

from minixmd.config import SFT, Distill, Evaluate, Label, Report, Switch

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


@dataclass(frozen=True)
class XMD:
    """The two models, their data, and fields for their stages."""
    models: dict[str, str]  # {"audio": the model that hears, "video": the one that sees}
    train: str  # manifest of the clips to distil on
    truth: str  # the same clips with labels: for the upper bound, the oracle, and to judge the switch
    splits: dict[str, str]  # {column of the tables: manifest}; "analysis" is the split that the switch learns from
    model_fields: dict[str, dict]  # {"audio", "video"}: fields of every stage that runs that model, media included
    evaluate_fields: dict = field(default_factory=dict)  # more fields of Evaluate
    train_fields: dict = field(default_factory=dict)  # of Distill and SFT
    switch_fields: dict = field(default_factory=dict)  # of Switch

    def evaluated(self, name, model, media):
        """`{name}_{split}`: a model's accuracy on every split."""
        fields = self.model_fields[media] | self.evaluate_fields
        return [Evaluate(name=f"{name}_{split}", model=model, manifest=manifest, **fields)
                for split, manifest in self.splits.items()]

    def before(self):
        """Both models: `{media}_{split}`, and `{media}_labels`, answers on the train split with the KL's logits."""
        stages = []
        for media, model in self.models.items():
            fields = self.model_fields[media]
            stages += self.evaluated(media, model, media)
            stages.append(Label(name=f"{media}_labels", model=model, manifest=self.train, top_k=64, **fields))
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

    def cells(self, name):
        return {split: f"@{name}_{split}" for split in self.splits}

    def report(self, titles, student, name="distilled", switch="@switch", *, rows=None, ablation=False):
        """titles: of the rows "audio", "video", "distilled". rows: {title: cells} of more. ablation: adds its table."""
        stages = {OTHER[student]: OTHER[student], student: student, "distilled": name}
        tables = {titles[key]: self.cells(stage) for key, stage in stages.items()}
        trained = ABLATION if ablation else {titles["distilled"]: name}
        curves = {title: f"@{stage}/log.jsonl" for title, stage in trained.items()}
        return [Report(
            name="ablation_report" if ablation else f"{name}_report", published="xmd",
            tables=tables | (rows or {}), roles=tuple(tables),
            ablation={title: self.cells(stage) for title, stage in trained.items()} if ablation else None,
            bars=tuple(split for split in self.splits if split != "analysis"),
            clips=self.splits["test"], switch=switch,
            curves={"Distillation": curves, "Switch": {"switch": f"{switch}/log.jsonl"}},
        )]  # fmt: skip


TITLES = {"audio": "Qwen2-Audio-7B-Instruct", "video": "Qwen2-VL-7B-Instruct"}  # of the rows, as in the paper


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
        splits={"analysis": f"{data}/vggsound/analysis.jsonl", "test": f"{data}/vggsound/test.jsonl",
                "unseen": f"{data}/audioset/unseen.jsonl"},
        model_fields={"audio": dict(media="audio", **gpu), "video": dict(media="video", **frames),
                      "sounded": dict(media="sounded", **frames)},
        evaluate_fields=dict(answer="generate"),
        train_fields=training | train_fields,
        switch_fields=dict(weights=cnn14, epochs=30, batch_size=32, lr=1e-4, warmup_ratio=0.1, device="cuda"),
    )  # fmt: skip
