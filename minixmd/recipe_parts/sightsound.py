"""SightSound-R1 as lists of stages, for any teacher that sees and any student that hears:

    traces (the teacher's thoughts) ─ checked (true of the sound?) ─ sft ─ grpo (on the teacher's labels) ─ evaluated

LADDER has the rows of the paper's Table 2; each leaves out some of this line."""
from dataclasses import dataclass, field, replace

from minixmd.config import GRPO, SFT, Distill, Evaluate, FactCheck, Label, OnPolicy, Report, Switch, Traces
from minixmd.config.prompts import AUDIO_COT_PROMPT, CHECK_PROMPT, PROMPT, THINK_PROMPT, TRACE_PROMPT
from minixmd.recipe_parts.xmd import short_name

LADDER = {  # row of Table 2 -> its training stage; "before" is the student itself
    "Direct inference": "before",
    "SFT (ground-truth labels)": "truth",
    "SFT (distilled labels)": "labels",
    "GRPO (distilled labels)": "grpo_labels",
    "SFT": "first",
    "AGFV + SFT": "checked_first",
    "TTS + AGFV + SFT": "sft",
    "TTS + AGFV + SFT + GRPO": "grpo",
}
ALONE = {"Question alone": "alone"}  # ours: the student without the clip
CONTROLS = {"SFT continued": "continued", "SFT, then GRPO, on the traces' clips alone": "grpo_traced"}  # ours
TEACHER, VL_7B = "Qwen/Qwen2.5-VL-32B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"
OMNI_3B, OMNI_7B = "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B"


@dataclass(frozen=True)
class Mode:
    """How an Evaluate stage without training asks on the main split."""
    name: str  # of the stage
    model: str | None = None  # a checkpoint, "student" or "teacher"; None = the ladder has that stage
    mode: str = "direct"  # key of PROMPTS
    media: str = "audio"


MODES = {  # row of Table 1 -> its stage
    "Qwen2.5-Omni-3B (audio), direct": Mode("omni3b_audio", OMNI_3B),
    "Qwen2.5-Omni-7B (audio), direct": Mode("omni7b_audio", OMNI_7B),
    "{student}, question alone": Mode("alone_avqa"),
    "{student}, direct": Mode("before_avqa"),
    "{student}, zero-shot CoT": Mode("cot", "student", "think"),
    "{student}, test-time CoT distillation": Mode("test_time", "student", "trace"),
    "{student}, SFT (ground truth)": Mode("truth_avqa"),
    "Qwen2.5-Omni-3B (video), direct": Mode("omni3b_video", OMNI_3B, media="video"),
    "Qwen2.5-Omni-7B (video), direct": Mode("omni7b_video", OMNI_7B, media="video"),
    "Qwen2.5-VL-7B-Instruct, direct": Mode("vl7b", VL_7B, media="video"),
    "{teacher}, direct": Mode("teacher", "teacher", media="video"),
    "{teacher}, zero-shot CoT": Mode("teacher_cot", "teacher", "think", "video"),
    "{teacher}, zero-shot audio CoT": Mode("teacher_audio_cot", "teacher", "audio_cot", "video"),
    "Qwen2.5-Omni-3B, direct": Mode("omni3b", OMNI_3B, media="sounded"),
    "Qwen2.5-Omni-7B, direct": Mode("omni7b", OMNI_7B, media="sounded"),
}
PROMPTS = {"direct": PROMPT, "think": THINK_PROMPT, "audio_cot": AUDIO_COT_PROMPT, "trace": TRACE_PROMPT,
           "check": CHECK_PROMPT}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How a row of LADDER or CONTROLS is trained."""
    stage: type  # SFT | Distill | GRPO
    manifest: str  # field of SightSound that names it
    fields: dict  # what it learns from
    model: str | None = None  # None = the student
    mode: str = "think"  # | "direct"


UNTRAINED = {"before": "audio", "alone": "none"}  # rows of the student itself -> what it is shown
LETTERS = dict(teacher_labels="@teacher_labels")  # of every clip of the train split
VOTES = dict(teacher_labels="@traces/labels.jsonl")  # the answers on which all traces of a clip agree
UNANIMOUS = dict(traces="@checked", trace_filter="unanimous")  # the accepted traces of such clips
ROWS = {
    "truth": Row(SFT, "truth", {}, mode="direct"),
    "labels": Row(Distill, "train", LETTERS, mode="direct"),
    "grpo_labels": Row(GRPO, "train", LETTERS),
    "first": Row(SFT, "traced", dict(traces="@traces", trace_filter="first")),
    "checked_first": Row(SFT, "traced", dict(traces="@checked", trace_filter="first")),
    "sft": Row(SFT, "traced", UNANIMOUS),
    "continued": Row(SFT, "traced", UNANIMOUS, "@sft"),  # for as many more steps as GRPO has
    "grpo": Row(GRPO, "train", VOTES, "@sft"),
    "grpo_traced": Row(GRPO, "traced", VOTES, "@sft"),
}


@dataclass(frozen=True)
class SightSound:
    """The three models, their data, and fields for their stages."""
    student: str
    teacher: str
    checker_fields: dict  # fields of FactCheck that say who judges
    traced: str  # manifest of the clips that the teacher thinks about
    train: str  # manifest of the clips that the teacher labels; may be the same
    truth: str  # the same clips with true answers, for the upper bound alone
    splits: dict[str, dict]  # {column of the tables: fields of Evaluate, the manifest among them}
    main_split: str  # the column of Table 1, on which teacher and student are compared in every mode
    val: str | None = None  # manifest that chooses the best weights; None = the last ones
    prompts: dict[str, str] = field(default_factory=dict)  # in place of some of PROMPTS
    max_new_tokens: int = 512  # of thoughts and answer; not stated in the paper
    server_fields: dict = field(default_factory=dict)  # of Traces: an endpoint in the teacher's place
    device_fields: dict = field(default_factory=dict)  # of every stage: device, dtype
    video_fields: dict = field(default_factory=dict)  # of every stage that shows a video to a local model
    traces_fields: dict = field(default_factory=dict)  # of Traces
    sft_fields: dict = field(default_factory=dict)  # of SFT and Distill
    grpo_fields: dict = field(default_factory=dict)  # of GRPO and OnPolicy
    # of OnPolicy
    analysis: str | None = None  # manifest of clips with classes, on which the switch learns who knows more
    switch_fields: dict = field(default_factory=dict)
    rewarded: dict = field(default_factory=lambda: dict(VOTES))  # by what answers

    def asked(self, mode):
        """Fields of a stage that puts a prompt to a model. mode: key of PROMPTS."""
        fields = dict(prompt=(PROMPTS | self.prompts)[mode], **self.device_fields)
        if mode in ("think", "audio_cot"):
            fields["max_new_tokens"] = self.max_new_tokens
        return fields

    def traces(self, name="traces", manifest=None, **changes):
        """`name`: the teacher's thoughts. `checked`, for others than "traces" `{name}_checked`: the accepted ones."""
        manifest = manifest or self.traced
        teacher = self.server_fields or dict(model=self.teacher, **self.video_fields)
        fields = teacher | self.asked("audio_cot") | self.traces_fields | changes
        checked = "checked" if name == "traces" else f"{name}_checked"
        return [Traces(name=name, manifest=manifest, **fields),
                self.fact_check(checked, f"@{name}", manifest, **self.checker_fields)]

    def fact_check(self, name, traces, manifest, **fields):
        return FactCheck(name=name, traces=traces, manifest=manifest, **self.asked("check"), **fields)

    def test_traces(self, **changes):
        """test_traces, test_traces_checked: thoughts on the main split, for test-time distillation and the gallery."""
        return self.traces("test_traces", self.splits[self.main_split]["manifest"], **changes)

    def labels(self):
        return [Label(name="teacher_labels", model=self.teacher, manifest=self.train, media="video",
                      **self.asked("direct"), **self.video_fields)]

    def verifier(self, limit, **fields):
        """verifier: a small network, trained on `limit` verdicts of the checker (`calibration`), judges test_traces."""
        where = "@test_traces", self.splits[self.main_split]["manifest"]
        return [self.fact_check("calibration", *where, trace_filter="calibration", limit=limit, **self.checker_fields),
                self.fact_check("verifier", *where, checker="verifier", model=self.student,
                                verdicts="@calibration/verdicts.jsonl", **fields)]

    def trained(self, name):
        """The training stage of a row of LADDER or CONTROLS."""
        row = ROWS[name]
        fields = dict(media="audio", val_manifest=self.val, **self.asked(row.mode), **row.fields)
        fields |= self.grpo_fields if row.stage is GRPO else self.sft_fields
        if row.fields == VOTES and self.traced != self.train:  # most clips have no traces
            fields |= LETTERS
        if name == "continued":
            fields |= {key: self.grpo_fields[key] for key in ("trainable", "max_steps")}
        manifest = getattr(self, row.manifest)
        return [row.stage(name=name, model=row.model or self.student, manifest=manifest, **fields)]

    def switch(self):
        """switch: on which clips of the train split the teacher knows more than the student, by their letters on the
        analysis split (teacher_analysis, student_analysis)."""
        asked = dict(manifest=self.analysis, **self.device_fields)
        seen = dict(model=self.teacher, media="video", **self.video_fields)
        heard = dict(model=self.student, media="audio")
        return [
            Evaluate(name="teacher_analysis", **seen, **asked),
            Evaluate(name="student_analysis", **heard, **asked),
            Switch(
                name="switch",
                teacher="@teacher_analysis",
                student="@student_analysis",
                manifest=self.analysis,
                train_manifest=self.train,
                **self.switch_fields,
            ),
        ]

    def on_policy(self, name="on_policy", **changes):
        """`name`: after SFT the student writes and is rewarded as in GRPO, and the teacher, where the switch lets it,
        scores every token. changes: fields of OnPolicy."""
        prompt = self.asked("audio_cot")["prompt"]
        teacher = dict(teacher_model=self.teacher, teacher_prompt=prompt, gate="learned")
        fields = teacher | self.rewarded_fields() | self.video_fields | changes
        if fields["gate"] == "learned":
            fields["switch"] = "@switch"
        return [OnPolicy(name=name, **fields)]

    def rewarded_only(self, name="grpo", **changes):
        """`name`: the same without a teacher's scores, GRPO."""
        return [GRPO(name=name, **self.rewarded_fields() | changes)]

    def rewarded_fields(self):
        fields = dict(model="@sft", manifest=self.train, media="audio", val_manifest=self.val, **self.asked("think"))
        return fields | self.rewarded | self.grpo_fields

    def compared(self):
        """SFT, GRPO after it and `on_policy`: evaluated on every split, and a report."""
        rows = {"SFT": "sft", "SFT, then GRPO": "grpo", "SFT, then GRPO and the teacher's KL": "on_policy"}
        stages, tables = [], {}
        for title, name in rows.items():
            tables[title] = {split: f"@{name}_{split}" for split in self.splits}
            for split in self.splits:
                stages.append(self.evaluate(f"{name}_{split}", f"@{name}", "think", split=split))
        sft, grpo, taught = rows
        report = Report(
            tables=tables,
            differences={"gained by GRPO": (grpo, sft), "gained by the teacher's KL": (taught, grpo)},
            scored={taught: "@on_policy/completions.jsonl"},
            curves={"After SFT": {title: f"@{rows[title]}/log.jsonl" for title in (grpo, taught)}},
            switch="@switch",
            clips=self.splits[self.main_split]["manifest"],
            clips_of=self.main_split,
            gallery=tuple(rows),
        )
        return [*stages, report]

    def evaluate(self, name, model, mode, media="audio", split=None, **fields):
        """An Evaluate stage, on the main split if none is named. mode: key of PROMPTS."""
        fields |= dict(answer="generate", media=media, **self.asked(mode))
        if media != "audio":
            fields |= self.video_fields
        return Evaluate(name=name, model=model, **fields | self.splits[split or self.main_split])

    def evaluated(self, name):
        """`{name}_{column}` for every column: direct or thinking, as the row was trained."""
        model, mode, media = self.student, "direct", UNTRAINED.get(name, "audio")
        if name not in UNTRAINED:
            model, mode = f"@{name}", ROWS[name].mode
        stages = []
        for split in self.splits:
            stages.append(self.evaluate(f"{name}_{split}", model, mode, media, split))
        return stages

    def modes(self, rows):
        """The rows of MODES, or of others like it, that have a model, and the teacher's thoughts on the main split."""
        stages = self.test_traces()
        for row in rows.values():
            if row.model is not None:
                model = {"student": self.student, "teacher": self.teacher}.get(row.model, row.model)
                shown = dict(traces="@test_traces") if row.mode == "trace" else {}
                stages.append(self.evaluate(row.name, model, row.mode, row.media, **shown))
        return stages

    def ladder(self, *rows):
        """Training and Evaluate stages of rows of LADDER or CONTROLS, named by stage; of all of LADDER, if none is."""
        stages = []
        for name in rows or LADDER.values():
            if name not in UNTRAINED:
                stages += self.trained(name)
            stages += self.evaluated(name)
        return stages

    def report(self, rows=LADDER, modes=None, verifier=False):
        """rows: {title: training stage}, a table of all columns. modes: as MODES, a table of the main split."""
        ladder, curves = {}, {"GRPO": {}, "SFT": {}}
        for title, name in rows.items():
            ladder[title] = {split: f"@{name}_{split}" for split in self.splits}
            if name not in UNTRAINED:
                curves["GRPO" if "GRPO" in title else "SFT"][title] = f"@{name}/log.jsonl"
        names = dict(student=short_name(self.student), teacher=short_name(self.teacher))
        tables = {}
        for title, row in (modes or {}).items():
            tables[title.format(**names)] = {self.main_split: f"@{row.name}"}
        learned = {"traces": "@traces/results.json", "checked": "@checked/results.json"}
        tested = {"traces": "@test_traces/results.json", "checked": "@test_traces_checked/results.json"}
        if verifier:
            tested["verifier"] = "@verifier/results.json"
        return [Report(
            name="report", published="sightsound", tables=tables or ladder, ablation=ladder if tables else None,
            clips=self.splits[self.main_split]["manifest"], clips_of=self.main_split,
            traces="@test_traces", verdicts="@test_traces_checked/verdicts.jsonl",
            gallery=tuple(title for title, name in rows.items() if name in ("before", "sft", "grpo")),
            curves={title: lines for title, lines in curves.items() if lines},
            funnel={"to learn from": learned, f"on {self.main_split}": tested},
        )]  # fmt: skip


def avqa(*, data="data", **changes):
    """The paper's models, data and settings; "not stated" marks what the paper leaves open. data: folder with avqa/,
    mmau/, mmar/ and music_avqa/ as tools/prepare_*.py write them. changes: fields of SightSound, others than here."""
    # not stated: where LoRA is put (here every projection of the decoder), weight decay, warm-up, clipping
    training = dict(weight_decay=0.0, warmup_ratio=0.05, max_grad_norm=1.0, epochs=100)
    sft = dict(lora_rank=8, lora_alpha=16.0, lr=5e-5, batch_size=64, micro_batch_tokens=6912, max_steps=2000,
               eval_every=250)
    # "full-parameter": here the decoder; the clipping of the ratio, 0.2, is not stated either
    grpo = dict(trainable="decoder", lr=1e-6, batch_size=24, micro_batch_tokens=6144, max_steps=1000, eval_every=100)
    grpo |= dict(moments="8bit", reference="host")  # so that it fits 80 GB
    return replace(SightSound(
        student="Qwen/Qwen2-Audio-7B-Instruct",
        teacher=TEACHER,
        checker_fields=dict(model=OMNI_7B),  # the paper's is GPT-4o-audio
        traced=f"{data}/avqa/train.jsonl",
        train=f"{data}/avqa/train.jsonl",
        truth=f"{data}/avqa/train.jsonl",
        val=f"{data}/avqa/val.jsonl",
        splits={"avqa": dict(manifest=f"{data}/avqa/val.jsonl"),
                "mmau": dict(manifest=f"{data}/mmau/test-mini.jsonl", rule="mmau"),
                "music_avqa": dict(manifest=f"{data}/music_avqa/test.jsonl"),
                "mmar": dict(manifest=f"{data}/mmar/test.jsonl", rule="mmau")},
        main_split="avqa",
        device_fields=dict(device="cuda", dtype="bfloat16"),
        video_fields=dict(fps=1.0, min_pixels=100_352, max_pixels=262_144),  # not stated; XMD's
        traces_fields=dict(num_samples=8, temperature=1.0),  # neither is stated
        sft_fields=sft | training,
        grpo_fields=dict(group_size=8, temperature=1.0, beta=0.04) | grpo | training,
        analysis=f"{data}/vggsound/analysis.jsonl",
        switch_fields=dict(weights="models/Cnn14_16k_mAP=0.438.pth", device="cuda"),
    ), **changes)  # fmt: skip


def toy(updates=200):
    """The toy world's, of stage Toy with thinking=True. Thoughts cost most: they are of 144 clips. updates: GRPO's."""
    thinking = "{question}\n{options}\nThink, then answer."
    training = dict(trainable="full", lr=3e-4, batch_size=24, micro_batch_tokens=16_384)
    return SightSound(
        student="@toy/student",
        teacher="@toy/teacher",
        checker_fields=dict(model="@toy/checker"),
        traced="@toy/traced.jsonl",
        train="@toy/train.jsonl",
        truth="@toy/train_truth.jsonl",
        splits={"test": dict(manifest="@toy/test.jsonl")},
        main_split="test",
        prompts={"think": thinking, "audio_cot": thinking, "check": "{trace}\nIs that true?",
                 "trace": "{trace}\n" + PROMPT},
        max_new_tokens=24,  # with long thoughts 80
        video_fields=dict(min_pixels=3_136, max_pixels=3_136),  # the clips are 56 x 56
        traces_fields=dict(num_samples=4),
        sft_fields=dict(epochs=1000, max_steps=100, **training),
        grpo_fields=dict(epochs=100, max_steps=updates, **training),
        analysis="@toy/analysis.jsonl",
        switch_fields=dict(width=1 / 16, clip_s=1.0, epochs=6, lr=3e-3, augment="spec"),
        rewarded=dict(manifest="@toy/train_truth.jsonl"),
    )  # fmt: skip
