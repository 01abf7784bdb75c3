"""Several processes of one run, as torchrun starts them. How many there are changes no result but by rounding.

Objects travel by gloo, tensors of a GPU by NCCL. With one process every function here gives back what it is given.
"""
import atexit
import math
import secrets
import signal
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from minixmd.runs.heartbeat import Heartbeat
from minixmd.runs.records import compact, read_jsonl, write_jsonl

SHARD = 64  # items; a killed stage recomputes at most one shard a process, and 1,000 questions keep 8 processes busy
LONGEST_WAIT = timedelta(days=30)  # while the first process works alone; one that hangs is the heartbeat's to notice
_store = None  # through which the processes met
_stopping = []  # signals that asked this process to stop


class Stopped(Exception):
    """The run was asked to stop, and did so where it can go on."""


def init(environment, timeout_s):
    """Joins the run's other processes, if `environment` names any, and takes a GPU of its own. Returns the rank.
    timeout_s: seconds without progress after which a process is given up. Raises ValueError: not started by torchrun,
    or more processes than GPUs."""
    global _store
    if int(environment.get("WORLD_SIZE", 1)) == 1:
        return 0
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set: start "
                         "several processes with torchrun, or unset WORLD_SIZE")
    signal.signal(signal.SIGTERM, lambda number, _: _stopping.append(number))  # torchrun passes it on
    cuda = torch.cuda.is_available()
    _store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", _store),
                            rank=rank, world_size=world_size, timeout=LONGEST_WAIT)
    heartbeat = Heartbeat(_store.clone(), rank, world_size, timeout_s)
    heartbeat.start()
    atexit.register(heartbeat.end)
    local_rank = int(environment["LOCAL_RANK"])
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"{environment.get('LOCAL_WORLD_SIZE')} processes, but {socket.gethostname()} has "
                         f"{torch.cuda.device_count()} GPUs: each process needs one of its own")
    if cuda:
        torch.cuda.set_device(local_rank)
        cards = gather(torch.cuda.get_device_name())
        if rank == 0 and len(set(cards)) > 1:
            print(f"minixmd: the GPUs differ, and every step waits for the slowest: {', '.join(cards)}", flush=True)
    return rank


def rank_and_world_size():
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value):
    """The values of all processes, in order of rank, on every one of them. They wait for each other."""
    values = [value] * rank_and_world_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value, source=0):
    """One process's value, on all of them."""
    values = [value]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(values, src=source)
    return values[0]


def total(*numbers):
    """The sum over all processes of each of the numbers."""
    return [sum(column) for column in zip(*gather(numbers), strict=True)]


def all_reduce(tensor):
    """Puts the sum of all processes' tensors, of one shape and dtype, in place of each; returns it."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_gradients(parameters):
    """Gives each parameter the sum of its gradients on all processes, of which some may have none, in one message."""
    if rank_and_world_size()[1] == 1:
        return
    having = gather([p.grad is not None for p in parameters])
    chosen = [p for p, *has in zip(parameters, *having, strict=True) if any(has)]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in chosen])
    dist.all_reduce(flat)
    for p, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        p.grad = part.view_as(p)


def stop_requested():
    """Whether this process was asked to stop. Where several must stop together, they gather it."""
    return bool(_stopping)


def check_shared(folder):
    """Raises ValueError, on all processes, where one does not see what the first writes in `folder`."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return
    path = folder / f".{broadcast(secrets.token_hex(8))}.tmp"
    if rank == 0:
        path.touch()
    gather(None)
    blind = set(gather(None if path.exists() else socket.gethostname())) - {None}
    if rank == 0:
        path.unlink()
    if blind:
        raise ValueError(f"{folder} is not the same folder on {', '.join(sorted(blind))}: run_dir must be on a file "
                         "system that all processes share")


def process_name():
    """How a message begins: "minixmd: ", of several "minixmd: process 1 of 2 on node3: " below the first one's bar."""
    rank, world_size = rank_and_world_size()
    return f"\nminixmd: process {rank} of {world_size} on {socket.gethostname()}: " if world_size > 1 else "minixmd: "


def is_lost_process(error):
    """Whether an error, none of ours, says that another process is gone."""
    if rank_and_world_size()[1] == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error)


def first_to_fail():
    """Whether no process of the run has failed before this one: its reason is the one to print."""
    try:
        return _store is None or _store.add("failed", 1) == 1
    except RuntimeError:  # the process that held the store is gone
        return True


def destroy():
    if rank_and_world_size()[1] > 1:
        dist.destroy_process_group()


def written_shard(num_items):
    """Items of a shard for which a model writes: many, so that few decode slots stand idle at its end, but an eighth of
    all at most, so that 8 processes have some."""
    return min(512, max(SHARD, math.ceil(num_items / 8)))


def compute_shards(compute, items, folder, title, unit, shard_size=None, finish=None):
    """The records of all items in their order, computed shard by shard on every process; None on all but the first.

    compute: function(items of a shard) -> records. folder: of the shards' files, each written whole; one that is there
    already is read back. title, unit: of the progress bar. shard_size: items of a shard; None = SHARD. finish: called,
    if there was anything to compute, when this process has no shard left, while others may. Raises Stopped after a
    shard, if the run was asked to stop."""
    rank, world_size = rank_and_world_size()
    size = shard_size or SHARD
    shards = [(items[i:i + size], folder / f"{i:07d}.jsonl") for i in range(0, len(items), size)]
    done = broadcast([path.exists() for _, path in shards])
    todo = [shard for shard, is_done in zip(shards, done, strict=True) if not is_done]
    stopped = False
    with tqdm(total=len(items), desc=title, unit=unit, smoothing=0.1) as bar:
        bar.update(len(items) - sum(len(part) for part, _ in todo))
        for part, path in todo[rank::world_size]:
            stopped = stop_requested()
            if stopped:
                break
            write_jsonl(path, compute(part))
            bar.update(min(len(part) * world_size, bar.total - bar.n))
    if finish is not None and todo:
        finish()
    if any(gather(stopped)):
        raise Stopped
    if rank:
        return None
    return [compact(record) for _, path in shards for record in read_jsonl(path)]
