"""From examples to Prompts: building one, building many ahead of time, and grouping them by tokens."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from minixmd.inputs.clips import Cache, load_clip
from minixmd.inputs.contained import LIMIT_S, Contained, num_workers
from minixmd.inputs.examples import build_conversation
from minixmd.inputs.media import MediaError
from minixmd.runs.heartbeat import beat


def build_prompt(processor, example, prompt_format, answer=None, trace="", load=load_clip, max_new_tokens=0):
    """The Prompt that asks an example's question, as a config.PromptFormat says; answer, trace: build_conversation's,
    load, max_new_tokens: Processor's. Raises MediaError: an unusable clip. ValueError, naming the example: all else."""
    conversation = build_conversation(example, media=prompt_format.media, prompt=prompt_format.template, answer=answer,
                                      trace=trace, video_options=prompt_format.video_options)
    try:
        return processor(conversation, load, max_new_tokens)
    except MediaError:
        raise
    except ValueError as error:
        raise ValueError(f"example {example.id!r}: {error}") from error


def prefetch(function, items, on_bad, *, load=load_clip, reading=None, ahead=16, workers=None):
    """function(item, load) for every item, in order, computed by threads up to `ahead` items early.

    load: function(path, …) that reads a file; `function` is given it Contained. reading: config.ClipReading, whose
    cache `load` uses. workers: files read at a time; None = num_workers(). on_bad(item, error): for a MediaError."""
    items = iter(items)
    if reading is not None and reading.cache is not None:
        load = partial(load, cache=Cache(reading.cache, reading.cache_gib))
    workers = workers or num_workers()
    contained = Contained(load, reading.limit_s if reading else LIMIT_S, workers)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            while True:
                for item in islice(items, ahead + 1 - len(waiting)):
                    waiting.append((item, pool.submit(function, item, contained)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                error = future.exception()
                beat()
                yield on_bad(item, error) if isinstance(error, MediaError) else future.result()
        finally:
            contained.stop()
            pool.shutdown(cancel_futures=True)


def cut_by_tokens(lengths, most):
    """Numbers of items in lists of at most `most` tokens: the longest first, each into the first list that has room."""
    cuts, rooms = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for cut, room in enumerate(rooms):
            if lengths[i] <= room:
                cuts[cut].append(i)
                rooms[cut] -= lengths[i]
                break
        else:
            cuts.append([i])
            rooms.append(most - lengths[i])
    return [sorted(cut) for cut in cuts]


def batch_by_tokens(pairs, batch_tokens):
    """Runs of (item, Prompt) whose prompts together hold at most batch_tokens; a longer prompt goes alone."""
    run, tokens = [], 0
    for item, prompt in pairs:
        if run and tokens + len(prompt) > batch_tokens:
            yield run
            run, tokens = [], 0
        run.append((item, prompt))
        tokens += len(prompt)
    if run:
        yield run
