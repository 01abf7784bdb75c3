"""The peak memory of a piece of code and its floating-point operations, found without computing anything.

The code runs on PyTorch's `meta` device. Every storage is followed from its creation to its release. Not counted are
an operator's own workspace, what an allocator rounds up or cannot reuse, and the driver. Operations are those of matrix
products, convolutions and attention, as if nothing were masked; the decoding kernel, bound by the cache, has none.

On `meta` there are no values: integers copied from the CPU keep theirs; of any other tensor `.item()` is 1, a copy on
the CPU is 0, and a boolean mask selects every element."""
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock
from weakref import ref

import torch
import torch.fx.experimental._config
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minixmd.kernels import lora
from minixmd.runs import distributed

aten = torch.ops.aten
CATEGORIES = ("weights", "reference", "teacher", "gradients", "optimizer", "KV cache", "logits", "activations")
ATTENTION_FLOPS = {  # of operators that the registry lacks; two products forward, five backward
    "aten._scaled_dot_product_flash_attention_for_cpu": lambda q, k, *_: 4 * q.numel() * k.shape[2],
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": lambda _, q, k, *more: 10 * q.numel() * k.shape[2],
    "torch_attn._varlen_attn": lambda q, *more: 4 * q.numel() * more[5],  # by the longest segment's keys
    "torch_attn._varlen_attn_backward": lambda _, q, *more: 10 * q.numel() * more[7],
}


@dataclass
class Phase:
    """A part of a stage's work, what it holds at its fullest moment, and what one pass of it computes."""
    name: str
    tokens: int  # packed into a forward pass; 0 = none
    sequences: int  # prompts or clips of a pass
    bytes: Counter = None  # by category
    flops: int = 0
    step_flops: int = 0  # of decoding a token in every slot; 0 = nothing is written
    sent: int = 0  # bytes that a process sends in a pass

    @property
    def total(self):
        return self.bytes.total()


class MemoryTracer(TorchDispatchMode):
    """Counts the bytes of all live `meta` storages and finds the peak of each phase. A storage belongs to the
    `category` set when it is made; an activation with a side of vocab_size to "logits". flops: since the last phase."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.category, self.phases = vocab_size, "weights", []
        self.current, self.peak = Counter(), Counter()  # bytes by category
        self.flops = 0
        self.storages = {}  # storage -> (weak reference, category, bytes)
        self.values = {}  # storage -> the CPU tensor that it is a copy of

    @contextmanager
    def phase(self, name, tokens=0, category="activations", sequences=1):
        """Adds its block to `phases`, and yields the Phase. category: of the storages that are made in it."""
        self.category, self.peak = category, self.current.copy()
        phase = Phase(name, tokens, sequences)
        yield phase
        phase.bytes = self.peak
        phase.flops, self.flops = self.flops, 0
        self.phases.append(phase)

    def recategorize(self, tensors, category):
        for tensor in tensors:
            self._release(tensor.untyped_storage()._cdata)
            self._follow(tensor, category)

    def count_gradients(self, parameters):
        """Moves every gradient to "gradients" as soon as it is accumulated."""
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: self.recategorize([p.grad], "gradients"))

    def _follow(self, tensor, category):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = (ref(storage, lambda _: self._release(key)), category, size)
            self.current[category] += size
            if self.current.total() > self.peak.total():
                self.peak = self.current.copy()

    def _release(self, key):
        _, category, size = self.storages.pop(key)
        self.values.pop(key, None)
        self.current[category] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if x is not None and x.is_meta:
            if func is aten._local_scalar_dense.default:  # .item()
                return 1
            if func is aten._to_copy.default and (kwargs.get("device") or x.device).type == "cpu":
                values = self.values.get(x.untyped_storage()._cdata)
                known = values is not None and values.shape == x.shape
                dtype = kwargs.get("dtype") or x.dtype
                return values.to(dtype) if known else torch.zeros((), dtype=dtype).expand(x.shape)  # without memory
        out = func(*args, **kwargs)
        self.flops += count_flops(func, args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                is_logits = self.category == "activations" and tensor.ndim == 2 and self.vocab_size in tensor.shape
                self._follow(tensor, "logits" if is_logits else self.category)
        if func is aten._to_copy.default and not x.is_meta and out.is_meta and not x.is_floating_point():
            self.values[out.untyped_storage()._cdata] = x
        return out


def count_flops(func, args, kwargs, out):
    """Of an operator; 0 of one that is no product."""
    name = str(func.overloadpacket)
    if name in ATTENTION_FLOPS:
        return ATTENTION_FLOPS[name](*args)
    formula = flop_registry.get(aten.addmm if name == "aten.addmm_" else func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _fused_attention(q_BHTK, k_BJSK, v_BJSK, attn_mask=None, is_causal=False, enable_gqa=False):
    """Attention that keeps what every fused kernel keeps: the output, a number a row, and a mask in q's dtype."""
    bias = None if attn_mask is None else attn_mask.to(q_BHTK.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(q_BHTK, k_BJSK, v_BJSK, 0.0, is_causal, attn_mask=bias)[0]


@contextmanager
def trace_memory(vocab_size, device):
    """Traces its block as if it ran on `device`, "cuda" or "cpu", in a single process; yields the MemoryTracer. No
    Triton kernel is run."""
    alone = mock.patch.object(distributed, "rank_and_world_size", lambda: (0, 1))  # the others do not take part
    attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention)
    is_cuda = mock.patch.object(torch.Tensor, "is_cuda", property(lambda x: x.is_meta and device == "cuda"))
    masks_select_all = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)
    no_launch = mock.patch.object(triton.KernelInterface, "__getitem__", lambda *_: lambda *args, **kwargs: None)
    unfused = mock.patch.object(lora, "FUSED_D", 0)  # the kernel's products by the library, where they are counted
    with alone, attention, is_cuda, masks_select_all, no_launch, unfused, MemoryTracer(vocab_size) as tracer:
        yield tracer
