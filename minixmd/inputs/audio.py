"""Whisper's log-mel frames, as Qwen2-Audio takes them, without the reference's padding to 30 s; and resampling.

Letters: S samples at 16 kHz, M = 128 mel bins, A mel frames of 10 ms."""
import functools
import math
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F

SAMPLE_RATE = 16_000
N_FFT, HOP, MELS = 400, 160, 128
WINDOW_S = 30  # seconds that Qwen2-Audio's tower was made for: what comes later is ignored
RESAMPLE_BLOCK = 1 << 20  # samples handed to libswresample at once
HALO = 2  # frames after the last real one that sound still reaches; the tower's convolutions look no further ahead
MIN_SAMPLES = 2 * HOP + 1  # fewer give no audio token


def num_mel_frames(num_samples, window_s=WINDOW_S):
    """Mel frames that a clip of so many samples fills: one per started 10 ms, at most those of the window."""
    return min(-(-num_samples // HOP), window_s * SAMPLE_RATE // HOP)


def num_audio_tokens(mel_frames):
    """Tokens that so many mel frames become: a stride-2 convolution, then pooling by 2. Fewer than 3 frames give 0."""
    return (mel_frames + 1) // 2 // 2


def log_mel(wave_S, window_s=WINDOW_S):
    """The log-mel frames of a clip: all that hold sound, and a halo of two.

    Equal to the first columns of WhisperFeatureExtractor(feature_size=128)'s (128, 3000) for the clip padded to 30 s,
    where all columns that are left out here hold the floor, which is relative to the loudest value, the halo's too.

    wave_S: (S,) float32, 16 kHz mono; what lies beyond window_s seconds is ignored. Returns mel_MA: (128, min(l + 2,
    100 window_s)) float32 where l = num_mel_frames(S, window_s). Raises ValueError: "too short" for 320 samples (20 ms)
    or fewer; not 1-D floating point; samples above about 1e16, whose power overflows.
    Source: transformers 5.23 models/whisper/feature_extraction_whisper.py; tests/test_audio.py compares."""
    if wave_S.dim() != 1 or not wave_S.is_floating_point():
        raise ValueError(f"log_mel needs a 1-D floating-point wave, got {wave_S.dtype} {tuple(wave_S.shape)}")
    if len(wave_S) < MIN_SAMPLES:
        raise ValueError(f"too short: {len(wave_S)} samples give no audio token, {MIN_SAMPLES} are needed")
    max_samples = window_s * SAMPLE_RATE
    wave_S = wave_S[:max_samples].float()
    frames = min(num_mel_frames(len(wave_S), window_s) + HALO, max_samples // HOP)
    # Silence enough that no kept frame reaches the padded end, where stft reflects; at 30 s so does the reference.
    padded = F.pad(wave_S, (0, min(frames * HOP + N_FFT, max_samples) - len(wave_S)))
    window = torch.hann_window(N_FFT, device=wave_S.device)  # periodic
    power = torch.stft(padded, N_FFT, HOP, window=window, return_complex=True)[:, :frames].abs() ** 2
    mel_MA = (mel_filters(N_FFT, MELS).to(wave_S.device) @ power.contiguous()).clamp(min=1e-10).log10()
    mel_MA = (torch.maximum(mel_MA, mel_MA.max() - 8.0) + 4.0) / 4.0
    if not torch.isfinite(mel_MA).all():
        raise ValueError(f"log_mel: samples up to {wave_S.abs().max().item():.3g} are not finite as power")
    return mel_MA


@functools.cache
def mel_filters(n_fft, mels, lowest_hz=0):
    """Slaney's filter bank, (mels, n_fft / 2 + 1) float32: triangles from lowest_hz to 8 kHz, each with an area of one.
    The mel scale is linear to 1 kHz (15 mel) and logarithmic above (27 steps for a factor of 6.4)."""
    step = np.log(6.4) / 27
    mel = np.linspace(lowest_hz * 3 / 200, 15 + np.log(SAMPLE_RATE / 2 / 1000) / step, mels + 2)
    edge_hz = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))[:, None]
    left, centre, right = edge_hz[:-2], edge_hz[1:-1], edge_hz[2:]
    bin_hz = np.linspace(0.0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    rise = (bin_hz - left) / (centre - left)
    fall = (right - bin_hz) / (right - centre)
    triangles = np.maximum(0.0, np.minimum(rise, fall)) * 2 / (right - left)
    return torch.from_numpy(triangles.astype(np.float32))


def resample(wave_S, rate, sample_rate):
    """Resample float32 samples with libswresample's windowed sinc; no shift in time.

    To 16 kHz it measures -0.4 dB at 7 kHz, and tones from 9 kHz up are 60 dB down. Beyond both ends is silence, given
    explicitly: libswresample alone mirrors the ends and drops a very short input. wave_S: (S,) float32 numpy array.
    Returns (round(S * sample_rate / rate),) float32, halves up; wave_S itself when the rates are equal."""
    if rate == sample_rate:
        return wave_S
    common = math.gcd(rate, sample_rate)
    reach = 64 * (rate // sample_rate + 1)  # twice its 32 taps, which stretch when the rate falls
    periods = -(-reach * common // rate)  # whole ones, so that the silence is an integer number of output samples too
    silence = np.zeros(periods * rate // common, np.float32)
    padded = np.concatenate([silence, wave_S, silence])
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
    outputs = []
    for start in range(0, len(padded), RESAMPLE_BLOCK):
        frame = av.AudioFrame.from_ndarray(padded[None, start : start + RESAMPLE_BLOCK], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        outputs += resampler.resample(frame)
    outputs += resampler.resample(None)
    resampled = np.concatenate([frame.to_ndarray()[0] for frame in outputs])
    first = periods * sample_rate // common
    count = (2 * len(wave_S) * sample_rate + rate) // (2 * rate)
    return resampled[first : first + count].copy()  # a copy: the padding is freed
