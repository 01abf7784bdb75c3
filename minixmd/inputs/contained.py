"""Runs a function in child processes: a file whose decoder hangs, crashes or fills the memory costs that file alone.

Children are forked, without this process's locks, from a server that has imported the function's module once."""
import os
import pickle
import re
import resource
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from math import ceil
from multiprocessing import forkserver, get_context
from pathlib import Path
from queue import LifoQueue
from types import ModuleType

import torch

from minixmd.inputs.media import MediaError

LIMIT_S = 60.0  # seconds that a call may take
MAX_BYTES = 4 << 30  # of memory that a child may allocate beyond what it starts with
_STARTING = threading.Lock()  # of all Contained: what a start changes belongs to the whole process
PIECE_BYTES = 1 << 17
GRACE_S = 5  # a child whose parent died ends itself this much later than its parent would have killed it


def num_workers():
    """Children that this process may keep busy: its cores, shared with the other processes that torchrun started."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Contained:
    """function(path, *arguments) in a child process; of a module's own function, or a partial of one. Calling it
    returns the result, which is pickled, or raises the MediaError or OSError that the function raised. A call that is
    lost raises MediaError: "out of time", "out of memory" or "crashed", as any other exception counts."""

    def __init__(self, function, limit_s=LIMIT_S, workers=None):
        self.function, self.limit_s = function, limit_s
        self.context = get_context("forkserver")  # fast to start, with shared memory
        self.context.set_forkserver_preload([__name__, getattr(function, "func", function).__module__])
        with _without_main():
            forkserver.ensure_running()
        self.slots = LifoQueue()  # of children; None: one that has yet to be started. Threads may be more
        for _ in range(workers or num_workers()):
            self.slots.put(None)
        self.children = {}  # process -> its pipe, of all that were started and not ended
        self.stopped = False

    def stop(self):
        """Kills the children and waits for none; calls that go on are lost."""
        self.stopped = True
        for child in list(self.children):  # other threads end some meanwhile
            child.kill()

    def __call__(self, path, *arguments):
        child, is_whole = self.slots.get(), False
        try:
            if child is not None and not child.is_alive():  # it was killed meanwhile, by no fault of a clip
                child = self._end(child)
            child = child or self._start(path)
            result = self._ask(child, path, arguments)
            is_whole = True
        finally:
            if child is not None and not is_whole:
                child = self._end(child)
            self.slots.put(child)
        if isinstance(result, Exception):
            raise result
        return result

    def _start(self, path):
        if not self.stopped:
            pipe, end = self.context.Pipe()
            child = self.context.Process(target=_work, args=(end, self.function, self.limit_s), daemon=True)
            with _without_main():
                child.start()
            end.close()  # so that the child's death closes the pipe
            self.children[child] = pipe
            with suppress(EOFError, ConnectionError):
                if pipe.recv() and not self.stopped:  # it is ready
                    return child
            self._end(child)
        if self.stopped:
            raise MediaError(path, "crashed", "stopped")
        raise OSError(f"a child process ended before its first job (exit code {child.exitcode})")

    def _ask(self, child, path, arguments):
        pipe = self.children[child]
        try:
            pipe.send((path, arguments))
            if pipe.poll(self.limit_s):
                return pickle.loads(b"".join([pipe.recv_bytes() for _ in range(pipe.recv())]))
        except (EOFError, ConnectionError):
            child.join(GRACE_S)  # its exit code is, if negative, minus the number of the signal
            raise MediaError(path, "crashed", f"exit code {child.exitcode}") from None
        raise MediaError(path, "out of time", f"more than {self.limit_s:g} s")

    def _end(self, child):
        """Ends a child; None, which its slot then holds."""
        child.kill()
        child.join(GRACE_S)  # a process that waits for a dead disk cannot be killed; it is left behind
        self.children.pop(child).close()


@contextmanager
def _without_main():
    """A child would import the program's main module, and a script would run again; so it is hidden while one starts.
    Ctrl-C waits so long: the server, which starts with the first child, would print where it was interrupted."""
    with _STARTING:
        main = sys.modules["__main__"]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(pipe, function, limit_s):
    """What a child process runs: it takes a call and sends its result, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    torch.set_num_threads(1)
    _limit_memory()
    pipe.send("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print notes to stderr, where the progress bar is
    with suppress(EOFError, OSError):
        while True:
            path, arguments = pipe.recv()
            signal.alarm(ceil(limit_s) + GRACE_S)
            try:
                result = function(path, *arguments)
            except (MediaError, OSError) as error:
                result = error
            except Exception as error:
                if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch raises a RuntimeError
                    result = MediaError(path, "out of memory", f"more than {MAX_BYTES >> 30} GiB")
                else:
                    result = MediaError(path, "crashed", f"{type(error).__name__}: {error}")
            signal.alarm(0)
            data = pickle.dumps(result)  # sent in pieces: a Connection allocates all that is left at every read
            pipe.send(-(-len(data) // PIECE_BYTES))
            for start in range(0, len(data), PIECE_BYTES):
                pipe.send_bytes(data[start:start + PIECE_BYTES])


def _limit_memory():
    """Lets this process allocate MAX_BYTES more than it has now; no limit where the system does not say how much."""
    status = Path("/proc/self/status")
    in_use = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if in_use is not None:
        soft = (int(in_use[1]) << 10) + MAX_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (soft if hard < 0 else min(soft, hard), hard))  # below 0: unlimited
