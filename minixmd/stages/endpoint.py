"""Asks an OpenAI-compatible endpoint, such as a vLLM server: several requests at a time, each answer on disk at once.

A request that fails is tried again. One that keeps failing is counted under its reason and not written down, so that
the same command asks it again. Any other status than these means a wrong key, model or URL and stops the stage at once:

    the endpoint's fault          timed out, no connection, rate limited (HTTP 429), server error (5xx)
    possibly the clip's fault     rejected (400, 413, 422; not tried again), nonsense (no chat completion, or no use)"""
import base64
import io
import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool

import av
import soundfile
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError  # that of requests below version 1, then of httpx
from tqdm import tqdm

from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.contained import Contained
from minixmd.inputs.examples import build_conversation
from minixmd.inputs.media import AV_ERRORS, MediaError, film, open_media, read_audio, read_frames
from minixmd.runs.records import append_jsonl, read_endpoint_answers
from minixmd.runs.seeds import hash_seed

TOP_LOGPROBS = 20  # of the first token; OpenAI and vLLM give no more
MAX_RETRY_AFTER_S = 60.0  # a server that asks for a longer pause is asked again after so long
DETAIL_CHARS = 300  # of the server's words that a failed request's record quotes
CACHED_CLIPS = 16  # that are kept as they are sent: all requests about a clip are made in a row
REASONS = {400: "rejected", 408: "timed out", 413: "rejected", 422: "rejected", 429: "rate limited"}
ENDPOINT_FAULTS = ("timed out", "no connection", "rate limited", "server error")
CLIP_FAULTS = ("rejected", "nonsense")


@dataclass(frozen=True)
class Request:
    key: str  # unique; names the answer in the file
    make_messages: Callable  # function(load), called by a thread: the chat messages; load: clip_part in a child process
    seed: int = 0  # of the server's sampling


def ask_endpoint(stage, requests, path, unit, *, max_tokens, temperature, logprobs=False, needs_logprobs=False,
                 is_usable=bool):
    """Makes every request that `path` does not answer yet, with a progress bar.

    stage: that asks. path: JSONL file that grows by a line an answer: the records below that are not bad. OSError: it
    cannot. logprobs: ask for the first token's log-probs too; needs_logprobs: a server that gives none stops the stage
    at once. is_usable: function(text) -> bool; an unusable answer is nonsense.
    Returns a record a request, in order: {"key", "text", "finished": the model ended its turn}, with log-probs, where
    the server gave any, also "top": {token: logprob}; or {"key", "bad": reason, "detail"}. Raises ValueError: a
    malformed line of `path`; a wrong URL, key or model; more than max_bad failed requests; or an endpoint that is down:
    3 * concurrency requests in a row without an answer, through its fault, or any if it has given none at all."""
    records = read_endpoint_answers(path)
    todo = [request for request in requests if request.key not in records]
    answered, failed_in_a_row = len(records), 0
    options = {"model": stage.served, "max_tokens": max_tokens, "temperature": temperature}
    if logprobs:
        options.update(logprobs=True, top_logprobs=TOP_LOGPROBS)
    client = _Client(stage, key_from(stage.api_key_env, stage.name), options, is_usable)
    # a ThreadPool's threads are daemons: an interrupt does not wait for their requests, as it would for an executor's
    pool = ThreadPool(min(stage.concurrency, len(todo)) or 1)
    with pool, tqdm(total=len(requests), initial=len(requests) - len(todo), desc=stage.name, unit=unit) as bar:
        try:
            for record in pool.imap_unordered(client.answer, todo):
                if "bad" not in record:
                    append_jsonl(path, record, sync=True)
                    answered, failed_in_a_row = answered + 1, 0
                elif record["bad"] in ENDPOINT_FAULTS or record["bad"] in CLIP_FAULTS and not answered:
                    failed_in_a_row += 1
                if failed_in_a_row == 3 * stage.concurrency:
                    raise ValueError(f"{stage.name}: {stage.endpoint} failed {failed_in_a_row} requests in a row, at "
                                     f"last with {record['bad']} ({record['detail']}); {path} keeps its {answered} "
                                     "answers, and the same command goes on from there")
                records[record["key"]] = record
                bar.update()
                if needs_logprobs and "top" not in record and "bad" not in record:
                    raise ValueError(f"{stage.name}: {stage.endpoint} gives no log-probs; set answer='generate', and "
                                     "another run_dir")
        finally:
            client.stop.set()
            client.contained.stop()
    results = [records[request.key] for request in requests]
    failures = [record for record in results if "bad" in record]
    if len(failures) > stage.max_bad * len(requests):
        reasons = dict(Counter(record["bad"] for record in failures).most_common())
        raise ValueError(f"{stage.name}: {len(failures)} of {len(requests)} requests came to nothing ({reasons}), with "
                         f"max_bad {stage.max_bad}; the first: {failures[0]['detail']}; the same command asks for "
                         "those again, and with a larger max_bad goes on without them")
    return results


def ask_about(stage, examples, path, unit, *, num_samples, traces=None, **options):
    """[an Example's `num_samples` records of ask_endpoint], in order. traces: {id: text for the prompt's {trace}}."""
    requests = []
    for example in examples:
        make_messages = partial(messages, example, stage.media, stage.prompt, (traces or {}).get(example.id, ""))
        for i in range(num_samples):
            seed = hash_seed(stage.seed, example.id, i) % 2**31
            requests.append(Request(f"{example.id}/{i}", make_messages, seed))
    answers = ask_endpoint(stage, requests, path, unit, **options)
    return [answers[i:i + num_samples] for i in range(0, len(answers), num_samples)]


def key_from(variable, name):
    """An environment variable's key, or "". Raises ValueError, naming stage `name` alone, if no header holds it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{name}: environment variable {variable} holds a character that no key has")
    return key


class _Client:
    """Makes requests; its methods are called by several threads. `stop` ends their waits and their work."""

    def __init__(self, stage, api_key, options, is_usable):
        self.stage, self.api_key, self.options, self.is_usable = stage, api_key, options, is_usable
        self.stop = threading.Event()
        self.contained = Contained(clip_part, stage.clip_limit_s)
        self.load = lru_cache(CACHED_CLIPS)(self.contained)
        # given no key, InferenceClient would send the user's token for the hub
        self.http = InferenceClient(base_url=stage.endpoint, timeout=stage.timeout_s, api_key=api_key or "EMPTY")

    def answer(self, request):
        """The record of a request, after as many attempts as it takes and the stage allows."""
        try:
            messages = request.make_messages(self.load)
        except MediaError as error:
            return {"key": request.key, "bad": error.reason, "detail": str(error)}
        reason, detail, pause_s = "stopped", "", 0.0
        for i in range(self.stage.attempts):
            if self.stop.wait(pause_s):
                break
            try:
                reply = self.http.chat_completion(messages, seed=request.seed, **self.options)
                return {"key": request.key, **self._read_reply(reply)}
            except Exception as error:  # whatever a strange reply makes the client stumble over
                reason, detail, retry_after_s = self._failure(error)
            if reason == "rejected":
                break
            pause_s = max(self.stage.retry_backoff_s * 2**i, min(retry_after_s, MAX_RETRY_AFTER_S))
        return {"key": request.key, "bad": reason, "detail": detail}

    def _read_reply(self, reply):
        """A record's fields but the key; whatever is raised means nonsense."""
        choice = reply.choices[0]
        text, reason = choice.message.content, choice.finish_reason
        if not isinstance(text, str) or not text.strip() or reason not in ("stop", "length"):
            raise ValueError(f"text {text!r}, finish_reason {reason!r}")
        text.encode()  # half a surrogate pair could not be passed on
        if not self.is_usable(text):
            raise ValueError(f"text {text!r}")
        record = {"text": text, "finished": reason == "stop"}
        if "logprobs" in self.options and choice.logprobs and choice.logprobs.content:
            record["top"] = {}
            first = choice.logprobs.content[0]
            for candidate in (first, *(first.top_logprobs or ())):
                if not isinstance(candidate.token, str) or not -math.inf < candidate.logprob < 0.01:
                    raise ValueError(f"log-prob {candidate.logprob!r} of token {candidate.token!r}")
                record["top"][candidate.token] = candidate.logprob
        return record

    def _failure(self, error):
        """(reason, detail, seconds that the server asks to wait) of an error; ValueError where no retry can help."""
        known = isinstance(error, OSError | HTTPError)  # else the client stumbled, perhaps over an error page's body
        response = getattr(error if known else error.__context__, "response", None)
        detail = f"{type(error).__name__}: {error}"
        if response is not None:
            detail = f"HTTP {response.status_code}: {response.text}"
        if self.api_key:
            detail = detail.replace(self.api_key, "***")
        detail = " ".join(detail.split())[:DETAIL_CHARS]
        if response is None:
            if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:  # requests has a class of its own
                return "timed out", detail, 0.0
            return "no connection" if known else "nonsense", detail, 0.0
        reason = REASONS.get(response.status_code)
        if reason is None and response.status_code < 500:
            self.stop.set()  # no thread shall ask like this again
            key = f"{'the' if self.api_key else 'no'} key in environment variable {self.stage.api_key_env}"
            raise ValueError(f"{self.stage.name}: {self.stage.endpoint} refuses model {self.stage.served!r}, asked "
                             f"with {key}: {detail}") from None
        pause = response.headers.get("Retry-After", "")
        return reason or "server error", detail, float(pause) if pause.isdecimal() else 0.0


def messages(example, media, prompt, trace, load):
    """Chat messages that show an Example's clip, as `load` encodes it, and ask; arguments as build_conversation."""
    [turn] = build_conversation(example, media=media, prompt=prompt, trace=trace)
    *clips, text = turn["content"]
    parts = [load(clip[clip["type"]], clip["type"]) for clip in clips]
    return [{"role": "user", "content": [*parts, text]}]


def clip_part(path, kind):
    """The part of a message that shows a "video", or plays an "audio"."""
    return audio_part(path) if kind == "audio" else silent_video_part(path)


def silent_video_part(path):
    """The part of a message that shows a video without its sound: an MP4 with the packets of its first video track, as
    they are. Raises MediaError as read_frames, and "unreadable" for a codec that MP4 does not take (VP8, GIF)."""
    read_frames(path)  # refuses a broken clip, which a server's decoder might pass off as a shorter one
    mp4 = io.BytesIO()
    try:
        with open_media(path) as clip, av.open(mp4, "w", "mp4") as silent:
            track = film(clip, path)
            copy = silent.add_stream_from_template(track, opaque=True)
            for packet in clip.demux(track):
                if packet.size:  # the last packet is empty: it is there to flush a decoder
                    packet.stream = copy
                    silent.mux(packet)
    except AV_ERRORS as error:
        raise MediaError(path, "unreadable", f"cannot be copied to MP4: {error}") from None
    data = base64.b64encode(mp4.getvalue()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


def audio_part(path):
    """The part of a message that plays a clip: read_audio's 16 kHz mono as a 16-bit WAV, clipped at full scale."""
    wav = io.BytesIO()
    soundfile.write(wav, read_audio(path).numpy(), SAMPLE_RATE, subtype="PCM_16", format="WAV")
    data = base64.b64encode(wav.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
