"""XMD the other way: Qwen2-Audio teaches Qwen2-VL on VGGSound, gated by a switch that still listens (Table 1).

    python -m minixmd.train xmd_video                              (alone)
    python -m minixmd.train xmd_video run_dir=runs/xmd_audio       (after xmd_audio, whose finished stages it reuses)

Data and checkpoints as in xmd_audio. One CUDA GPU of 24 GB or more. Not measured by anybody yet. By --dry-run, on an
H200 at 40 % of its peak: 13 hours for the stages that xmd_audio has too, 11 for distillation on 1,660 tokens a clip, 3
to evaluate it; at most 21 GiB. The report has the paper's figures.
"""
from minixmd.recipe_parts.xmd import vggsound

xmd = vggsound()
names = dict(name="video_distilled", switch="@video_switch")
stages = (xmd.before() + xmd.switch("video", "video_switch") + xmd.distilled("video", **names)
          + xmd.report("video", **names))  # fmt: skip
