"""How questions are put: format strings over {question} {options} {first} {last}, options being lettered lines, and
where a trace is shown, {trace}. The papers print none of theirs but the first's last line; these are ours.
"""
PROMPT = "{question}\n{options}\nRespond only with a single letter from {first} to {last}."
# the form that GRPO rewards; also zero-shot chain of thought, for a model that has not learnt it
THINK_PROMPT = ("{question}\n{options}\nThink first, between <think> and </think>. Then give the letter of your "
                "answer, from {first} to {last}, between <answer> and </answer>.")
# to a teacher that sees the silent video
AUDIO_COT_PROMPT = (
    "The video is silent. Its sound track answers this question:\n{question}\n{options}\nThink step by step about "
    "what would be heard: which things in the picture make a sound, what each of them sounds like, and in which order. "
    "Name no sound for which you see no cause. Write these thoughts between <think> and </think>, as if you had heard "
    "the sound itself and without mentioning the video. Then give the letter of your answer, from {first} to {last}, "
    "between <answer> and </answer>.")  # fmt: skip
# to a checker that hears it
CHECK_PROMPT = (
    "Somebody who could not hear this audio was asked:\n{question}\n{options}\nThis was the reasoning:\n{trace}\n"
    "Listen to the audio. Is every sound that the reasoning claims really there, and does nothing that is heard "
    "contradict it? Answer only yes or no.")  # fmt: skip
# test-time distillation: the student is shown its teacher's trace
TRACE_PROMPT = ("{question}\n{options}\nSomebody who saw the scene, but could not hear it, reasoned:\n{trace}\nRespond "
                "only with a single letter from {first} to {last}.")
