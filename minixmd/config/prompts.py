"""How questions are put: format strings over {question} {options} {first} {last} and, where a trace is shown, {trace}.
{options} are lettered lines. The papers print none of their prompts but the first one's last line; the rest is ours."""
from dataclasses import dataclass, field

PROMPT = "{question}\n{options}\nRespond only with a single letter from {first} to {last}."
OPEN_PROMPT = "What makes the sound in this clip? Answer with its name alone."  # without options
# the form that GRPO rewards; also zero-shot chain of thought, for a model that has not learnt it
THINK_PROMPT = ("{question}\n{options}\nThink first, between <think> and </think>. Then give the letter of your "
                "answer, from {first} to {last}, between <answer> and </answer>.")
AUDIO_COT_PROMPT = (  # to a teacher that sees the silent video
    "The video is silent. Its sound track answers this question:\n{question}\n{options}\nThink step by step about "
    "what would be heard: which things in the picture make a sound, what each of them sounds like, and in which order. "
    "Name no sound for which you see no cause. Write these thoughts between <think> and </think>, as if you had heard "
    "the sound itself and without mentioning the video. Then give the letter of your answer, from {first} to {last}, "
    "between <answer> and </answer>.")  # fmt: skip
CHECK_PROMPT = (  # to a checker that hears the clip
    "Somebody who could not hear this audio was asked:\n{question}\n{options}\nThis was the reasoning:\n{trace}\n"
    "Listen to the audio. Is every sound that the reasoning claims really there, and does nothing that is heard "
    "contradict it? Answer only yes or no.")  # fmt: skip
# test-time distillation: the student is shown its teacher's trace
TRACE_PROMPT = ("{question}\n{options}\nSomebody who saw the scene, but could not hear it, reasoned:\n{trace}\nRespond "
                "only with a single letter from {first} to {last}.")


@dataclass(frozen=True)
class ClipReading:
    """How the clips of a stage are read; inputs/prompts.prefetch reads them so."""
    limit_s: float = 60.0  # seconds that one file may take
    cache: str | None = None  # folder, as inputs/clips.py keeps it
    cache_gib: float = 100.0


@dataclass(frozen=True)
class PromptFormat:
    """What a stage shows of a clip and how it asks; inputs/prompts.build_prompt makes a Prompt of it."""
    media: str  # "audio" | "video" | "both" | "sounded", a video with its sound track
    template: str  # one of the format strings above
    video_options: dict = field(default_factory=dict)  # fps, min_pixels, max_pixels, nframes
    reading: ClipReading = ClipReading()

    @property
    def asks_for_letter(self):
        """Whether an answer is to be an option's letter rather than its words."""
        return "{first}" in self.template or "{last}" in self.template
