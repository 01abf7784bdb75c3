"""Several processes of one run, as torchrun starts them. Who computes which shard changes no result."""
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from minixmd.runs.records import read_jsonl, write_jsonl

SHARD = 512  # items; a killed stage recomputes at most one shard


def init(environment):
    """Joins the run's other processes, if `environment` names any, and takes a GPU of its own. Returns the rank."""
    if int(environment.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the others wait while one trains
        if torch.cuda.is_available():
            torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    return rank_and_world_size()[0]


def rank_and_world_size():
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier():
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def broadcast(value):
    """The first process's value, on all of them."""
    values = [value]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def destroy():
    if rank_and_world_size()[1] > 1:
        dist.destroy_process_group()


def compute_shards(compute, items, folder, title, unit, shard_size=None, first_process_only=False):
    """The records of all items in their order, computed shard by shard on every process; None on all but the first.
    compute: function(items of a shard) -> records. folder: of the shards' files, each written whole; one that is there
    already is read back. title, unit: of the progress bar. shard_size: items of a shard; None = SHARD.
    first_process_only: the other processes do not take part in this stage."""
    rank, world_size = (0, 1) if first_process_only else rank_and_world_size()
    size = shard_size or SHARD
    shards = [(items[i:i + size], folder / f"{i:07d}.jsonl") for i in range(0, len(items), size)]
    with tqdm(total=len(items), desc=title, unit=unit, smoothing=0.1) as bar:
        for part, path in shards[rank::world_size]:
            if not path.exists():
                write_jsonl(path, compute(part))
            bar.update(len(part))
    if world_size > 1:
        barrier()
    if rank:
        return None
    return [record for _, path in shards for record in read_jsonl(path)]
