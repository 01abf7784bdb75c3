"""SightSound-R1, Tables 1 and 2: Qwen2.5-VL-32B reasons about silent videos; Qwen2-Audio-7B learns to reason by ear.

    python -m minixmd.train sightsound            (prompts, shapes and memory alone: … sightsound --dry-run)

First tools/prepare_avqa.py, prepare_mmau.py and prepare_music_avqa.py write data/avqa, data/mmau and data/music_avqa
(README). The checker is a local Qwen2.5-Omni-7B; recipe sightsound_endpoint uses one like the paper's GPT-4o-audio.

CUDA GPUs; the paper had eight A40. Not measured by anybody yet. By --dry-run all stages but GRPO of the whole decoder
(167 GiB) fit one GPU of 80 GB; there, train an adapter in GRPO. The paper: Qwen2-Audio 67.1 with direct answers and
57.7 with zero-shot CoT on AVQA; on MMAU test-mini 59.5 before, 52.3 by SFT on one unfiltered trace, 54.1 with AGFV,
53.5 with several traces, 56.2 with GRPO; on MUSIC-AVQA 55.6, 55.1, 56.5, 58.2 and 59.5. As in the paper, the split of
Table 1 also chooses the best weights.
"""
from minixmd.recipe_parts.sightsound import LADDER, MODES, avqa

sound = avqa()
stages = sound.traces() + sound.labels() + sound.modes() + sound.others() + sound.ladder() + sound.report(LADDER, MODES)
