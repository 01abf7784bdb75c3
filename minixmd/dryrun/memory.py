"""The memory that a piece of code would take, found without taking it.

The code runs on `meta`, where a tensor has a shape and no memory. Each storage that it makes is followed until it dies,
so what is counted is what torch's allocator would hand out, tensor by tensor. Not seen: what an operator takes for
itself while it runs, what an allocator rounds up or cannot reuse, and the driver's own share.

Values do not exist on `meta`. Integers that came from the CPU keep theirs; any other number that the code looks at is
1, any other tensor that it copies to the CPU is 0, and any other mask picks everything.
"""
from collections import Counter
from contextlib import contextmanager
from weakref import ref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minixmd.kernels import decode, distill, distill_topk, grpo, logprob, lora_triton

aten = torch.ops.aten


class Live(TorchDispatchMode):
    """Bytes alive on `meta` by part, `now`, and at their most since `watch`, in `most`: {part: bytes}.

    A storage is of the part that stands in `part` when it is made; of "activations", a matrix with a side of V is of
    "logits" instead.
    """

    def __init__(self, V):
        super().__init__()
        self.V, self.part = V, "weights"
        self.sizes, self.known = {}, {}  # storage -> (weak reference, part, bytes); storage -> values on the CPU
        self.now, self.most, self.total, self.top = Counter(), {}, 0, 0

    def watch(self, part):
        """From now on new storages are of this part, and the most is looked for anew."""
        self.part, self.most, self.top = part, dict(self.now), self.total

    def move(self, tensors, part):
        """These tensors are of another part than the one in which they were made."""
        for t in tensors:
            self._drop(t.untyped_storage()._cdata)
            self._follow(t, part)

    def _follow(self, t, part):
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = (ref(storage, lambda _: self._drop(key)), part, size)
        self.now[part] += size
        self.total += size
        if self.total > self.top:
            self.top, self.most = self.total, dict(self.now)

    def _drop(self, key):
        _, part, size = self.sizes.pop(key)
        self.known.pop(key, None)
        self.now[part] -= size
        self.total -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if x is not None and x.is_meta:
            if func is aten._local_scalar_dense.default:
                return 1
            if func is aten._to_copy.default and (kwargs.get("device") or x.device).type == "cpu":
                return self._values(x).to(kwargs.get("dtype") or x.dtype)
            if func is aten.repeat_interleave.Tensor:
                kwargs["output_size"] = int(self._values(x).sum())
            if func is aten.nonzero.default:
                return x.new_empty(x.numel(), x.ndim, dtype=torch.int64)
            if func is aten.index.Tensor:
                args = x, [i if i is None or i.dtype != torch.bool else i.new_empty(i.numel(), dtype=torch.int64)
                           for i in args[1]]
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_meta:
                head = self.part == "activations" and t.ndim == 2 and self.V in t.shape
                self._follow(t, "logits" if head else self.part)
        if func is aten._to_copy.default and not x.is_meta and out.is_meta and not x.is_floating_point():
            self.known[out.untyped_storage()._cdata] = x
        return out

    def _values(self, x):
        found = self.known.get(x.untyped_storage()._cdata)
        return found if found is not None and found.shape == x.shape else torch.zeros(x.shape, dtype=x.dtype)


class _AsOn(TorchFunctionMode):
    """What depends on the device: "cuda" or "cpu", where the code is meant to run."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        if func is torch.tensor and str(kwargs.get("device")) == "meta":  # so that its values are known
            return func(*args, **kwargs | {"device": "cpu"}).to("meta")
        if func == torch.Tensor.is_cuda.__get__ and args[0].is_meta:
            return self.device == "cuda"
        return func(*args, **kwargs)


def _fused(q_BHTK, k_BJSK, v_BJSK, attn_mask=None, is_causal=False, enable_gqa=False):
    """Attention as every fused kernel keeps it: the result, a number a row, and a mask in q's dtype."""
    bias = None if attn_mask is None else attn_mask.to(q_BHTK.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(q_BHTK, k_BJSK, v_BJSK, 0.0, is_causal, attn_mask=bias)[0]


class _Unlaunched:
    def __getitem__(self, grid):
        return lambda *args, **options: None


@contextmanager
def tracing(V, device):
    """Within it code on `meta` is followed, by the Live that it gives, as on `device`: "cuda" or "cpu". Triton kernels
    are not launched. V: rows of the vocabulary."""
    kernels = [(module, name, kernel) for module in (decode, distill, distill_topk, grpo, logprob, lora_triton)
               for name, kernel in list(vars(module).items()) if name.endswith("_kernel")]
    for module, name, _ in kernels:
        setattr(module, name, _Unlaunched())
    try:
        with _AsOn(device), Live(V) as live:
            yield live
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
