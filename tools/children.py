"""Do jobs in child processes that may hang or crash: only the job is lost, and its result says how."""
import os
import re
import resource
import signal
import time
from collections import deque
from dataclasses import dataclass
from math import ceil, inf
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import torch

AHEAD = 32  # tasks taken per child, so that one that takes long does not stop the others
MAX_BYTES = 4 << 30  # of memory that one child may come to need
GRACE_S = 5  # a child whose parent died ends itself so much later than the parent would have ended it


@dataclass
class Task:
    """Something that has its result already, or a job that gives it one."""

    what: object
    result: dict | None = None
    job: tuple | None = None  # arguments of the function


def run_tasks(tasks, function, *, workers, limit_s, preload=()):
    """Yield the tasks in order, each with its result.

    Args:
        tasks: iterable of Task, taken as needed.
        function: of a module, or a partial of one; function(*job) returns a result. An OSError that it raises ends
            everything, any other exception is a crash.
        workers: how many children do jobs at a time; none is started before there is a job.
        limit_s: seconds that a job may take before its child is killed.
        preload: names of modules that children need, imported once for all of them.
    A job that was lost has the result {"reason": "crashed" | "out of time" | "out of memory", "detail"}.
    """
    context = get_context("forkserver")  # children start in no time, share their memory and hold none of our locks
    context.set_forkserver_preload(["__main__", *preload])
    tasks, window, todo, children, more = iter(tasks), deque(), deque(), [], True
    try:
        while more or window:
            while more and len(todo) < workers and len(window) < AHEAD * workers:
                if more := (task := next(tasks, None)) is not None:
                    window.append(task)
                    if task.result is None:
                        todo.append(task)
            while window and window[0].result is not None:
                yield window.popleft()
            free = sum(not child.task for child in children)  # idle or still starting
            for _ in range(min(len(todo) - free, workers - len(children))):
                children.append(Child(context, function, limit_s))
            for child in [child for child in children if child.ready and not child.task][: len(todo)]:
                if child.give(todo[0]):
                    todo.popleft()
                else:
                    _end(child, children)
            if window and window[0].result is None and children:
                _attend(children)
    finally:
        for child in list(children):
            _end(child, children)


def _attend(children):
    """Wait until a child has said something, ended or run out of time; the ended ones leave the list."""
    soonest = min(child.deadline for child in children)
    speaking = wait([child.pipe for child in children], None if soonest == inf else max(0, soonest - time.monotonic()))
    for child in list(children):
        if child.pipe in speaking:
            if not child.receive():
                _end(child, children)
        elif time.monotonic() > child.deadline:
            child.task.result = {"reason": "out of time", "detail": f"more than {child.limit_s:g} s"}
            _end(child, children)


def _end(child, children):
    children.remove(child)
    child.process.kill()
    child.process.join(GRACE_S)  # one that waits for a dead disk cannot be killed; it is left behind
    child.pipe.close()


class Child:
    """A process that does one job at a time, as its parent sees it."""

    def __init__(self, context, function, limit_s):
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, function, limit_s), daemon=True)
        self.process.start()
        end.close()  # so that the child's death ends the pipe
        self.limit_s, self.ready, self.task, self.deadline = limit_s, False, None, inf

    def give(self, task):
        """False if the child died while it waited."""
        try:
            self.pipe.send(task.job)
        except OSError:
            return False
        self.task, self.deadline = task, time.monotonic() + self.limit_s
        return True

    def receive(self):
        """Take what the child has to say; False if it is no more."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE_S)
            code = self.process.exitcode  # below 0: minus the number of the signal
            if not self.ready:
                raise OSError(f"a child process ended before its first job (exit code {code})") from None
            if self.task:
                self.task.result = {"reason": "crashed", "detail": f"exit code {code}"}
            return False
        if isinstance(said, OSError):
            raise said
        if self.ready:
            self.task.result, self.task, self.deadline = said, None, inf
        self.ready = True
        return True


def serve(pipe, function, limit_s):
    """A child's life: take a job, send its result, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    torch.set_num_threads(1)
    _limit_memory()
    pipe.send("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write notes of their own to where the progress bar lives
    try:
        while True:
            job = pipe.recv()
            signal.alarm(ceil(limit_s) + GRACE_S)
            try:
                result = function(*job)
            except OSError as error:
                result = error
            except MemoryError:
                result = {"reason": "out of memory", "detail": f"more than {MAX_BYTES >> 30} GiB"}
            except Exception as error:
                result = {"reason": "crashed", "detail": f"{type(error).__name__}: {error}"}
            signal.alarm(0)
            pipe.send(result)
    except (EOFError, OSError):
        return


def _limit_memory():
    """This process may come to hold MAX_BYTES more than now; no limit where the system does not say what it holds."""
    status = Path("/proc/self/status")
    if status.exists() and (held := re.search(r"VmData:\s+(\d+) kB", status.read_text())):
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = (int(held[1]) << 10) + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
