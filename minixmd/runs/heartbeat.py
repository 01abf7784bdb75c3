"""Ends a run of several processes in which one hangs or fails, and says which hangs, and where."""
import json
import os
import sys
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import torch.distributed as dist

INTERVAL_S = 5.0
GRACE_S = 20.0  # between the failure of a process and the end of those that have not noticed
_beats = 0
_unwatched = 0


def beat():
    """Says that this process makes progress: called in every loop whose turns may be long."""
    global _beats
    _beats += 1


@contextmanager
def unwatched():
    """What runs here counts as progress: work with limits of its own, or of which no part can be seen."""
    global _unwatched
    _unwatched += 1
    try:
        yield
    finally:
        _unwatched -= 1


class Heartbeat(threading.Thread):
    """Says in the store how far this process is and whether it waits for others, and reads what they say. store: of
    torch.distributed, a connection of its own. timeout_s: as distributed.init takes it."""

    def __init__(self, store, rank, world_size, timeout_s):
        super().__init__(daemon=True)
        self.store = store
        self.rank = rank
        self.timeout_s = timeout_s
        self.main = threading.main_thread().ident
        self.ended = threading.Event()
        self.count = 0  # of exchanges
        self.spoke = {other: (None, monotonic()) for other in range(world_size)}  # what count each last had, since when
        self.moved = dict(self.spoke)  # and how far it was

    def end(self):
        """Before the interpreter ends: this thread must not be in the store then."""
        self.ended.set()
        self.join(GRACE_S)

    def run(self):
        while not self.ended.wait(min(INTERVAL_S, self.timeout_s / 4)):
            try:
                hung = self.exchange()
                failed = self.store.check(["failed"])
            except RuntimeError:  # the store is gone, with the process that held it
                hung, failed = [], True
            if hung and self.store.add("failed", 1) == 1:  # none has failed before
                for line in hung:
                    print(f"\nminixmd: {line}", file=sys.__stderr__, flush=True)
                os._exit(1)
            if failed and not self.ended.wait(GRACE_S):
                os._exit(1)

    def exchange(self):
        """A line for each process that hangs: it makes no progress and waits for no other, or all wait."""
        if _unwatched:
            beat()
        self.count += 1
        place, waits = where_is(self.main)
        self.store.set(f"beat/{self.rank}", json.dumps([self.count, _beats, waits, f"{place}, process {os.getpid()}"]))
        stuck, alone = [], []
        now = monotonic()
        for other in self.moved:
            count, *progress, place = [None, None, False, "its start"]
            if self.store.check([f"beat/{other}"]):
                count, *progress, place = json.loads(self.store.get(f"beat/{other}"))
            if count != self.spoke[other][0]:
                self.spoke[other] = count, now
            if progress != self.moved[other][0]:
                self.moved[other] = progress, now
            elif now - self.moved[other][1] > self.timeout_s:
                stuck.append(f"process {other} has made no progress for {self.timeout_s:.0f} s (--timeout): it is at "
                             f"{place}; stopped")
                silent = now - self.spoke[other][1] > self.timeout_s / 2
                if silent or not progress[1]:
                    alone.append(stuck[-1])
        return alone or (stuck if len(stuck) == len(self.moved) else [])


def where_is(thread):
    """(the place in this package where a thread is, whether it waits for another process there)."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    of_torch = str(Path(dist.__file__).parent)
    ours = [frame for frame in frames if "minixmd" in Path(frame.filename).parts] or frames
    waits = any(frame.filename.startswith(of_torch) for frame in frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} ({ours[-1].name})", waits
