"""Ends a run of several processes in which one hangs, and says which and where."""
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from time import monotonic

import torch.distributed as dist

INTERVAL_S = 5.0
UNSEEN = '[null, "its start"]'
_beats = 0


def beat():
    """Says that this process makes progress: called in every loop whose turns may be long."""
    global _beats
    _beats += 1


class Heartbeat(threading.Thread):
    """Counts, in the store, the intervals in which this process worked or waited for others, and reads theirs.

    Args:
        store: of torch.distributed, a connection of its own.
        timeout_s: seconds without progress after which a process is given up.
        first_to_fail: function that says whether no other process has said so before.
    """

    def __init__(self, store, rank, world_size, timeout_s, first_to_fail):
        super().__init__(daemon=True)
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.first_to_fail = first_to_fail
        self.main = threading.main_thread().ident
        self.stop = threading.Event()

    def run(self):
        count, last_beats = 0, -1
        seen = {rank: (None, monotonic()) for rank in range(self.world_size)}  # its count, and since when
        while not self.stop.wait(min(INTERVAL_S, self.timeout_s / 4)):
            place, waits = where_is(self.main)
            count += waits or _beats != last_beats
            last_beats = _beats
            try:
                self.store.set(f"beat/{self.rank}", json.dumps([count, f"{place}, process {os.getpid()}"]))
                keys = [f"beat/{rank}" for rank in seen]
                lines = [self.store.get(key) if self.store.check([key]) else UNSEEN for key in keys]
            except RuntimeError:  # the store is gone: the run has ended
                return
            for rank, line in enumerate(lines):
                other_count, other_place = json.loads(line)
                if other_count != seen[rank][0]:
                    seen[rank] = other_count, monotonic()
                elif monotonic() - seen[rank][1] > self.timeout_s and self.first_to_fail():
                    print(f"\nminixmd: process {rank} has made no progress for {self.timeout_s:.0f} s (--timeout): it "
                          f"is at {other_place}; stopped", file=sys.__stderr__, flush=True)
                    os._exit(1)


def where_is(thread):
    """(the place in this package where a thread is, whether it waits for another process there)."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    of_torch = str(Path(dist.__file__).parent)
    ours = [frame for frame in frames if "minixmd" in Path(frame.filename).parts] or frames
    waits = any(frame.filename.startswith(of_torch) for frame in frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} ({ours[-1].name})", waits
