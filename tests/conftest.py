"""Without a GPU the Triton kernels run in the interpreter; torch.empty is poisoned with NaN; warnings are errors."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that a test starts: pytest-xdist uses the other cores


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter  # which imports Triton: after the variable is set

        interpreter.mend()
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: long; run by -m slow")
    config.addinivalue_line("filterwarnings", "error")


def pytest_sessionstart():
    torch.set_num_threads(1)  # the tests' tensors are tiny, and a second thread spins where a core is busy
    with torch.device("meta"):
        torch.empty(0)  # this mode lists the functions that it redirects once; it must not list the poisoned ones


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_device(device):
    """Tensors of a test that names no device are made on the GPU where there is one."""
    with torch.device(device):
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """Code that forgets to write an element must fail, not read zeros (idea: fla tests/conftest.py)."""

    def poisoned(fn):
        def wrapper(*args, **kwargs):
            t = fn(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and not t.requires_grad else t

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
