"""Runs jobs in child processes: one that hangs, crashes or takes too much memory loses only its own result."""
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

TASKS_AHEAD = 32  # tasks taken per worker, so that a slow job does not stop the others
MAX_BYTES = 4 << 30  # of memory that a worker may allocate beyond what it starts with
GRACE_S = 5  # a worker whose parent died ends itself this much later than its parent would have killed it


@dataclass
class Task:
    """An item with its result, or with the job that computes the result."""

    item: object
    result: dict | None = None
    job: tuple | None = None  # arguments of the function


def run_tasks(tasks, function, *, workers, limit_s, preload=()):
    """Yields the tasks in order, each with its result.

    A job that is lost has the result {"reason": "crashed" | "out of time" | "out of memory", "detail": text}.

    Args:
        tasks: iterable of Task, read as needed.
        function: a module's function, or a partial of one: function(*job) returns the result.
        workers: jobs done at a time. No process is started before there is a job.
        limit_s: seconds that a job may take before its worker is killed.
        preload: names of modules that the function needs, imported once for all workers.
    Raises:
        OSError: the function raised one. Any other exception in it counts as a crash.
    """
    tasks, exhausted = iter(tasks), False
    window = deque()  # tasks that were read and not yet yielded
    pool = _Pool(function, workers, limit_s, preload)
    try:
        while window or not exhausted:
            while not exhausted and len(pool.waiting) < workers and len(window) < TASKS_AHEAD * workers:
                task = next(tasks, None)
                if task is None:
                    exhausted = True
                    break
                window.append(task)
                if task.result is None:
                    pool.waiting.append(task)
            while window and window[0].result is not None:
                yield window.popleft()
            pool.assign()
            if window and window[0].result is None:
                pool.wait_for_news()
    finally:
        pool.stop()


class _Pool:
    """The worker processes, and the tasks that wait for one."""

    def __init__(self, function, size, limit_s, preload):
        self.function, self.size, self.limit_s = function, size, limit_s
        self.context = get_context("forkserver")  # fast to start, with shared memory, and free of this process's locks
        self.context.set_forkserver_preload(["__main__", *preload])
        self.workers, self.waiting = [], deque()

    def assign(self):
        """Starts the workers that are missing and gives every idle one a task."""
        unoccupied = sum(worker.task is None for worker in self.workers)  # idle, or still starting
        for _ in range(min(len(self.waiting) - unoccupied, self.size - len(self.workers))):
            self.workers.append(_Worker(self.context, self.function, self.limit_s))
        idle = [worker for worker in self.workers if worker.ready and worker.task is None]
        for worker in idle[:len(self.waiting)]:
            if worker.start(self.waiting[0]):
                self.waiting.popleft()
            else:
                self.end(worker)

    def wait_for_news(self):
        """Blocks until a worker has sent something, died or run out of time."""
        if not self.workers:
            return
        soonest = min(worker.deadline for worker in self.workers)
        timeout = None if soonest == inf else max(0, soonest - time.monotonic())
        readable = wait([worker.pipe for worker in self.workers], timeout)
        for worker in list(self.workers):
            if worker.pipe in readable:
                if not worker.receive():
                    self.end(worker)
            elif time.monotonic() > worker.deadline:
                worker.task.result = {"reason": "out of time", "detail": f"more than {self.limit_s:g} s"}
                self.end(worker)

    def end(self, worker):
        self.workers.remove(worker)
        worker.process.kill()
        worker.process.join(GRACE_S)  # a process that waits for a dead disk cannot be killed; it is left behind
        worker.pipe.close()

    def stop(self):
        for worker in list(self.workers):
            self.end(worker)


class _Worker:
    """A child process that does one job at a time, as its parent sees it."""

    def __init__(self, context, function, limit_s):
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_work, args=(child_end, function, limit_s), daemon=True)
        self.process.start()
        child_end.close()  # so that the child's death closes the pipe
        self.limit_s, self.ready, self.task, self.deadline = limit_s, False, None, inf

    def start(self, task):
        """Sends the task's job. Returns False if the process died while it was idle."""
        try:
            self.pipe.send(task.job)
        except OSError:
            return False
        self.task, self.deadline = task, time.monotonic() + self.limit_s
        return True

    def receive(self):
        """Takes what the process sent. Returns False if it has died."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE_S)
            code = self.process.exitcode  # negative: minus the number of the signal
            if not self.ready:
                raise OSError(f"a child process ended before its first job (exit code {code})") from None
            if self.task:
                self.task.result = {"reason": "crashed", "detail": f"exit code {code}"}
            return False
        if isinstance(message, OSError):
            raise message
        if self.ready:
            self.task.result, self.task, self.deadline = message, None, inf
        self.ready = True  # the first message only says so
        return True


def _work(pipe, function, limit_s):
    """What a child process runs: it takes a job and sends its result, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    torch.set_num_threads(1)
    _limit_memory()
    pipe.send("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print notes to stderr, where the progress bar is
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
    """Lets this process allocate MAX_BYTES more than it has now; no limit where the system does not say how much."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    in_use = re.search(r"VmData:\s+(\d+) kB", status.read_text())
    if in_use is None:
        return
    soft = (int(in_use[1]) << 10) + MAX_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard >= 0:  # below 0: unlimited
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
