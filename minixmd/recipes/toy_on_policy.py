"""On-policy distillation on the toy world: a vision model scores, token by token, what an audio model says it hears.

    python -m minixmd.train toy_on_policy       (another world: … toy_on_policy seed=1 run_dir=runs/toy_on_policy-1)

CPU, 2 cores; its time was not measured yet. The student first learns to reason from the teacher's traces (SFT). Then it
writes eight answers to every clip. GRPO rewards right ones; `on_policy` adds KL(teacher || student) at every token, of
a teacher that sees the silent clip and reads the student's words. A switch that listens lets it speak only on clips
where it knows more.
"""
from minixmd.config import Toy
from minixmd.recipe_parts.sightsound import toy

sound = toy(updates=100)
stages = [Toy(name="toy", thinking=True)] + sound.traces() + sound.trained("sft") + sound.switch()
stages += sound.rewarded_only() + sound.on_policy() + sound.compared()
