"""GRPO's reference: the policy that training starts from."""
import torch

from minixmd.models.sharding import local_parameters, whole


class Reference:
    """Keeps a copy of the parameters that train, as they are now; all others are the policy's own.

    Args:
        policy: MultimodalLM.
        place: "device" of the policy | "host". From the host they are copied in for every use.
        sharded: whether the policy's weights are sharded among processes: so are these, and gathered for every use.
    """

    def __init__(self, policy, place, sharded=False):
        self.policy = policy
        trained = {name: p.detach() for name, p in local_parameters(policy).items()}
        self.resident = None
        if place == "device":
            self.values = {name: p.clone() for name, p in trained.items()}
            if not sharded:
                self.resident = whole(policy, self.values)
        else:
            self.values = copies_on_host(trained, policy.device)

    def frozen_model(self):
        """The frozen model on the policy's device; unless it is resident, for as long as the caller keeps it."""
        if self.resident is not None:
            return self.resident
        device = self.policy.device
        values = {name: value.to(device, non_blocking=True) for name, value in self.values.items()}
        return whole(self.policy, values)


def copies_on_host(tensors, device):
    """{name: tensor} of one dtype, copied to the host: for a GPU into one piece of pinned memory, whose size is rounded
    up to a power of 2."""
    copies = {}
    if device.type != "cuda":
        for name, x in tensors.items():
            copies[name] = x.to("cpu", copy=True)
        return copies
    sizes = [x.numel() for x in tensors.values()]
    flat = torch.empty(sum(sizes), dtype=next(iter(tensors.values())).dtype, pin_memory=True)
    for (name, x), part in zip(tensors.items(), flat.split(sizes), strict=True):
        copies[name] = part.view(x.shape).copy_(x)
    return copies
