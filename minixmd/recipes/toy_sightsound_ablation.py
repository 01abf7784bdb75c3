"""SightSound-R1's two tables on the toy world: every row of the ladder, every mode without training, and a verifier.

    python -m minixmd.train toy_sightsound_ablation    (another world: … seed=1 run_dir=runs/toy_sightsound_ablation-1)

CPU, 2 cores, about half an hour with one thread (by arithmetic), 0.8 GB. `python -m bench.toy_sightsound RUN…` pools
several worlds and checks the claims. Controls: as many more steps of SFT as GRPO has, and GRPO on the clips with traces
alone.
"""
from minixmd.config import Toy
from minixmd.recipe_parts.sightsound import ALONE, CONTROLS, LADDER, Mode, toy

sound = toy()
MODES = {
    "student, question alone": Mode("alone_test"),
    "student, direct": Mode("before_test"),
    "student, zero-shot CoT": Mode("cot", "student", "think"),
    "student, test-time CoT": Mode("test_time", "student", "trace"),
    "teacher, direct": Mode("teacher", "teacher", media="video"),
    "teacher, CoT": Mode("teacher_cot", "teacher", "think", "video"),
}
stages = [Toy(name="toy", thinking=True)] + sound.traces() + sound.labels() + sound.modes(MODES)
stages += sound.verifier(limit=640, width=1 / 16, clip_s=1.0, epochs=30, lr=3e-3)
stages += sound.ladder() + sound.ladder(*(ALONE | CONTROLS).values())
stages += sound.report(ALONE | LADDER | CONTROLS, MODES, verifier=True)
