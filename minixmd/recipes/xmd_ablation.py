"""XMD's Table 2: every way to distil Qwen2-VL into Qwen2-Audio, and the gates that the paper leaves out.

    python -m minixmd.train xmd_ablation run_dir=runs/xmd_audio      (after xmd_audio, whose finished stages it reuses)

Data and checkpoints as in xmd_audio. One CUDA GPU of 24 GB or more; the paper had an L40 of 48 GB.
Not measured by anybody yet. By --dry-run, on an H200 at 40 % of its peak: seven distillations beside xmd_audio's, 2
hours each, and 0.5 each to evaluate. The report has the paper's figures.
"""
from minixmd.recipe_parts.xmd import vggsound

xmd = vggsound()
stages = xmd.before() + xmd.switch("audio") + xmd.ablation("audio")
stages += xmd.report("audio", ablation=True)
