"""decode_slots="auto" of a stage that writes on a GPU: as many completions at once as memory has room for."""
import gc
from dataclasses import replace

import torch

from minixmd.dryrun import costs
from minixmd.dryrun.plan import fit_slots, plan_alone
from minixmd.runs.device import resolve_device
from minixmd.runs.distributed import broadcast, gather, rank_and_world_size
from minixmd.runs.files import read_json, write_json


def settle_slots(stage, stages, folder):
    """The stage with a number in place of "auto", which its directory keeps for the next start. All processes call this
    together. Raises ValueError: its memory cannot be estimated."""
    if not costs.has_open_slots(stage) or resolve_device(stage.name, stage.device) == "cpu":
        return stage
    rank, world_size = rank_and_world_size()
    path = folder / "slots.json"
    gc.collect()
    torch.cuda.empty_cache()  # what earlier stages have left
    free = min(gather(torch.cuda.mem_get_info()[0]))
    if rank == 0 and not path.exists():
        write_json(path, {"decode_slots": choose_slots(stage, stages, free / 2**30, world_size)})
    slots = broadcast(read_json(path)["decode_slots"] if rank == 0 else None)
    print(f"{stage.name}: decode_slots {slots}", flush=True)
    return replace(stage, decode_slots=slots)


def choose_slots(stage, stages, gib, gpus=1):
    """decode_slots for which each of so many GPUs with `gib` GiB has room."""
    _, slots = fit_slots(plan_alone(stage, stages), gpus, {"here": gib})
    return max(1, slots["here"])
