"""SightSound-R1, Tables 1 and 2: Qwen2.5-VL-32B reasons about silent videos; Qwen2-Audio-7B learns to reason by ear.

    python -m minixmd.train sightsound            (prompts, shapes and memory alone: … sightsound --dry-run)

First tools/prepare_avqa.py, prepare_mmau.py and prepare_music_avqa.py write data/avqa, data/mmau and data/music_avqa
(README). The checker is a local Qwen2.5-Omni-7B; recipe sightsound_endpoint uses one like the paper's GPT-4o-audio.

CUDA GPUs; the paper had eight A40. Not measured by anybody yet. By --dry-run all stages but GRPO of the whole decoder
(142 GiB; with moments="8bit", 99) fit one GPU of 80 GB; there, train an adapter in GRPO. As in the paper, the split of
Table 1 also chooses the best weights. The report has the paper's figures.
"""
from minixmd.recipe_parts.sightsound import LADDER, MODES, avqa

sound = avqa()
stages = sound.traces() + sound.labels() + sound.modes() + sound.others() + sound.ladder() + sound.report(LADDER, MODES)
