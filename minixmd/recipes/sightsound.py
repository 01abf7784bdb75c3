"""SightSound-R1, Tables 1 and 2: Qwen2.5-VL-32B reasons about silent videos; Qwen2-Audio-7B learns to reason by ear.

    python -m minixmd.train sightsound            (prompts, shapes and memory alone: … sightsound --dry-run)

First tools/prepare_avqa.py, prepare_mmau.py, prepare_mmar.py and prepare_music_avqa.py write data/avqa, data/mmau,
data/mmar and data/music_avqa (README). The checker is a local Qwen2.5-Omni-7B; recipe sightsound_endpoint uses one like
the paper's GPT-4o-audio.

One CUDA GPU of 80 GB; the paper had eight A40. Not measured by anybody yet. By --dry-run, for 40,425 clips to train on
and 16,910 of AVQA to test on, on an H200 at 40 % of its peak: 63 hours, 17 of them GRPO, 16 SFT, 12 the 32B's traces;
with the decode slots that fit 80 GB, 18 more for these. Eight such GPUs take 9. GRPO of the whole decoder takes 67 GiB
with 8-bit moments and its reference on the host; on a card of 141 GB add grpo.moments=float32 grpo.reference=device
(and grpo_labels's): 125 GiB. All but the 32B and GRPO fits 48 GB, GRPO on eight of them, too. As in the paper, the
split of Table 1 also chooses the best weights, here 1,000 of its clips. The report has the paper's figures.
"""
from minixmd.recipe_parts.sightsound import ALONE, LADDER, MODES, avqa

sound = avqa()
rows = ALONE | LADDER
stages = sound.traces() + sound.labels() + sound.modes(MODES) + sound.ladder(*rows.values()) + sound.report(rows, MODES)
