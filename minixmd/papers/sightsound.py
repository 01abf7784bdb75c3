"""The stages of SightSound-R1 over any teacher that sees and any student that hears: recipes differ in those alone.

    clips ─ Traces (n thoughts each) ─ FactCheck (true of the sound?) ─ SFT ─ GRPO on the teacher's labels ─ Evaluate

LADDER has the rows of the paper's Table 2, in its order; what a row leaves out, it leaves out of this line.
"""
from dataclasses import dataclass, field

from minixmd.config import GRPO, SFT, Distill, Evaluate, FactCheck, Label, Report, Traces
from minixmd.config.prompts import AUDIO_COT_PROMPT, CHECK_PROMPT, PROMPT, THINK_PROMPT, TRACE_PROMPT

LADDER = {  # row -> name of its Train stage; "before" is the student itself
    "Direct inference": "before",
    "SFT (ground-truth labels)": "truth",
    "SFT (distilled labels)": "labels",
    "GRPO (distilled labels)": "grpo_labels",
    "SFT": "first",
    "AGFV + SFT": "checked_first",
    "TTS + AGFV + SFT": "sft",
    "TTS + AGFV + SFT + GRPO": "grpo",
}
CONTROLS = {"SFT continued": "continued", "SFT, then GRPO, on the traces' clips alone": "grpo_traced"}  # ours
MODES = {  # row of Table 1 -> name of its Evaluate stage, of `modes` and `others`
    "Qwen2.5-Omni-3B (audio), direct": "omni3b_audio",
    "Qwen2.5-Omni-7B (audio), direct": "omni7b_audio",
    "Qwen2-Audio-7B-Instruct, direct": "before_avqa",
    "Qwen2-Audio-7B-Instruct, zero-shot CoT": "cot",
    "Qwen2-Audio-7B-Instruct, test-time CoT distillation": "test_time",
    "Qwen2-Audio-7B-Instruct, SFT (ground truth)": "truth_avqa",
    "Qwen2.5-Omni-3B (video), direct": "omni3b_video",
    "Qwen2.5-Omni-7B (video), direct": "omni7b_video",
    "Qwen2.5-VL-7B-Instruct, direct": "vl7b",
    "Qwen2.5-VL-32B-Instruct, direct": "teacher",
    "Qwen2.5-VL-32B-Instruct, zero-shot CoT": "teacher_cot",
    "Qwen2.5-VL-32B-Instruct, zero-shot audio CoT": "teacher_audio_cot",
    "Qwen2.5-Omni-3B, direct": "omni3b",
    "Qwen2.5-Omni-7B, direct": "omni7b",
}
OTHERS = {  # the models that Table 1 has beside teacher and student: stage -> model and what it is shown
    "omni3b_audio": ("Qwen/Qwen2.5-Omni-3B", "audio"), "omni7b_audio": ("Qwen/Qwen2.5-Omni-7B", "audio"),
    "omni3b_video": ("Qwen/Qwen2.5-Omni-3B", "video"), "omni7b_video": ("Qwen/Qwen2.5-Omni-7B", "video"),
    "vl7b": ("Qwen/Qwen2.5-VL-7B-Instruct", "video"),
    "omni3b": ("Qwen/Qwen2.5-Omni-3B", "sounded"), "omni7b": ("Qwen/Qwen2.5-Omni-7B", "sounded"),
}  # fmt: skip
DIRECT = ("before", "truth", "labels")  # these rows answer by letter, the others think first


@dataclass(frozen=True)
class SightSound:
    """A student, a teacher, a checker and what they are asked. Each method returns a list of stages."""

    student: str
    teacher: str  # folder or hub name, also where it is served
    checking: dict  # fields of FactCheck that say who judges
    traced: str  # manifest of the clips that the teacher thinks about
    train: str  # manifest of those whose label the teacher gives; may be the same
    truth: str  # the same clips with true answers, for the upper bound alone
    splits: dict[str, dict]  # {column of the tables: fields of Evaluate, the manifest among them}
    shared: str  # the column on which teacher and student are compared, in every mode (the paper's Table 1)
    serving: dict = field(default_factory=dict)  # endpoint, served, api_key_env: who samples in the teacher's place
    val: str | None = None  # manifest by which the best weights are chosen; None = the last ones
    prompts: dict[str, str] = field(default_factory=dict)  # in place of ASKED's
    seeing: dict = field(default_factory=dict)  # fields of every stage that shows a video to a model here
    running: dict = field(default_factory=dict)  # of every stage: device, dtype …
    written: int = 512  # tokens of thoughts and answer
    sampling: dict = field(default_factory=dict)  # of Traces
    evaluating: dict = field(default_factory=dict)  # of Evaluate
    sft: dict = field(default_factory=dict)  # of Train
    grpo: dict = field(default_factory=dict)  # of Train, in GRPO

    def ask(self, name):
        return {"direct": PROMPT, "think": THINK_PROMPT, "audio_cot": AUDIO_COT_PROMPT, "trace": TRACE_PROMPT,
                "check": CHECK_PROMPT, **self.prompts}[name]

    def seen(self):
        return dict(media="video", **self.seeing, **self.running)

    # ---- the teacher's thoughts ----

    def traces(self, name="traces", manifest=None, **how):
        """`name`: the teacher's thoughts. `checked` (of others than "traces", `{name}_checked`): those accepted."""
        manifest = manifest or self.traced
        who = self.serving or dict(model=self.teacher, **self.seeing)  # a server chooses the frames itself
        fields = dict(prompt=self.ask("audio_cot"), max_new_tokens=self.written, media="video") | who | self.running
        return [Traces(name=name, manifest=manifest, **fields | self.sampling | how),
                FactCheck(name="checked" if name == "traces" else f"{name}_checked", traces=f"@{name}",
                          manifest=manifest, prompt=self.ask("check"), **self.checking, **self.running)]

    def test_traces(self, **how):
        """test_traces and test_traces_checked: thoughts on the column `shared`, for test-time distillation and to look
        at; of all stages only `verifier` learns from them."""
        return self.traces("test_traces", self.splits[self.shared]["manifest"], **how)

    def labels(self):
        """teacher_labels: the letters of the teacher on every clip of the train split."""
        return [Label(name="teacher_labels", model=self.teacher, manifest=self.train, prompt=self.ask("direct"),
                      **self.seen())]

    def rewarded(self):
        """What GRPO after SFT rewards: the unanimous labels, where the train split was sampled, else the letters."""
        return "@traces/labels.jsonl" if self.traced == self.train else "@teacher_labels"

    def verifier(self, limit, **how):
        """verifier: a small one, trained on `limit` verdicts of the checker (`calibration`), judges all test_traces."""
        same = dict(traces="@test_traces", manifest=self.splits[self.shared]["manifest"], prompt=self.ask("check"),
                    **self.running)
        return [FactCheck(name="calibration", trace_filter="calibration", limit=limit, **self.checking, **same),
                FactCheck(name="verifier", checker="verifier", model=self.student,
                          verdicts="@calibration/verdicts.jsonl", **same, **how)]

    # ---- the student ----

    def trained(self, name, **how):
        """The training stage of a row of LADDER or CONTROLS: "continued" is SFT for as many more steps as GRPO has."""
        direct = dict(prompt=self.ask("direct"))
        think = dict(prompt=self.ask("think"), max_new_tokens=self.written)
        labels, rewarded = dict(teacher_labels="@teacher_labels"), dict(teacher_labels=self.rewarded())
        checked = dict(traces="@checked", trace_filter="unanimous")
        continued = {key: self.grpo[key] for key in ("trainable", "max_steps") if key in self.grpo}
        kind, model, manifest, fields = {
            "truth": (SFT, self.student, self.truth, direct | self.sft),
            "labels": (Distill, self.student, self.train, direct | labels | self.sft),
            "grpo_labels": (GRPO, self.student, self.train, think | labels | self.grpo),
            "first": (SFT, self.student, self.traced,
                      think | dict(traces="@traces", trace_filter="first") | self.sft),
            "checked_first": (SFT, self.student, self.traced,
                              think | dict(traces="@checked", trace_filter="first") | self.sft),
            "sft": (SFT, self.student, self.traced, think | checked | self.sft),
            "continued": (SFT, "@sft", self.traced, think | checked | self.sft | continued),
            "grpo": (GRPO, "@sft", self.train, think | rewarded | self.grpo),
            "grpo_traced": (GRPO, "@sft", self.traced, think | rewarded | self.grpo),
        }[name]
        if self.val is not None:
            fields = fields | dict(val_manifest=self.val)
        return [kind(name=name, model=model, manifest=manifest, media="audio", **self.running | fields | how)]

    def evaluated(self, name, model=None, mode=None, **how):
        """`{name}_{column}` for every column: direct or thinking, as the row has learnt."""
        mode = mode or ("direct" if name in DIRECT else "think")
        fields = dict(media="audio", prompt=self.ask(mode), answer="generate", **self.running)
        fields |= {} if mode == "direct" else dict(max_new_tokens=self.written)
        return [Evaluate(name=f"{name}_{column}", model=model or (self.student if name == "before" else f"@{name}"),
                         **fields | split | self.evaluating | how) for column, split in self.splits.items()]

    def modes(self):
        """How teacher and student do without training (Table 1), on the column `shared`: the student thinking, the
        student shown the teacher's thoughts, the teacher directly, thinking, and thinking of the sound."""
        split, running = self.splits[self.shared], self.running
        common = dict(answer="generate", **split) | self.evaluating
        think = dict(max_new_tokens=self.written)
        stages = [Evaluate(name="cot", model=self.student, media="audio", prompt=self.ask("think"), **think, **common,
                           **running)]
        stages += self.test_traces()
        stages += [Evaluate(name="test_time", model=self.student, media="audio", prompt=self.ask("trace"),
                            traces="@test_traces", **common, **running)]
        return stages + [Evaluate(name=name, model=self.teacher, prompt=self.ask(mode), **more, **common, **self.seen())
                         for name, mode, more in (("teacher", "direct", {}), ("teacher_cot", "think", think),
                                                  ("teacher_audio_cot", "audio_cot", think))
                         if mode != "audio_cot" or self.ask(mode) != self.ask("think")]

    def others(self, models=None):
        """OTHERS, or more of them, asked directly on the column `shared`."""
        split = dict(answer="generate", prompt=self.ask("direct"), **self.splits[self.shared]) | self.evaluating
        return [Evaluate(name=name, model=model, **split, **(self.seen() | dict(media=media)))
                for name, (model, media) in (models or OTHERS).items()]

    def ladder(self, *rows):
        """Train and Evaluate stages of rows of LADDER, in its order; of all, if none is named."""
        return [stage for name in rows or LADDER.values()
                for stage in (*([] if name == "before" else self.trained(name)), *self.evaluated(name))]

    # ---- the report ----

    def cells(self, name):
        return {column: f"@{name}_{column}" for column in self.splits}

    def report(self, rows=LADDER, modes=None, verifier=False):
        """Two tables: modes, {title: name of an Evaluate stage} on `shared`; rows, {title: name} on every column. The
        gallery needs `test_traces`."""
        tables = {title: {self.shared: f"@{name}"} for title, name in (modes or {}).items()}
        ladder = {title: self.cells(name) for title, name in rows.items()}
        logs = {title: f"@{name}/log.jsonl" for title, name in rows.items() if name != "before"}
        curves = {"GRPO": {title: log for title, log in logs.items() if "GRPO" in title},
                  "SFT": {title: log for title, log in logs.items() if "GRPO" not in title}}
        funnel = {title: {"traces": f"@{traces}/results.json", "checked": f"@{checked}/results.json"}
                  for title, traces, checked in (("to learn from", "traces", "checked"),
                                                 (f"on {self.shared}", "test_traces", "test_traces_checked"))}
        if verifier:
            funnel[f"on {self.shared}"]["verifier"] = "@verifier/results.json"
        return [Report(name="report", published="sightsound", tables=tables or ladder,
                       ablation=ladder if tables else None, clips=self.splits[self.shared]["manifest"],
                       clips_of=self.shared, traces="@test_traces", verdicts="@test_traces_checked/verdicts.jsonl",
                       gallery=tuple(title for title, name in rows.items() if name in ("before", "sft", "grpo")),
                       curves={title: lines for title, lines in curves.items() if lines}, funnel=funnel)]


TEACHER, STUDENT = "Qwen/Qwen2.5-VL-32B-Instruct", "Qwen/Qwen2-Audio-7B-Instruct"


def avqa(*, data="data", student=STUDENT, teacher=TEACHER, checking=None, **how):
    """The paper's models, data and settings; what it does not state is said beside the value.

    Args:
        data: folder with avqa/ (train.jsonl, val.jsonl), mmau/ (test-mini.jsonl) and music_avqa/ (test.jsonl), as
            tools/prepare_*.py write them from the official files.
        checking: fields of FactCheck; None = a local Qwen2.5-Omni-7B. The paper's checker is GPT-4o-audio.
        how: more fields of SightSound, in place of these.
    """
    gpu = dict(device="cuda", dtype="bfloat16")
    # not stated: where LoRA is put (here every projection of the decoder), weight decay, warm-up, clipping
    learning = dict(weight_decay=0.0, warmup_ratio=0.05, max_grad_norm=1.0)
    return SightSound(**dict(
        student=student,
        teacher=teacher,
        checking=checking or dict(model="Qwen/Qwen2.5-Omni-7B"),
        traced=f"{data}/avqa/train.jsonl",
        train=f"{data}/avqa/train.jsonl",
        truth=f"{data}/avqa/train.jsonl",
        val=f"{data}/avqa/val.jsonl",
        splits={"avqa": dict(manifest=f"{data}/avqa/val.jsonl"),
                "mmau": dict(manifest=f"{data}/mmau/test-mini.jsonl", rule="mmau"),
                "music_avqa": dict(manifest=f"{data}/music_avqa/test.jsonl")},
        shared="avqa",
        seeing=dict(fps=1.0, min_pixels=100_352, max_pixels=262_144),  # not stated; XMD's
        running=gpu,
        written=512,  # not stated
        sampling=dict(num_samples=8, temperature=1.0, decode_slots=16),  # neither is stated
        sft=dict(lora_rank=8, lora_alpha=16.0, lr=5e-5, batch_size=64, micro_batch_size=8, epochs=100, max_steps=2000,
                 eval_every=250, **learning),
        # "full-parameter": here the decoder; the clipping of the ratio, 0.2, is not stated either
        grpo=dict(trainable="decoder", group_size=8, batch_size=24, micro_batch_size=1, decode_slots=16, lr=1e-6,
                  temperature=1.0, beta=0.04, epochs=100, max_steps=1000, eval_every=100, **learning),
    ) | how)  # fmt: skip


def toy(updates=200, **how):
    """The toy world's (stage Toy with thinking=True). Thoughts cost the most, so they are of 72 clips; the teacher's
    letters, which GRPO rewards, are of all 2,400 of the train split.

    updates: of GRPO. how: more fields of SightSound, in place of these.
    """
    return SightSound(**dict(
        student="@toy/student",
        teacher="@toy/teacher",
        checking=dict(model="@toy/checker"),
        traced="@toy/traced.jsonl",
        train="@toy/train.jsonl",
        truth="@toy/train_truth.jsonl",
        splits={"test": dict(manifest="@toy/test.jsonl")},
        shared="test",
        prompts={"think": "{question}\n{options}\nThink, then answer.", "check": "{trace}\nIs that true?",
                 "audio_cot": "{question}\n{options}\nThink, then answer.",
                 "trace": "{trace}\n{question}\n{options}\nRespond only with a single letter from {first} to {last}."},
        seeing=dict(min_pixels=3_136, max_pixels=3_136),  # the clips are 56 x 56
        written=40,
        sampling=dict(num_samples=4),
        sft=dict(trainable="full", lr=3e-4, batch_size=24, micro_batch_size=24, epochs=1000, max_steps=100),
        grpo=dict(trainable="full", lr=3e-4, batch_size=24, micro_batch_size=24, epochs=100, max_steps=updates),
    ) | how)  # fmt: skip
