"""PANN's Cnn14_16k: tensors and numbers of the reference, its checkpoints, its augmentation.

cnn14_golden.npz: the reference's arrays (torchlibrosa 0.1.0 with librosa 0.11, PANNs' network with the weights of
`stand_in`) for a dog's bark (ESC-10 1-100032-A, from rose_bark.wav by nfrae, CC0), resampled to 16 kHz; and
torchlibrosa's log-mel of `noise()`.
"""
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from minixmd.inputs.panns import front_end, log_mel
from minixmd.models.cnn14 import Cnn14, load_weights, make_cnn14, mixup, spec_augment

GOLDEN = dict(np.load(Path(__file__).parent / "cnn14_golden.npz"))


def noise(count=8123, seed=0):
    return torch.from_numpy((0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32))


def stand_in(key, shape):
    """A weight as a function of its name: what the golden arrays were made with."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("running_var"):
        spread = torch.rand(shape, generator=generator) + 0.5
        return 400 * spread if key == "bn0.running_var" else spread
    t = torch.randn(shape, generator=generator)
    if key == "bn0.running_mean":
        return 5 * t - 30
    if len(shape) == 1:
        return 1 + 0.1 * t if key.endswith("weight") else 0.1 * t
    return (0.2 if key == "fc_audioset.weight" else 1.0) * t * (2 / t[0].numel()) ** 0.5


def fill(model):
    for name, t in model.state_dict().items():
        t.copy_(stand_in(name, t.shape))
    return model


def published_state(model):
    """What a published file of these weights holds: the front end's tensors, too."""
    return {**model.state_dict(), **front_end()}


@pytest.fixture(scope="module")
def published():
    return fill(make_cnn14(527, 1.0, 0))


def small(classes=2):
    return make_cnn14(classes, 1 / 16, 0)


# ---- the numbers of the reference ----


def test_it_has_the_published_tensors():
    with torch.device("meta"):
        model = Cnn14()
    state = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert len(published_state(model)) == 84 and sum(p.numel() for p in model.parameters()) == 80_753_615
    assert sum(t.numel() for t in front_end().values()) == 81_033_231 - 80_753_615
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    named = {f"bn0.{n}" for n in norm} | {f"{fc}.{n}" for fc in ("fc1", "fc_audioset") for n in ("weight", "bias")}
    for block in (f"conv_block{i}." for i in range(1, 7)):
        named |= {f"{block}conv{i}.weight" for i in (1, 2)} | {f"{block}bn{i}.{n}" for i in (1, 2) for n in norm}
    assert set(state) == named
    assert front_end()["spectrogram_extractor.stft.conv_imag.weight"].shape == (257, 1, 512)
    assert front_end()["logmel_extractor.melW"].shape == (257, 64) and state["fc_audioset.weight"] == (527, 2048)
    assert state["conv_block6.conv1.weight"] == (2048, 1024, 3, 3) and state["bn0.weight"] == (64,)


def test_log_mel_equals_the_references():
    for wave_S, name in ((torch.from_numpy(GOLDEN["wave"]), "logmel"), (noise(), "noise_logmel")):
        torch.testing.assert_close(log_mel(wave_S), torch.from_numpy(GOLDEN[name]), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_embedding_and_outputs_equal_the_references(published):
    logmel_BAM = log_mel(torch.from_numpy(GOLDEN["wave"]))[None]
    with torch.inference_mode():
        published.eval()
        embedding_BE = published.embed(published.normalise(logmel_BAM))
        outputs_BK = published(logmel_BAM).sigmoid()
    for ours, name in ((embedding_BE, "embedding"), (outputs_BK, "clipwise")):
        torch.testing.assert_close(ours[0], torch.from_numpy(GOLDEN[name]), rtol=0, atol=1e-4)


def reference_loss(state, parameters, wave_BS, target_BK, training=True):
    """The definition, from the wave to the loss; `state` are the statistics, which training updates."""
    x = F.pad(wave_BS[:, None], (256, 256), mode="reflect")
    real, imag, mel = front_end().values()
    power = F.conv1d(x, real, stride=160) ** 2 + F.conv1d(x, imag, stride=160) ** 2
    x = 10 * torch.log10((power.transpose(1, 2) @ mel).clamp(min=1e-10))[:, None].double()

    def norm(x, name):
        return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"],
                            parameters[f"{name}.weight"], parameters[f"{name}.bias"], training, 0.1, 1e-5)

    x = norm(x.transpose(1, 3), "bn0").transpose(1, 3)
    for i in range(1, 7):
        for j in (1, 2):
            x = F.conv2d(x, parameters[f"conv_block{i}.conv{j}.weight"], padding=1)
            x = norm(x, f"conv_block{i}.bn{j}").relu()
        x = F.avg_pool2d(x, (2, 2) if i < 6 else (1, 1))
    x = x.mean(dim=3)
    x = x.max(dim=2)[0] + x.mean(dim=2)
    x = F.linear(x, parameters["fc1.weight"], parameters["fc1.bias"]).relu()
    x = torch.sigmoid(F.linear(x, parameters["fc_audioset.weight"], parameters["fc_audioset.bias"]))
    return F.binary_cross_entropy(x, target_BK)


@pytest.mark.parametrize("width", [1 / 4, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_training_step_equals_the_references_forward_and_gradients(width):
    model = fill(make_cnn14(527, width, 0)).double()  # in fp32 a ReLU at 0 may open on one side only
    wave_BS = torch.stack([noise(10_300, seed) * (seed + 1) for seed in range(3)])
    target_BK = (torch.rand(3, 527, generator=torch.Generator().manual_seed(0)) < 0.01).double()
    state = {name: t.clone() for name, t in model.state_dict().items() if "running" in name}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        evaluated = reference_loss(state, parameters, wave_BS, target_BK, training=False)
    wanted = reference_loss(state, parameters, wave_BS, target_BK)
    wanted_grads = torch.autograd.grad(wanted, list(parameters.values()))
    logmel_BAM = torch.stack([log_mel(wave_S) for wave_S in wave_BS]).double()
    with torch.no_grad():
        loss = F.binary_cross_entropy_with_logits(model.eval()(logmel_BAM), target_BK)
    torch.testing.assert_close(loss, evaluated, rtol=1e-5, atol=0)
    model.train()
    loss = F.binary_cross_entropy_with_logits(model(logmel_BAM), target_BK)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    for name, ours, theirs in zip(parameters, grads, wanted_grads, strict=True):
        assert theirs.abs().max() > 0, name
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name
    for name, t in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(t, state[name], rtol=1e-4, atol=1e-4, msg=name)


def test_what_just_fits_is_not_too_short():
    model = small().eval()
    assert log_mel(noise(257)).shape == (2, 64)
    assert model(log_mel(noise(4960))[None]).shape == (1, 2)


# ---- checkpoints ----


class Sampler:
    """As PANNs' training script stores beside the weights: numpy arrays and numbers."""

    indexes = {"indexes": np.arange(5), "pointer": 3}
    balanced = {"indexes_per_class": [np.arange(3), np.arange(2, dtype=np.int32)], "queue": [1, 0],
                "pointers_of_classes": [np.int64(1), 0], "random": np.random.RandomState(0).rand(2)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shape", ["model", "bare", Sampler.indexes, Sampler.balanced], ids=str)
def test_every_form_of_checkpoint_is_loaded(tmp_path, shape, zipped):
    theirs, ours = fill(small(527)), small(527)
    state = published_state(theirs)
    file = {"model": {"model": state}, "bare": state}.get(str(shape)) or {
        "iteration": 600_000, "model": state, "sampler": shape}
    path = tmp_path / "Cnn14_16k_mAP=0.438.pth"
    torch.save(file, path, _use_new_zipfile_serialization=zipped)
    if not zipped:  # as numpy 1 wrote it; a zip's checksum would have to be made anew
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    load_weights(ours, path)
    for name, t in ours.state_dict().items():
        assert torch.equal(t, theirs.state_dict()[name]) != name.startswith("fc_audioset."), name


def test_safetensors_are_loaded_and_another_head_can_be_kept(tmp_path):
    theirs, ours = fill(small(527)), small(2)
    save_file(published_state(theirs), tmp_path / "c.safetensors")
    head = ours.fc_audioset.weight.clone()
    load_weights(ours, tmp_path / "c.safetensors")
    assert torch.equal(ours.fc_audioset.weight, head)
    assert torch.equal(ours.conv_block4.bn2.running_var, theirs.conv_block4.bn2.running_var)


def test_all_that_does_not_fit_is_listed_in_one_error(tmp_path):
    state = published_state(small(527))
    del state["bn0.weight"]
    state["fc2.weight"] = torch.zeros(1)
    state["fc1.bias"] = torch.zeros(3)
    state["logmel_extractor.melW"] = state["logmel_extractor.melW"].roll(1, 0)
    torch.save({"model": state}, tmp_path / "c.pth")
    model = small(527)
    before = model.fc_audioset.weight.clone()
    with pytest.raises(ValueError, match="c.pth: not this Cnn14_16k, 4 tensors do not fit: ") as caught:
        load_weights(model, tmp_path / "c.pth")
    assert str(caught.value).endswith(
        "fit: fc1.bias has shape [3], expected [128]; logmel_extractor.melW is of another front end; missing "
        "bn0.weight; unexpected fc2.weight")
    assert torch.equal(model.fc_audioset.weight, before)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["code", "text", "nothing", "half", "a list", "no tensors"])
def test_what_is_no_checkpoint_is_one_line_and_no_code_runs(tmp_path, content):
    path, ran = tmp_path / "c.pth", tmp_path / "ran"
    objects = {"code": {"model": small().state_dict(), "more": Payload(ran)}, "a list": [1], "no tensors": {"model": 3},
               "half": {"model": small().state_dict()}}  # fmt: skip
    if content in objects:
        torch.save(objects[content], path)
    if content in ("text", "nothing"):
        path.write_text("weights" if content == "text" else "")
    if content == "half":
        path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="c.pth: (no checkpoint that can be read|holds no tensors)") as caught:
        load_weights(small(), path)
    assert not ran.exists() and "\n" not in str(caught.value)
    if content == "code":
        pickle.loads(pickle.dumps(Payload(ran)))
        assert ran.exists()  # it would have


# ---- training ----


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_new_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, other = small(), small(), make_cnn14(2, 1 / 16, 1)
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items()]
    assert all(same) and not torch.equal(a.fc1.weight, other.fc1.weight)
    bound = (6 / (9 * 4 + 9 * 8)) ** 0.5  # Xavier's, for 4 channels to 8
    drawn = a.conv_block2.conv1.weight.detach()
    assert 0.95 * bound < drawn.abs().max() <= bound and drawn.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert a.fc1.bias.eq(0).all() and a.bn0.weight.eq(1).all() and a.bn0.running_var.eq(1).all()


def test_spec_augment_zeroes_two_stripes_each_way():
    kept_BAM = spec_augment(torch.ones(400, 1, 1001, 64), generator())[:, 0]
    for kept, widest in ((kept_BAM.amax(2), 64), (kept_BAM.amax(1), 8)):
        stripes = (kept.diff(dim=1) == -1).sum(1) + (kept[:, 0] == 0)
        assert stripes.max() == 2 and stripes.min() in (0, 1)
        dropped = (kept == 0).sum(1)
        assert 1.8 * (widest - 1) < dropped.max() <= 2 * (widest - 1)
        assert dropped.float().mean() == pytest.approx(widest - 1, rel=0.08)  # a stripe: 0 to widest - 1, evenly
        assert (kept == 0).any(0).float().mean() > 0.98, "stripes fall everywhere"
    assert torch.equal(kept_BAM, kept_BAM.amax(2)[:, :, None] * kept_BAM.amax(1)[:, None])
    again = spec_augment(torch.ones(4, 1, 1001, 64), generator(1))
    assert torch.equal(again, spec_augment(torch.ones(4, 1, 1001, 64), generator(1)))
    short = spec_augment(torch.ones(500, 1, 101, 64), generator())[:, 0].amax(2)
    assert (short == 0).sum(1).max() <= 10  # 1 s: stripes are a tenth as long


def test_mixup_mixes_neighbours_and_their_targets_alike():
    x_B1AM = torch.tensor([1.0, 10.0, 2.0, 20.0]).view(4, 1, 1, 1).expand(4, 1, 3, 2)
    mixed, target = mixup(x_B1AM, torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2), generator())
    assert mixed.shape == (2, 1, 3, 2) and target.shape == (2, 2)
    assert torch.allclose(target.sum(1), torch.ones(2))
    for row, (first, second) in enumerate(((1, 10), (2, 20))):
        share = target[row, 0]
        assert 0 < share < 1 and torch.allclose(mixed[row], share * first + (1 - share) * second)
    many = mixup(torch.zeros(8000, 1, 1, 1), F.one_hot(torch.arange(8000) % 2).float(), generator())[1][:, 0]
    assert many.mean() == pytest.approx(0.5, abs=0.02) and many.std() == pytest.approx(12**-0.5, abs=0.01)  # uniform


def test_dropout_is_drawn_from_the_generator_and_there_is_none_without():
    model = fill(small()).eval()
    x_B1AM = model.normalise(log_mel(noise())[None])
    plain = model.embed(x_B1AM)
    assert torch.equal(plain, model.embed(x_B1AM))
    drawn = [model.embed(x_B1AM, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    many = torch.cat([model.embed(x_B1AM, generator(seed)) for seed in range(200)])
    alive = many[:, plain[0] > 0.5 * plain.max()]
    assert (alive == 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_each_dropout_has_its_share_and_keeps_the_mean(monkeypatch):
    from minixmd.models import cnn14

    shares, real = [], cnn14._dropout
    monkeypatch.setattr(cnn14, "_dropout", lambda x, p, g: shares.append(p) or real(x, p, g))
    small().eval().embed(torch.zeros(1, 1, 40, 64), generator())
    assert shares == [0.2] * 6 + [0.5] * 2
    for p in (0.2, 0.5):
        x = real(torch.ones(200_000), p, generator())
        assert (x == 0).float().mean() == pytest.approx(p, abs=0.005) and x.mean() == pytest.approx(1, abs=0.01)
