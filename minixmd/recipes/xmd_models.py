"""XMD's Table 1 with two more models: Qwen2.5-VL on silent videos, Qwen2.5-Omni on videos with their sound.

    python -m minixmd.train xmd_models run_dir=runs/xmd_audio      (after xmd_audio, whose finished stages it reuses)

Data and checkpoints as in xmd_audio. One CUDA GPU of 24 GB or more. Not measured by anybody yet. By --dry-run, on an
H200 at 40 % of its peak: 3 hours beside xmd_audio's; at most 21 GiB, a model at a time; figures in the report.
"""
from dataclasses import replace

from minixmd.recipe_parts.xmd import TITLES, vggsound

xmd = vggsound()
others = (xmd.evaluated("qwen25_vl", "Qwen/Qwen2.5-VL-7B-Instruct", "video")
          + xmd.evaluated("omni", "Qwen/Qwen2.5-Omni-7B", "sounded"))  # fmt: skip
titles = TITLES | {"distilled": "Qwen2-Audio distilled from Qwen2-VL"}
rows = {"Qwen2.5-VL-7B-Instruct": xmd.cells("qwen25_vl"), "Qwen2.5-Omni": xmd.cells("omni")}
(report,) = xmd.report(titles, "audio", rows=rows)
stages = xmd.before() + xmd.switch("audio") + xmd.distilled("audio") + others + [replace(report, name="models_report")]
