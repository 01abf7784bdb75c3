"""Several processes of one run, as torchrun starts them: they share the clips of the stages that ask a model.

Shards are fixed by the manifest, so who computes which changes no result. The first process does all the rest.
"""
from datetime import timedelta

import torch
import torch.distributed as dist


class Elsewhere(Exception):
    """This process has done its shards of a stage; the first one goes on."""


def join(environment):
    """Meet the run's other processes, if `environment` names any, and take a GPU of one's own. Returns the rank."""
    if int(environment.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the others wait while one trains
        if torch.cuda.is_available():
            torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    return ranks()[0]


def ranks():
    """(rank, how many)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def wait():
    """Until all processes are here."""
    if ranks()[1] > 1:
        dist.barrier()


def told(value):
    """What the first process gives, to all."""
    if ranks()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def leave():
    if ranks()[1] > 1:
        dist.destroy_process_group()
