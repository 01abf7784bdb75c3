"""A CUDA device that is not there: tensors that say they are on it and hold their values on the CPU.

    with AbsentDevice() as device:
        ...  # torch.cuda.is_available() is true; Tensor.to("cuda") and factories with device="cuda" give its tensors
    device.launches, device.syncs, device.copies  # {(what, "file.py:line"): how often}

What meets on two devices raises DeviceError, as do a host tensor given to a Triton kernel and a device's read by NumPy.
Counted are

    launches   an operation that writes an element: not views, empty allocations and copies between the devices; a call
               of scaled_dot_product_attention or varlen_attn, and a Triton kernel, is one, and one backward
    syncs      what waits for the device: a value read (item, tolist, bool, a copy to the CPU), an operation whose
               result has a size that the values decide (nonzero, a boolean index, unique, repeat_interleave without
               output_size), a copy from host memory that is not pinned, torch.cuda.synchronize
    copies     from and to the host

`capture` stands in for a CUDA graph: a synchronisation or a copy inside raises CaptureError, as does a replay that is
not the same operations on the same tensors at the same addresses. Not seen: which kernel a library chooses, its
numbers, memory, streams; a number of the CPU, of no dimension, beside tensors of the device, but in cat and stack.
"""
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import pairwise
from pkgutil import iter_modules
from unittest import mock

import torch
import torch.nn.functional as F
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

import minixmd.kernels
from minixmd.learning import decoder
from minixmd.models import attention

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
KERNELS = [import_module(f"minixmd.kernels.{module.name}") for module in iter_modules(minixmd.kernels.__path__)]
NOT_LAUNCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "sym_size"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "equal", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class DeviceError(RuntimeError):
    """Tensors of two devices met."""


class CaptureError(RuntimeError):
    """A captured step would not do the same when it is replayed."""


class OnDevice(torch.Tensor):
    """A tensor of the absent device. host: its values, a CPU tensor. passing: it was made in a captured step, whose
    replay makes it again wherever there is room."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device="meta", requires_grad=requires_grad)  # fmt: skip
        tensor.host = host
        tensor.passing = False
        return tensor

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnDevice({self.host})"

    def __deepcopy__(self, memo):
        copy = OnDevice(self.host.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise DeviceError("a tensor of the absent device outlived it")


def host_of(x):
    return x.host if isinstance(x, OnDevice) else x


def on_device(x):
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def is_meta(device):
    return device is not None and torch.device(device).type == "meta"


def caller():
    """Where in the program, "file.py:line", the current call comes from."""
    for frame in reversed(traceback.extract_stack()):
        if ("/minixmd/" in frame.filename or "/kernels/" in frame.filename) and "site-packages" not in frame.filename:
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
    return "elsewhere"


class AbsentDevice:
    def __init__(self):
        self.launches, self.syncs, self.copies = Counter(), Counter(), Counter()
        self.taping, self.tape = False, []
        self.inference = []  # of each inference_mode that is on: whether gradients were before
        self.real_meta = False  # whether what is made now was asked for on "meta"
        self.patches = ExitStack()

    def __enter__(self):
        patch, cuda = self.patches.enter_context, torch.cuda
        patch(mock.patch.object(cuda, "is_available", lambda: True))
        patch(mock.patch.object(cuda, "get_device_name", lambda *_: "absent"))
        patch(mock.patch.object(cuda, "get_device_capability", lambda *_: (9, 0)))
        patch(mock.patch.object(cuda, "synchronize", lambda *_: self.synchronise("synchronize")))
        # the tensors of inference mode have no version to follow
        patch(mock.patch.object(torch.inference_mode, "__enter__", self.enter_inference))
        patch(mock.patch.object(torch.inference_mode, "__exit__", self.leave_inference))
        patch(mock.patch.object(torch, "Generator", Generator))
        patch(mock.patch.object(decoder, "capture", self.capture))
        patch(mock.patch.object(attention, "varlen_attn", self.varlen_attn))
        patch(mock.patch.object(torch.autograd, "_engine_run_backward", self.run_backward(_engine_run_backward)))
        for module in KERNELS:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, InterpretedFunction) and name.endswith("_kernel"):
                    patch(mock.patch.object(module, name, Launcher(self, name, kernel)))
        patch(Functions(self))
        patch(Operations(self))
        return self

    def __exit__(self, *error):
        self.patches.close()

    def enter_inference(self):
        self.inference.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def leave_inference(self, *error):
        torch.set_grad_enabled(self.inference.pop())

    def varlen_attn(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1),
                    enable_gqa=False):
        if not all(isinstance(x, OnDevice) and x.dtype == torch.int32 for x in (cu_seq_q, cu_seq_k)):
            raise DeviceError(f"varlen_attn at {caller()}: cumulative lengths must be int32 of the device")
        if query.shape[2] % 8 or query.shape[2] > 256 or not all(x.stride(2) == 1 for x in (query, key, value)):
            raise DeviceError(f"varlen_attn at {caller()}: a head of {query.shape[2]}, or not contiguous")

        def attend(q, k, v):
            return varlen_attn(q, k, v, cu_seq_q.host, cu_seq_k.host, max_q, max_k, window_size=window_size,
                               enable_gqa=enable_gqa)

        return _Attend.apply(self, "varlen_attn", attend, query, key, value)

    def run_backward(self, engine):
        """A mode is off while it handles a call, and this one calls all backward functions."""
        def run(*args, **kwargs):
            with Functions(self):
                return engine(*args, **kwargs)

        return run

    def reset(self):
        for counts in (self.launches, self.syncs, self.copies):
            counts.clear()

    def launch(self, name, tensors=()):
        self.launches[name, caller()] += 1
        if self.taping:
            places = [None if x.passing else x.host.data_ptr() for x in tensors]
            self.tape.append((name, [tuple(x.shape) for x in tensors], places))

    def synchronise(self, what):
        self.syncs[what, caller()] += 1
        if self.taping:
            raise CaptureError(f"{what} in a captured step, at {caller()}")

    def copy(self, what, waits):
        self.copies[what, caller()] += 1
        if self.taping:
            raise CaptureError(f"a copy, {what}, in a captured step, at {caller()}")
        if waits:
            self.synchronise(what)

    def capture(self, step):
        """What learning/decoder.capture returns: a function that does the step again, and sees that it is the same."""
        step()
        recorded = self.record(step)

        def replay():
            for number, (before, now) in enumerate(zip(recorded, self.record(step), strict=False)):
                if before != now:
                    raise CaptureError(f"operation {number} of a replay is {now}, and {before} was captured")
            if len(self.tape) != len(recorded):
                raise CaptureError(f"a replay has {len(self.tape)} operations, and {len(recorded)} were captured")

        return replay

    def record(self, step):
        self.taping, self.tape = True, []
        try:
            step()
        finally:
            self.taping = False
        return list(self.tape)

    # ---- operations ----

    def run(self, function, args, kwargs):
        """Does an ATen operation on host values, after checking and counting it."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        name = function._schema.name.removeprefix("aten::")
        if not ours and not is_meta(kwargs.get("device")):
            return function(*args, **kwargs)
        if not ours:  # made by an operation beside a tensor of the device, which says to PyTorch's core that it is meta
            if self.real_meta:
                return function(*args, **kwargs)
            return self.made(function(*args, **{**kwargs, "device": CPU}))
        if name == "copy_":
            return self.copy_into(args)
        others = [x for x in tensors if not isinstance(x, OnDevice)]
        if name in INDEXING:
            self.check_index(name, args, ours)
        elif any(x.ndim or name in ("cat", "stack") for x in others):
            raise DeviceError(f"{name} at {caller()}: of the CPU {[tuple(x.shape) for x in others]}, of the device "
                              f"{[tuple(x.shape) for x in ours]}")
        if name == "_local_scalar_dense":
            self.synchronise("item")
            return function(host_of(args[0]))
        if name in SIZED_BY_VALUES or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.synchronise(name)
        if not is_view(function) and name not in NOT_LAUNCHED:
            self.launch(name, ours)
        host_args, host_kwargs = tree_map(host_of, (args, kwargs))
        if "device" in host_kwargs:
            host_kwargs["device"] = CPU
        if function in (aten.mm.dtype, aten.mm.dtype_out):  # of 16 bits into fp32, which the CPU does not have
            out = torch.matmul(host_args[0].float(), host_args[1].float(), out=host_kwargs.get("out"))
        else:
            out = function(*host_args, **host_kwargs)
        out = tree_map(on_device, out)
        passing = any(x.passing for x in ours) if is_view(function) else self.taping
        for x in tree_leaves(out):
            if isinstance(x, OnDevice):
                x.passing = passing
        return return_and_correct_aliasing(function, args, kwargs, out)

    def made(self, host):
        """A new tensor of the device."""
        tensor = OnDevice(host)
        tensor.passing = self.taping
        return tensor

    def copy_into(self, args):
        target, source = args[:2]
        if isinstance(target, OnDevice) and isinstance(source, OnDevice):
            self.launch("copy_", (target, source))
        elif isinstance(target, OnDevice):
            self.copy("to the device", waits=not is_pinned(source))
        else:
            self.copy("to the host", waits=True)
        host_of(target).copy_(host_of(source))
        return target

    def check_index(self, name, args, ours):
        for index in args[1]:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8):
                self.synchronise("boolean index")
            if not isinstance(args[0], OnDevice):
                raise DeviceError(f"{name} at {caller()}: a tensor of the CPU and an index of the device")
            if not isinstance(index, OnDevice):
                self.copy("an index to the device", waits=True)
        if len(args) > 2 and args[2].ndim and not isinstance(args[2], OnDevice):
            raise DeviceError(f"{name} at {caller()}: the values are on the CPU")

    def move(self, x, device, dtype, copy, non_blocking):
        """Tensor.to between the two devices; differentiable."""
        if is_cuda(device) == isinstance(x, OnDevice):
            return x.to(dtype, copy=copy)
        to_device = is_cuda(device)
        self.copy("to the device" if to_device else "to the host", waits=not (to_device and is_pinned(x)))
        return _Move.apply(x, to_device, dtype)


def is_pinned(x):
    return getattr(x, "pinned", False) or getattr(x._base, "pinned", False)


def with_tensors(index):
    """An index with its lists as tensors of the CPU, as on a device that is there."""
    if isinstance(index, tuple):
        return tuple(with_tensors(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def is_view(function):
    alias = [returned.alias_info for returned in function._schema.returns]
    return bool(alias) and all(info is not None and not info.is_write for info in alias)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, to_device, dtype):
        ctx.to_device, ctx.dtype = to_device, x.dtype
        values = host_of(x).detach().to(dtype, copy=True)
        return OnDevice(values) if to_device else values

    @staticmethod
    def backward(ctx, grad):
        values = host_of(grad).to(ctx.dtype)
        return (values if ctx.to_device else OnDevice(values)), None, None


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes, segment by segment."""
    outputs = []
    queries, keys = cu_seq_q.tolist(), cu_seq_k.tolist()
    for (q0, q1), (k0, k1) in zip(pairwise(queries), pairwise(keys), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if window_size == (-1, 0):
            mask = mask.tril((k1 - k0) - (q1 - q0))  # aligned to the end of the keys
        o = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=enable_gqa)
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


class _Attend(torch.autograd.Function):
    """Attention in one launch, and one in the backward pass."""

    @staticmethod
    def forward(ctx, device, name, function, q, k, v):
        device.launch(name, (q, k, v))
        ctx.device, ctx.name = device, name
        # a graph of its own, of which nothing that follows the outer one keeps a tensor
        own_graph = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.enable_grad(), plain_torch(), own_graph:
            ctx.inputs = [x.host.detach().requires_grad_() for x in (q, k, v)]
            ctx.out = function(*ctx.inputs)
        return device.made(ctx.out.detach())

    @staticmethod
    def backward(ctx, grad):
        ctx.device.launch(f"{ctx.name} backward")
        with plain_torch():
            grads = torch.autograd.grad(ctx.out, ctx.inputs, grad.host)
        return None, None, None, *map(ctx.device.made, grads)


@contextmanager
def plain_torch():
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


class Operations(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.device.run(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What must be seen before it becomes an operation: devices in arguments, and attention, which is one launch."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = self.device
        name = getattr(function, "__name__", "")
        if function is F.scaled_dot_product_attention and isinstance(args[0], OnDevice):
            return self.attend(args, kwargs)
        if isinstance(args[0] if args else None, torch.Tensor):
            x = args[0]
            if name in ("to", "cuda", "cpu"):
                return self.move(name, function, args, kwargs)
            if name == "pin_memory" and not isinstance(x, OnDevice):
                x = x.clone()
                x.pinned = True
                return x
            if name == "is_pinned":
                return is_pinned(x)
            if function == torch.Tensor._base.__get__ and device.inference:
                return None  # a view that is made there knows no base
            if isinstance(x, OnDevice) and name in ("__getitem__", "__setitem__"):
                args = (x, with_tensors(args[1]), *args[2:])
            if isinstance(x, OnDevice) and name in ("numpy", "data_ptr", "__array__"):
                raise DeviceError(f"{name} of a tensor of the device, at {caller()}")
            if isinstance(x, OnDevice) and name == "tolist":
                device.synchronise("tolist")
                return x.host.tolist()
        target = kwargs.get("device")
        generator = kwargs.get("generator")
        if kwargs.pop("pin_memory", False):
            made = function(*args, **kwargs)
            made.pinned = True
            return made
        if isinstance(generator, Generator) and generator.device.type != torch.device(target or "cpu").type:
            raise DeviceError(f"{name} at {caller()}: generator on {generator.device}, tensor on {target}")
        if is_meta(target):
            device.real_meta = True
            try:
                return function(*args, **kwargs)
            finally:
                device.real_meta = False
        if not is_cuda(target):
            return function(*args, **kwargs)
        kwargs["device"] = CPU
        if function in (torch.tensor, torch.as_tensor):
            if isinstance(args[0], OnDevice):
                return args[0].to(kwargs.get("dtype") or args[0].dtype)
            device.copy("to the device", waits=True)
        elif name not in NOT_LAUNCHED:
            device.launch(name)
        with plain_torch():
            values = function(*tree_map(host_of, args), **kwargs)
        return device.made(values)

    def move(self, name, function, args, kwargs):
        x, *rest = args
        target, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        copy, non_blocking = kwargs.pop("copy", False), kwargs.pop("non_blocking", False)
        for value in rest:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                target, dtype = value.device, value.dtype
            elif isinstance(value, (str, torch.device)):
                target = value
        if name != "to":
            target = name
        if target is None or torch.device(target).type == "meta":
            if dtype is not None and dtype not in rest:
                kwargs["dtype"] = dtype
            return function(*args, copy=copy, **kwargs)
        return self.device.move(x, target, dtype or x.dtype, copy, non_blocking)

    def attend(self, args, kwargs):
        q, k, v, *more = args
        mask = kwargs.pop("attn_mask", None)
        if mask is not None and not isinstance(mask, OnDevice):
            raise DeviceError(f"attention at {caller()}: the mask is on the CPU")
        names = ("attn_mask", "dropout_p", "is_causal")
        kwargs = {**dict(zip(names, more, strict=False)), "attn_mask": host_of(mask), **kwargs}

        def attention(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, **kwargs)

        return _Attend.apply(self.device, "scaled_dot_product_attention", attention, q, k, v)


class Launcher:
    """A Triton kernel, interpreted on the host's values."""

    def __init__(self, device, name, kernel):
        self.device, self.name, self.kernel = device, name, kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            for x in tensors:
                if not isinstance(x, OnDevice):
                    raise DeviceError(f"{self.name} at {caller()}: gets a tensor of the CPU, {tuple(x.shape)}")
            self.device.launch(self.name, tensors)
            with plain_torch():
                self.kernel[grid](*map(host_of, args), **{name: host_of(x) for name, x in kwargs.items()})

        return launch


class Generator(torch.Generator):
    """A generator of either device."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.place = torch.device(device)
        return generator

    device = property(lambda self: self.place)
