"""From examples to Prompts: building one, building many ahead of time, and grouping them by tokens."""
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from minixmd.inputs.examples import build_conversation
from minixmd.inputs.media import MediaError


def build_prompt(processor, example, prompt_format, answer=None, trace=""):
    """The Prompt that asks an example's question, as a config.PromptFormat says; answer, trace: build_conversation's.

    Raises MediaError: the clip cannot be used. ValueError: another fault; the example is named.
    """
    conversation = build_conversation(example, media=prompt_format.media, prompt=prompt_format.template, answer=answer,
                                      trace=trace, video_options=prompt_format.video_options)
    try:
        return processor(conversation)
    except MediaError:
        raise
    except ValueError as error:
        raise ValueError(f"example {example.id!r}: {error}") from error


def check_length(processor, example, prompt, max_new_tokens):
    """Raises ValueError where a prompt and what is to be written after it are over the model's limit."""
    if len(prompt) + max_new_tokens > processor.max_positions:
        raise ValueError(f"example {example.id!r}: the prompt's {len(prompt)} tokens and max_new_tokens "
                         f"{max_new_tokens} are over the model's limit of {processor.max_positions}")


def prefetch(function, items, on_bad, ahead=16):
    """function(item) for every item, in order, computed by threads up to `ahead` items early.

    on_bad(item, error) takes the place of a MediaError: what cannot be used is caught here, and by endpoint.py.
    """
    items = iter(items)
    workers = max(2, min(8, (os.cpu_count() or 2) // 2))
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            while True:
                for item in items:
                    waiting.append((item, pool.submit(function, item)))
                    if len(waiting) > ahead:
                        break
                if not waiting:
                    return
                item, future = waiting.popleft()
                error = future.exception()
                yield on_bad(item, error) if isinstance(error, MediaError) else future.result()
        finally:
            pool.shutdown(cancel_futures=True)


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
