"""Where a stage runs: its device, dtype and kernel backend, resolved once and printed. Nothing is chosen silently."""
import torch
import triton


def prepare_backends():
    """Settings of PyTorch for all that runs here."""
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions would multiply with 10 bits
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and shapes hardly repeat


def resolve_device(name, device):
    """"cpu" or "cuda"; "auto" is CUDA where there is one. name: of the stage, for the message."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"config: {name}: device 'cuda' was asked for, but torch sees no GPU")
    return device


def runtime_of(stage):
    """What a stage asks of `load`: device, dtype and backend, of which "auto" is Triton on a GPU, PyTorch on a CPU."""
    device, backend = resolve_device(stage.name, stage.device), stage.backend
    if backend == "auto":
        backend = "triton" if device == "cuda" else "torch"
    elif backend == "triton" and device == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(f"config: {stage.name}: backend 'triton' needs a GPU, or TRITON_INTERPRET=1 (very slow)")
    return {"device": device, "dtype": getattr(torch, stage.dtype), "backend": backend}


def describe_device(stage):
    """Such as " on cuda, bfloat16, kernels in triton", of a stage that computes on this machine; else ""."""
    if not hasattr(stage, "device") or getattr(stage, "endpoint", None) or getattr(stage, "checker", "") == "verdicts":
        return ""
    device = resolve_device(stage.name, stage.device)
    text = f" on {device}"
    if hasattr(stage, "backend"):
        text += f", {stage.dtype}, kernels in {runtime_of(stage)['backend']}"
    if device == "cpu":
        text += f", {torch.get_num_threads()} threads"
    return text


def out_of_memory(error):
    """Which ran out of memory, by an error: "the GPU" or "this machine"; None for another error."""
    said = str(error).lower()
    if isinstance(error, MemoryError) or "defaultcpuallocator" in said:
        return "this machine"
    return "the GPU" if "out of memory" in said or "alloc_failed" in said else None  # the second is cuBLAS's
