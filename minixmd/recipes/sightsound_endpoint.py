"""SightSound-R1 with the teacher on a vLLM server and the paper's checker: the rows AGFV needs, both behind endpoints.

    OPENAI_API_KEY=… python -m minixmd.train sightsound_endpoint

`vllm serve Qwen/Qwen2.5-VL-32B-Instruct` is the teacher's server; it is sent each clip's video stream without its
sound and chooses the frames itself. Elsewhere than at localhost:8000 two stages ask it: add
traces.endpoint=http://HOST:PORT/v1 test_traces.endpoint=http://HOST:PORT/v1

The checker is sent the sound. Each server has a key of its own, read from the environment and written nowhere:
OPENAI_API_KEY goes to the checker alone, TEACHER_API_KEY, if the teacher's server wants one, to that alone. An answer
that came is never asked for again. One CUDA GPU beside the server's; data as in recipe sightsound. Not measured by
anybody yet: 8 thoughts of 40,000 clips are 320,000 requests to the server, and the checker's are as many as traces
survive.
"""
from minixmd.papers.sightsound import LADDER, TEACHER, avqa

remote = dict(checker="endpoint", endpoint="https://api.openai.com/v1", served="gpt-4o-audio-preview")
sound = avqa(checking=remote, sampling=dict(num_samples=8, temperature=1.0),
             serving=dict(endpoint="http://localhost:8000/v1", served=TEACHER, api_key_env="TEACHER_API_KEY"))
rows = {title: name for title, name in LADDER.items() if name in ("before", "first", "checked_first", "sft", "grpo")}
stages = sound.traces() + sound.test_traces() + sound.ladder(*rows.values()) + sound.report(rows)
