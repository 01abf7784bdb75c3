"""XMD's Table 1 with all its models, and Figure 1: three conditions, models and people.

    python -m minixmd.train xmd_models run_dir=runs/xmd_audio      (after xmd_audio, whose finished stages it reuses)

Data and checkpoints as in xmd_audio. Qwen2.5-VL sees silent videos, Qwen2.5-Omni videos with their sound. The models
that are not built here answer through tools/answers_of.py, for each of the splits analysis and test:

    python tools/answers_of.py MODEL data/vggsound/test.jsonl data/answers/NAME_test.jsonl

with NAME qwen_audio_chat, kimi_audio or videollama3. People answer about the classes that the models chose

    python tools/listening_test.py data/vggsound/analysis.jsonl data/people --classes RUN/distilled_report/classes.txt

with RUN runs/xmd_audio; what they send back goes to data/people/returned. With --keep-going the report is made without
what is not there, and names it.

One CUDA GPU of 24 GB or more. Not measured by anybody yet. By --dry-run, on an H200 at 40 % of its peak: 6 hours beside
xmd_audio's; at most 21 GiB, a model at a time; figures in the report.
"""
from dataclasses import replace

from minixmd.config.prompts import OPEN_PROMPT
from minixmd.recipe_parts.xmd import vggsound

xmd = vggsound()
stages = xmd.before() + xmd.switch("audio") + xmd.distilled("audio")
stages += xmd.evaluated("qwen25_vl", "Qwen/Qwen2.5-VL-7B-Instruct", "video")
stages += xmd.evaluated("omni", "Qwen/Qwen2.5-Omni-7B", "sounded")
stages += xmd.evaluated("audio_open", xmd.models["audio"], "audio", ["analysis"], prompt=OPEN_PROMPT)
rows = {"Qwen2.5-VL-7B-Instruct": xmd.cells("qwen25_vl"), "Qwen2.5-Omni": xmd.cells("omni"),
        "Qwen2-Audio-7B-Instruct, without options": xmd.cells("audio_open", ["analysis"])}  # fmt: skip
others = {"Qwen-Audio-Chat (7B)": "qwen_audio_chat", "Kimi-Audio-7B-Instruct": "kimi_audio",
          "VideoLLaMA 3": "videollama3"}  # fmt: skip
for title, name in others.items():
    stages += xmd.answered(name, "data/answers")
    rows[title] = xmd.cells(name, ["analysis", "test"])
stages += xmd.people("data/people")
models = {"Qwen2-Audio": "audio", "Qwen2-VL": "video", "Qwen2.5-Omni": "omni"}
senses = {}  # Figure 1: drawn on the clips that choose its classes, as in the paper, and on others
for split in ("analysis", "test"):
    senses[split] = {title: f"@{name}_{split}" for title, name in models.items()}
senses["analysis"] |= {"Human ears": "@people_ears", "Human eyes": "@people_eyes",
                       "Human ears and eyes": "@people_both"}  # fmt: skip
(report,) = xmd.report("audio", rows=rows, senses=senses)
stages.append(replace(report, name="models_report"))
