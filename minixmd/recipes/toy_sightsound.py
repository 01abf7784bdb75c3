"""SightSound-R1 on the toy world: a vision model writes what would be heard, a checker listens, an audio model learns.

    python -m minixmd.train toy_sightsound       (another world: … toy_sightsound seed=1 run_dir=runs/toy_sightsound-1)

CPU, 2 cores, 7 minutes, 1.1 GB. The teacher, which cannot hear, names a wrong sound in three thoughts of ten; the
checker rejects those. The student learns to reason from the rest, of 144 clips, then by GRPO on the teacher's letters
of all 1,920.
"""
from minixmd.config import Toy
from minixmd.recipe_parts.sightsound import toy

sound = toy(updates=50)
rows = {"question alone": "alone", "before": "before", "SFT": "sft", "SFT, then GRPO": "grpo"}
stages = [Toy(name="toy", thinking=True)] + sound.traces() + sound.labels() + sound.ladder(*rows.values())
stages += sound.test_traces(num_samples=1) + sound.report(rows)
