"""What tests of checkpoints and adapters share: an example of each kind, both sides' logits, one-line errors."""
import pytest
import torch
from tiny import audio_media, prompt, reference_forward, video_media

from minixmd import pack
from minixmd.models.lora import add_lora
from minixmd.models.weights import load_model

TARGETS = {  # decoder; towers; what lies between them
    "decoder": r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "towers": r"(audio_tower\.layers|visual\.blocks)\..*",
    "projector": r"multi_modal_projector\.linear|audio_tower\.proj|visual\.merger\.mlp\.[02]",
}
LINEARS = "|".join(TARGETS.values())


def example_of(kind):
    clips = []
    if kind in ("audio", "omni"):
        clips.append(audio_media(75, 0, 1)[0])
    if kind != "audio":
        clips.append(video_media((2, 6, 8), 0, 1))
    return prompt([4, *clips, 3])


def logits_of(model, kind):
    with torch.no_grad():
        return model.logits(model(pack([example_of(kind)])))


def reference_logits(reference, kind):
    with torch.no_grad():
        return reference_forward(kind, reference, example_of(kind))[1]


def assert_close(ours, theirs, bound=1e-5):
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert ours.shape == theirs.shape and error <= bound * scale, f"max error {error:.2e} of {scale:.2e}"


def assert_same_weights(ours, theirs):
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def error_of(call):
    """The one line that a call fails with."""
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    return str(caught.value)


def fill(named_parameters):
    """Random LoRA matrices: as made, B is zero and hides every mistake. A and B differ in size to tell them apart.

    Twice the size of B makes the logits of two layers ten times as sensitive to rounding: half an ulp on every weight
    then moves them by 8e-6 of their size.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(named_parameters, key=lambda item: item[0].replace("default.", "")):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if "lora_A" in name else 0.1))


def with_adapter(folder, targets=LINEARS):
    model = load_model(folder)
    add_lora(model, rank=3, alpha=5, targets=targets, seed=0)
    fill(model.named_parameters())
    return model
