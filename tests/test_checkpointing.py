"""Activation checkpointing: the same gradients to the bit, from less memory; and what decides about it."""
import pytest
import torch
from test_invariance import KINDS, prompts_of
from tiny import tiny_model, trainer_of

from minixmd import Group, pack
from minixmd.config import GRPO, SFT
from minixmd.models import checkpointing
from minixmd.models.checkpointing import set_checkpointing
from minixmd.models.lora import add_lora, set_backend


def gradients(model, batch):
    """{name: gradient} of a loss over all hidden states, and the loss."""
    model.zero_grad(set_to_none=True)
    hidden_ND = model(batch)
    loss = (hidden_ND * torch.linspace(-1, 1, hidden_ND.numel()).view_as(hidden_ND)).sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss


@pytest.mark.parametrize("kind, trains, backend", [
    *((kind, trains, "torch") for kind in KINDS for trains in ("lora", "towers and all")),
    pytest.param("audio", "lora", "triton", marks=pytest.mark.slow),
    pytest.param("windowed", "towers and all", "triton", marks=pytest.mark.slow),
])
def test_gradients_are_the_same_to_the_bit(kind, trains, backend):
    torch.manual_seed(0)
    model = tiny_model(kind)
    if trains == "lora":
        add_lora(model, rank=3, alpha=6, targets=r".*(proj|fc1|linear|qkv)", seed=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    else:
        model.set_trainable("full")
    set_backend(model, backend)
    prompts = prompts_of(kind)
    batch = pack([*prompts[:4], Group(prompts[4], (torch.tensor([3, 4, 5]), torch.tensor([6])))])
    plain, loss = gradients(model, batch)
    set_checkpointing(model, True)
    found, again = gradients(model, batch)
    assert torch.equal(loss, again) and found.keys() == plain.keys() and len(found) > 10
    for name, grad in plain.items():
        assert torch.equal(found[name], grad), name


class Saved:
    """Bytes of the different tensors that a graph keeps for its backward pass."""

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, x):
        self.storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x


@pytest.mark.parametrize("kind", ["audio", "windowed"])
def test_a_block_keeps_one_row_a_token(kind):
    model, sizes = tiny_model(kind), {}
    model.set_trainable("full")
    for on in (False, True):
        set_checkpointing(model, on)
        with Saved() as saved:
            model(pack(prompts_of(kind)))
        sizes[on] = sum(saved.storages.values()) - sum(p.nbytes for p in model.parameters())
    assert sizes[True] < 0.6 * sizes[False]


def test_nothing_is_computed_again_without_gradients(monkeypatch):
    model = tiny_model("audio")
    set_checkpointing(model, True)
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *_, **__: pytest.fail("checkpointed"))
    with torch.no_grad():
        model(pack(prompts_of("audio")))


@pytest.mark.parametrize("setting, gpu, on", [("auto", False, False), ("auto", True, True), ("on", False, True),
                                              ("off", True, False)])
def test_auto_is_on_a_gpu(monkeypatch, setting, gpu, on):
    monkeypatch.setattr("minixmd.train.Trainer.on_gpu", lambda trainer: gpu)
    trainer = trainer_of(SFT(name="s", model="m", manifest="d", checkpointing=setting), tiny_model("audio"))
    assert trainer.model.model.checkpointing == trainer.model.audio_tower.checkpointing == on


def test_the_reference_of_a_checkpointed_policy_is_the_policy():
    stage = GRPO(name="s", model="m", manifest="d", checkpointing="on", trainable="full", device="cpu")
    trainer = trainer_of(stage, tiny_model("audio"), suppressed_ids=[1])
    batch = pack(prompts_of("audio"))
    assert torch.equal(trainer.model(batch), trainer.reference.frozen_model()(batch))
