"""After SightSound-R1's SFT: Qwen2.5-VL-7B watches the silent clip and scores every token that Qwen2-Audio-7B writes.

    python -m minixmd.train sightsound_on_policy      (prompts, shapes and memory alone: … --dry-run)

As recipe sightsound, but with a teacher of 7B, and beside GRPO `on_policy`: the same rewards, and KL(teacher ||
student) at every token, on the clips where a switch lets the teacher speak. The switch learns on VGGSound's analysis
split (data/vggsound, by tools/prepare_vggsound.py), whose clips have classes, and hears AVQA's.

One CUDA GPU of 80 GB, by --dry-run; not measured by anybody yet. On 141 GB add on_policy.teacher_place=device.
"""
from minixmd.recipe_parts.sightsound import VL_7B, avqa

sound = avqa(teacher=VL_7B)
stages = sound.traces() + sound.trained("sft") + sound.switch()
stages += sound.rewarded_only() + sound.on_policy(teacher_place="host") + sound.compared()
