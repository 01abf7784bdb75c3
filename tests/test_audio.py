import math

import numpy as np
import pytest
import torch
from media_files import sine

from minixmd.inputs.audio import log_mel, mel_filters, num_audio_tokens, num_mel_frames, resample

# from transformers 5.23's mel_filter_bank (Slaney scale and norm)
FILTERS = {
    (0, 0): 0.0, (0, 1): 0.012373986, (1, 1): 0.030392565, (2, 2): 0.024747973, (127, 198): 0.0022285604,
    (127, 199): 0.0011142802, (127, 200): 0.0, (17, 11): 0.007814196, (37, 22): 0.027138159, (44, 26): 0.015329193,
    (60, 39): 0.021224553, (90, 80): 0.012934732, (110, 130): 0.0069263966, (60, 40): 0.0, (110, 131): 0.0043967292,
}  # fmt: skip
# 440 Hz at amplitude 0.5 for 0.1 s, from transformers 5.23's WhisperFeatureExtractor: (bin, frame): value
SINE = {
    (0, 0): 0.90752, (17, 0): 1.176514, (17, 5): 1.337491, (18, 5): 1.485354, (21, 5): -0.514646, (17, 9): 1.336659,
    (17, 10): 1.20919, (60, 10): 0.305548, (17, 11): 0.278448, (127, 11): -0.514646,
}  # fmt: skip


def test_mel_filters_equal_golden_numbers():
    filters = mel_filters(400, 128)
    assert filters.shape == (128, 201) and filters.dtype == torch.float32
    for place, value in FILTERS.items():
        assert filters[place].item() == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_log_mel_equals_golden_numbers():
    mel_MA = log_mel(torch.from_numpy(sine(440, 0.1)))
    assert mel_MA.shape == (128, 12)
    for place, value in SINE.items():
        assert mel_MA[place].item() == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("samples, frames, tokens", [  # a hand check: 160 samples a frame, 4 frames a token
    (0, 0, 0), (1, 1, 0), (160, 1, 0), (320, 2, 0), (321, 3, 1), (640, 4, 1), (1120, 7, 2), (16000, 100, 25),
    (160000, 1000, 250), (479999, 3000, 750), (480000, 3000, 750), (560000, 3000, 750),
])  # fmt: skip
def test_frame_and_token_counts(samples, frames, tokens):
    assert num_mel_frames(samples) == frames and num_audio_tokens(frames) == tokens


def test_token_count_is_that_of_the_convolution_and_the_pooling():
    for frames in range(4, 200):
        after_conv = torch.nn.functional.conv1d(torch.zeros(1, 1, frames), torch.zeros(1, 1, 3), stride=2, padding=1)
        assert num_audio_tokens(frames) == torch.nn.functional.avg_pool1d(after_conv, 2).shape[-1]


def clips():
    g = np.random.default_rng(0)
    for samples in (321, 480, 481, 1600, 1601, 16000, 47999, 159999, 479200, 479600, 479999, 480000, 480001, 560000):
        yield f"noise {samples}", (0.1 * g.standard_normal(samples)).astype(np.float32)
    yield "sine", sine(440, 1.3)
    yield "silence", np.zeros(32000, np.float32)
    yield "faint", 1e-6 * sine(1000, 0.5)
    yield "overdriven", 4 * sine(300, 0.5)
    for samples in (400, 15999, 16000, 16001, 479999):  # the loudest frame may lie after the last real one
        click = np.zeros(samples, np.float32)
        click[-1] = 1.0
        yield f"click at the end of {samples}", click


@pytest.mark.parametrize("name, wave", list(clips()), ids=lambda v: v if isinstance(v, str) else "")
def test_log_mel_equals_transformers(name, wave):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    whole = extractor(wave, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    reference_MA, frames = whole["input_features"][0], int(whole["attention_mask"].sum())
    mel_MA = log_mel(torch.from_numpy(wave))
    assert num_mel_frames(len(wave)) == frames and mel_MA.shape == (128, min(frames + 2, 3000))
    kept = mel_MA.shape[1]
    atol = 1e-5 * reference_MA.abs().max().item()
    torch.testing.assert_close(mel_MA, reference_MA[:, :kept], atol=atol, rtol=0)
    if kept < 3000:  # what is left out holds nothing: one value, the smallest
        left_out = reference_MA[:, kept:]
        assert left_out.min() == left_out.max() == reference_MA.min()


@pytest.mark.parametrize("samples", [500_001, pytest.param(4_799_900, marks=pytest.mark.slow),
                                     pytest.param(4_900_000, marks=pytest.mark.slow)])
def test_omnis_window_of_300_s_equals_transformers(samples):
    transformers = pytest.importorskip("transformers")
    wave = (0.1 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    whole = extractor(wave, sampling_rate=16000, return_attention_mask=True, padding="max_length", return_tensors="pt")
    frames = int(whole["attention_mask"].sum())
    assert num_mel_frames(samples, 300) == frames
    mel_MA = log_mel(torch.from_numpy(wave), 300)[:, :frames]
    torch.testing.assert_close(mel_MA, whole["input_features"][0][:, :frames], atol=2e-5, rtol=0)


def test_the_loudest_value_is_taken_over_the_halo_too():
    """Last sample of a frame's 160: the halo frame centred on the next sample hears the click loudest."""
    wave_S = torch.zeros(16000)
    wave_S[-1] = 1.0
    mel_MA = log_mel(wave_S)
    assert mel_MA[:, 100].max() > mel_MA[:, :100].max() + 0.05
    assert mel_MA.max() - mel_MA.min() == pytest.approx(2.0, abs=1e-5)  # 8 / 4: the floor hangs on the loudest


def test_only_the_first_30_s_are_heard():
    wave_S = 0.1 * torch.randn(500_000)
    assert torch.equal(log_mel(wave_S), log_mel(wave_S[:480_000]))


def test_log_mel_refuses_what_gives_no_token_or_no_number():
    with pytest.raises(ValueError, match="too short: 320 samples"):
        log_mel(torch.zeros(320))
    assert log_mel(torch.zeros(321)).shape == (128, 5)
    with pytest.raises(ValueError, match="not finite"):
        log_mel(torch.full((1600,), 1e20))
    for wrong in (torch.zeros(2, 1600), torch.zeros(1600, dtype=torch.int16)):
        with pytest.raises(ValueError, match="1-D floating-point"):
            log_mel(wrong)


RATES = [8000, 11025, 22050, 32000, 44100, 44101, 48000, 96000, 192000]


@pytest.mark.parametrize("rate", RATES)
def test_resample_keeps_length_amplitude_and_phase(rate):
    for hz in (100, 440, 3000):
        out = resample(sine(hz, 1.0, rate), rate, 16000)
        assert out.dtype == np.float32 and len(out) == 16000
        assert np.abs(out - sine(hz, 1.0))[200:-200].max() < 1e-4


@pytest.mark.parametrize("rate", [22050, 44100, 48000, 96000])
def test_resample_lets_no_tone_above_8_khz_through(rate):
    for hz in (9000, 10000):
        out = resample(sine(hz, 1.0, rate), rate, 16000)
        assert np.abs(out)[200:-200].max() < 0.5 * 2e-3  # -54 dB


@pytest.mark.parametrize("rate", [8000, 44100, 44101, 192000])
@pytest.mark.parametrize("samples", [1, 2, 5, 50, 441, 1_100_001])
def test_resample_gives_the_exact_length(rate, samples):
    out = resample(np.ones(samples, np.float32), rate, 16000)
    assert len(out) == math.floor(samples * 16000 / rate + 0.5)
    if len(out) > 400:
        assert np.abs(out[200:-200] - 1).max() < 1e-3


def test_resample_does_not_move_a_click_and_ends_in_silence():
    click = np.zeros(44100, np.float32)
    click[22050] = 1.0
    assert np.abs(resample(click, 44100, 16000)).argmax() == 8000
    start = resample(np.ones(44100, np.float32), 44100, 16000)
    assert 0.3 < start[0] < 0.8  # a step from silence, half way up; mirrored ends would give 1
