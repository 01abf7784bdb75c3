"""SightSound-R1 with the teacher on a vLLM server and the paper's checker: the rows with AGFV, both behind endpoints.

    OPENAI_API_KEY=… python -m minixmd.train sightsound_endpoint

`vllm serve Qwen/Qwen2.5-VL-32B-Instruct` is the teacher's server. It receives each clip's video stream without the
sound and chooses the frames itself. If it is not at localhost:8000, add
traces.endpoint=http://HOST:PORT/v1 test_traces.endpoint=http://HOST:PORT/v1

The checker receives the sound. Each server has a key of its own, read from the environment and never written to disk:
OPENAI_API_KEY goes to the checker alone; TEACHER_API_KEY, if the teacher's server wants one, to that server alone.
Answers are kept: no request is repeated once it was answered. One CUDA GPU of 80 GB beside the server's, for 23 hours
by --dry-run; data as in recipe sightsound. Not measured by anybody yet: 8 thoughts of 40,000 clips are 320,000 requests
to the server, and the checker gets one request for each trace that is left.
"""
from minixmd.recipe_parts.sightsound import ALONE, LADDER, TEACHER, avqa

remote = dict(checker="endpoint", endpoint="https://api.openai.com/v1", served="gpt-4o-audio-preview")
sound = avqa(checker_fields=remote, traces_fields=dict(num_samples=8, temperature=1.0),
             server_fields=dict(endpoint="http://localhost:8000/v1", served=TEACHER, api_key_env="TEACHER_API_KEY"))
shown = "before", "first", "checked_first", "sft", "grpo"
rows = ALONE | {title: name for title, name in LADDER.items() if name in shown}
stages = sound.traces() + sound.test_traces() + sound.ladder(*rows.values()) + sound.report(rows)
