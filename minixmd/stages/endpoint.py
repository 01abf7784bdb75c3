"""Asking an OpenAI-compatible endpoint, such as a vLLM server: several requests at a time, each answer on disk at once.

A request that fails is tried again. One that keeps failing is counted under its reason and not written down, so that
the same command asks it again:

    the endpoint's own   timed out, no connection, rate limited (HTTP 429), server error (5xx)
    perhaps the clip's   rejected (400, 413, 422; not tried again), nonsense (no chat completion, or one of no use)

Any other status means a wrong key, model or URL and stops the stage at once.
"""
import base64
import io
import math
import os
import queue
import re
import threading
from functools import lru_cache

import av
import numpy as np
import soundfile
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError  # that of requests below version 1, then of httpx

from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.media import AV_ERRORS, MediaError, read_audio, read_frames
from minixmd.runs.records import append_jsonl, read_endpoint_answers

TOP_LOGPROBS = 20  # of the first token; OpenAI and vLLM give no more
MAX_RETRY_AFTER_S = 60.0  # an endpoint that wants to be left alone for longer is asked again after so long
DETAIL_CHARS = 300  # of what a failed request's record quotes
HELD_CLIPS = 16  # encoded ones: what is asked about a clip is asked in a row
STATUSES = {400: "rejected", 408: "timed out", 413: "rejected", 422: "rejected", 429: "rate limited"}
ENDPOINTS_OWN = ("timed out", "no connection", "rate limited", "server error")
PERHAPS_CLIPS = ("rejected", "nonsense")


class _Failed(Exception):
    """A failed attempt: reason, detail, and for how many seconds the endpoint wants to be left alone."""


def ask_endpoint(stage, asked, path, progress, *, api_key, max_tokens, temperature, logprobs=False, valid=None):
    """Ask everything that `path` does not answer yet.

    Args:
        stage: Traces or FactCheck, for its name and the fields of config._Remote.
        asked: list of (key, make, seed): a string of its own; a function, called by a thread, that gives the messages
            or raises MediaError; an int.
        path: JSONL file that grows by a line an answer: the records below that are not bad. What it holds is final.
        progress: called with how many more requests are settled.
        api_key: see key_from; None = none.
        logprobs: ask for the first token's log-probs too.
        valid: text -> whether it is of use; None = any is.
    Returns:
        {key: record} in the order of `asked`: {"key", "text", "finished": the model ended its turn}, with log-probs,
        where the endpoint gave some, also "top": {token: logprob}; or {"key", "bad": reason, "detail"}.
    Raises:
        ValueError: a malformed line of `path` (a last one that a kill cut short is dropped); a wrong URL, key or
            model; an endpoint that is down, that is 3 * concurrency requests without an answer for reasons of its own,
            or for any reason if it has never given one.
        OSError: an answer could not be written down.
    """
    answers, bad, in_a_row = read_endpoint_answers(path), {}, 0
    todo, done, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for request in asked:
        if request[0] not in answers:
            todo.put(request)
    count = todo.qsize()
    progress(len(asked) - count)
    client = InferenceClient(base_url=stage.endpoint, timeout=stage.timeout_s,
                             api_key=api_key or "EMPTY")  # given None it would send the user's token for the hub
    options = {"model": stage.served, "max_tokens": max_tokens, "temperature": temperature}
    if logprobs:
        options.update(logprobs=True, top_logprobs=TOP_LOGPROBS)

    def attempt(messages, seed):
        try:
            return _read_reply(client.chat_completion(messages, seed=seed, **options), logprobs, valid)
        except Exception as error:  # whatever a strange reply makes the client stumble over
            raise _failure(error, stage, api_key, logprobs) from None

    def work():
        while not stop.is_set():
            try:
                done.put(_settle(stage, todo.get_nowait(), attempt, stop))
            except queue.Empty:
                return
            except BaseException as error:  # the main thread's to raise
                done.put(error)
                stop.set()

    for _ in range(min(stage.concurrency, count)):
        threading.Thread(target=work, daemon=True).start()  # a daemon: an interrupt does not wait for its request
    try:
        for _ in range(count):
            record = done.get()
            if isinstance(record, BaseException):
                raise record
            if "bad" not in record:
                append_jsonl(path, record, sync=True)
                answers[record["key"]], in_a_row = record, 0
            else:
                bad[record["key"]] = record
                in_a_row += record["bad"] in ENDPOINTS_OWN + (() if answers else PERHAPS_CLIPS)
            if in_a_row == 3 * stage.concurrency:
                raise ValueError(f"{stage.name}: {stage.endpoint} failed {in_a_row} requests in a row, at last with "
                                 f"{record['bad']} ({record['detail']}); {path} keeps its {len(answers)} answers, and "
                                 "the same command goes on from there")
            progress(1)
    finally:
        stop.set()
    return {key: answers.get(key) or bad[key] for key, _, _ in asked}


def key_from(environment, stage):
    """The key in the stage's environment variable, None if there is none. Raises ValueError, without the key, for one
    that no header can hold."""
    key = environment.get(stage.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{stage.name}: environment variable {stage.api_key_env} holds a character that no key has")
    return key or None


@lru_cache(HELD_CLIPS)
def silent_video_part(path):
    """The part of a message that shows a video without its sound: an MP4 with the packets of its first video track, as
    they are, and nothing else.

    Raises:
        MediaError: as read_frames; also "unreadable" for a codec that MP4 does not take (VP8, GIF).
    """
    read_frames(path)  # refuses a broken clip, which a server's decoder might pass off as a shorter one
    mp4 = io.BytesIO()
    try:
        with av.open("file:" + os.fspath(path), metadata_errors="replace") as clip, av.open(mp4, "w", "mp4") as silent:
            track = next(s for s in clip.streams.video if not s.disposition & av.stream.Disposition.attached_pic)
            copy = silent.add_stream_from_template(track, opaque=True)
            for packet in clip.demux(track):
                if packet.size:  # the last packet is empty: it is there to flush a decoder
                    packet.stream = copy
                    silent.mux(packet)
    except AV_ERRORS as error:
        raise MediaError(path, "unreadable", f"cannot be copied to MP4: {error}") from None
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{_base64(mp4)}"}}


@lru_cache(HELD_CLIPS)
def audio_part(path):
    """The part of a message that plays a clip: read_audio's 16 kHz mono as a 16-bit WAV, clipped at full scale."""
    wav = io.BytesIO()
    soundfile.write(wav, read_audio(path).numpy(), SAMPLE_RATE, subtype="PCM_16", format="WAV")
    return {"type": "input_audio", "input_audio": {"data": _base64(wav), "format": "wav"}}


def yes_no(text):
    """True or False if the first word is yes or no, in any case and between any marks, else None."""
    return {"yes": True, "no": False}.get(_first_word(text))


def log_odds(top):
    """log p(yes) - log p(no), each over all its spellings, from the first token's {token: logprob}; None if neither is
    listed.

    If one is not listed, all that is known of it is that it is no likelier than the least likely token listed, nor
    than all that are not listed together. The smaller of the two (at least a millionth) stands in for it.
    """
    listed = {word: [logprob for token, logprob in top.items() if _first_word(token) == word] for word in ("yes", "no")}
    if not any(listed.values()):
        return None
    bound = min(*top.values(), math.log(max(1e-6, 1 - sum(map(math.exp, top.values())))))
    yes, no = (np.logaddexp.reduce(listed[word] or [bound]) for word in ("yes", "no"))
    return float(yes - no)


def _settle(stage, request, attempt, stop):
    """The record of one request, after as many attempts as it takes and the stage allows."""
    key, make, seed = request
    try:
        messages = make()
    except MediaError as error:
        return {"key": key, "bad": error.reason, "detail": str(error)}
    for i in range(stage.attempts):
        try:
            return {"key": key, **attempt(messages, seed)}
        except _Failed as failure:
            reason, detail, pause_s = failure.args
        last = i + 1 == stage.attempts or reason == "rejected"
        if last or stop.wait(max(stage.retry_backoff_s * 2**i, min(pause_s, MAX_RETRY_AFTER_S))):
            break
    return {"key": key, "bad": reason, "detail": detail}


def _read_reply(reply, logprobs, valid):
    """A record's fields but the key; whatever is raised means nonsense."""
    choice = reply.choices[0]
    text, reason = choice.message.content, choice.finish_reason
    if not isinstance(text, str) or not text.strip() or reason not in ("stop", "length"):
        raise ValueError(f"text {text!r}, finish_reason {reason!r}")
    text.encode()  # half a surrogate pair could not be passed on
    if valid is not None and not valid(text):
        raise ValueError(f"text {text!r}")
    record = {"text": text, "finished": reason == "stop"}
    if logprobs and choice.logprobs and choice.logprobs.content:
        first = choice.logprobs.content[0]
        record["top"] = {one.token: one.logprob for one in (first, *(first.top_logprobs or ()))}
        if not all(isinstance(token, str) and -math.inf < logprob < 0.01 for token, logprob in record["top"].items()):
            raise ValueError(f"log-probs {record['top']}")
    return record


def _failure(error, stage, api_key, logprobs):
    """The _Failed for what an attempt raised, or the ValueError for what no further one can mend."""
    broken = isinstance(error, OSError | HTTPError)  # else the client stumbled, perhaps over the body of an error page
    response = getattr(error if broken else error.__context__, "response", None)
    said = f"{type(error).__name__}: {error}" if response is None else f"HTTP {response.status_code}: {response.text}"
    detail = " ".join((said.replace(api_key, "***") if api_key else said).split())[:DETAIL_CHARS]
    if response is None:
        late = isinstance(error, TimeoutError) or "Timeout" in type(error).__name__  # that of requests is another kind
        return _Failed("timed out" if late else "no connection" if broken else "nonsense", detail, 0.0)
    status, pause = response.status_code, response.headers.get("Retry-After", "")
    if status < 500 and status not in STATUSES:
        key = f"{'the' if api_key else 'no'} key in environment variable {stage.api_key_env}"
        return ValueError(f"{stage.name}: {stage.endpoint} refuses model {stage.served!r}, asked with {key}: {detail}")
    if logprobs and STATUSES.get(status) == "rejected" and "logprob" in said.lower():
        detail += " (if the server gives no log-probs, set logprobs=False)"
    return _Failed(STATUSES.get(status, "server error"), detail, float(pause) if pause.isdecimal() else 0.0)


def _base64(buffer):
    return base64.b64encode(buffer.getvalue()).decode()


def _first_word(text):
    found = re.search(r"[^\W_]+", text)
    return found.group().lower() if found else ""
