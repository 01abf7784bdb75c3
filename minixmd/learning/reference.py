"""GRPO's reference: the policy that training starts from."""
from minixmd.models.multimodal import frozen_copy


class Reference:
    """Keeps a copy of the parameters that train, as they are now; all others are the policy's own.

    Args:
        policy: MultimodalLM.
        place: "device" of the policy | "host". From the host they are copied in for every use.
    """

    def __init__(self, policy, place):
        self.policy = policy
        self.values = {}
        for name, p in policy.named_parameters():
            if p.requires_grad:
                self.values[name] = p.detach().to(p.device if place == "device" else "cpu", copy=True)
        if place == "host" and policy.device.type == "cuda":
            self.values = {name: value.pin_memory() for name, value in self.values.items()}
        self.resident = frozen_copy(policy, self.values) if place == "device" else None

    def model(self):
        """The frozen model on the policy's device; from the host it is there for as long as the caller keeps it."""
        if self.resident is not None:
            return self.resident
        device = self.policy.device
        values = {name: value.to(device, non_blocking=True) for name, value in self.values.items()}
        return frozen_copy(self.policy, values)
