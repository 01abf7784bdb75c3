"""XMD's ablation (Table 2) and its other direction (Table 1's last row) on the toy world.

    python -m minixmd.train toy_ablation            (another world: … toy_ablation seed=1 run_dir=runs/toy_ablation-1)

CPU, 2 cores, about 10 minutes with one thread, 0.9 GB. On seeds 0 to 2 the learned switch ends 14 points above the gate
"always" and 10 above "never", no anti-forgetting loss 8 below it; ground truth is no better.
"""
from minixmd.config import Toy
from minixmd.recipe_parts.xmd import XMD

xmd = XMD(
    models={"audio": "@toy/student", "video": "@toy/teacher"},
    train="@toy/train.jsonl",
    truth="@toy/train_truth.jsonl",
    splits={split: f"@toy/{split}.jsonl" for split in ("analysis", "test", "unseen")},
    model_fields={"audio": dict(media="audio"), "video": dict(media="video", min_pixels=3_136, max_pixels=3_136)},
    train_fields=dict(trainable="full", lr=6e-4, epochs=2, batch_size=32),
    switch_fields=dict(width=1 / 16, clip_s=1.0, epochs=6, lr=3e-3, augment="spec"),
)  # fmt: skip
other = dict(name="video_distilled", switch="@video_switch")
stages = [Toy(name="toy")] + xmd.before() + xmd.switch("audio") + xmd.switch("video", "video_switch")
stages += xmd.ablation("audio") + xmd.distilled("video", **other)
stages += xmd.report("audio", rows={"teacher distilled from student": xmd.cells("video_distilled")}, ablation=True)
