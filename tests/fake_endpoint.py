"""An OpenAI-compatible endpoint on loopback that can be told to fail.

    with FakeEndpoint(replies, first_attempts(FAULTS)) as endpoint:
        ask(endpoint.base_url)
    assert len(endpoint.requests) == ...
"""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

# those that a further attempt may mend -> the reason under which they are counted
FAULTS = {
    "time out": "timed out", "408": "timed out", "close": "no connection", "cut": "no connection",
    "cut error": "no connection", "429": "rate limited", "500": "server error", "503": "server error",
    "error list": "server error",
} | dict.fromkeys((
    "html", "not utf-8", "a number", "a list", "no choices", "empty choices", "choices of text", "no message",
    "null text", "empty text", "blank text", "list text", "number text", "half a character", "no finish",
    "number finish", "odd finish"), "nonsense")  # fmt: skip


class Request(NamedTuple):
    body: dict
    key: str | None  # what it was authorized with
    fault: str | None  # what was done to it
    time_s: float  # time.monotonic()


class FakeEndpoint:
    """Answers POST /v1/chat/completions with what `replies` says, or fails as `faults` says.

    replies: (messages, seed) -> the text, or a dict of "text" and, as wanted, "finish_reason" and "top": {token:
        logprob} of the first token, which is sent when log-probs are asked for.
    faults: (n, body) -> what to do to the n-th request, counted from 0: None, one of FAULTS, "429 after SECONDS",
        "no log-probs", a 400 that says so, or any other status as a string, such as "401". Called under a lock.
    `requests` lists all that came in, `base_url` is where, `most` how many were being answered at a time.
    """

    def __init__(self, replies, faults=lambda n, body: None):
        self.replies, self.faults = replies, faults
        self.requests, self.most, self._open = [], 0, 0
        self._lock, self._closing = threading.Lock(), threading.Event()

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.fake = self
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, body, key):
        """(status, headers, bytes), or None to hang up without a word."""
        with self._lock:
            fault = self.faults(len(self.requests), body)
            self.requests.append(Request(body, key, fault, time.monotonic()))
            self._open += 1
            self.most = max(self.most, self._open)
        try:
            if fault == "time out":
                self._closing.wait(120)
            if fault in ("time out", "close"):
                return None
            said = self.replies(body["messages"], body["seed"])
            said = {"finish_reason": "stop", **(said if isinstance(said, dict) else {"text": said})}
            return _faulty(fault, _completion(said, body), key)
        finally:
            with self._lock:
                self._open -= 1


def first_attempts(faults):
    """A schedule in which the first attempt of every request fails, by the faults in turn, and no other one."""
    faults, seen = list(faults), set()

    def schedule(n, body):
        which = json.dumps([body["messages"], body["seed"]])
        if which in seen:
            return None
        seen.add(which)
        return faults[(len(seen) - 1) % len(faults)]

    return schedule


def closed_url():
    """A URL at which nobody listens."""
    with FakeEndpoint(None) as endpoint:
        return endpoint.base_url


def _completion(said, body):
    choice = {"index": 0, "message": {"role": "assistant", "content": said["text"]}, "logprobs": None,
              "finish_reason": said["finish_reason"]}
    if body.get("logprobs") and "top" in said:
        top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in said["top"].items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}, {**top[-1], "top_logprobs": []}]}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}


def _faulty(fault, reply, key):
    """(status, headers, bytes) of a reply to which a fault has been done."""
    status, headers, kind = 200, {}, "application/json"
    choice = reply["choices"][0]
    fault, _, after = (fault or "").partition(" after ")
    if fault.isdecimal():
        status, headers = int(fault), {"Retry-After": after} if after else {}
        reply = {"error": {"message": f"no, not with {key}", "code": status}}
    elif fault == "no log-probs":
        status, reply = 400, {"error": {"message": "logprobs is not supported with this model", "code": 400}}
    elif fault == "error list":
        status, reply = 500, ["out of", "order"]
    elif fault == "cut error":
        status = 500
    elif fault == "html":
        reply, kind = "<html><body>Please log in</body></html>", "text/html"
    elif fault in ("a number", "a list"):
        reply = {"a number": 7, "a list": [reply]}[fault]
    elif fault in ("no choices", "empty choices", "choices of text"):
        reply["choices"] = {"no choices": None, "empty choices": [], "choices of text": "yes"}[fault]
    elif fault == "no message":
        del choice["message"]
    elif fault.endswith(" text"):
        choice["message"]["content"] = {"null text": None, "empty text": "", "blank text": " \n", "list text": ["yes"],
                                        "number text": 7}[fault]
    elif fault == "half a character":
        choice["message"]["content"] = "yes \ud83d"
    elif fault.endswith(" finish"):
        choice["finish_reason"] = {"no finish": None, "number finish": 7, "odd finish": "content_filter"}[fault]
    data = reply.encode() if kind == "text/html" else json.dumps(reply).encode()
    if fault == "not utf-8":
        data = b'{"choices": "\xff\xfe"}'
    headers = {"Content-Type": kind, "Content-Length": str(len(data)), **headers}
    return status, headers, data[:len(data) // 2] if fault.startswith("cut") else data


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, address):
        pass  # a client that was killed or lost patience


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        known = self.path == "/v1/chat/completions"
        found = self.server.fake.answer(body, key) if known else (404, {}, b'{"detail": "Not Found"}')
        if found is not None:
            status, headers, data = found
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass
