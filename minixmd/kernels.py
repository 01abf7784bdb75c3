"""`minixmd.kernels` is the top-level kernels/ folder; huggingface owns the name `kernels` (README, "Layout")."""
from pathlib import Path

_here = Path(__file__).resolve().parent
_wheel = _here / "kernels"
_checkout = _here.parent / "kernels"
__path__ = [str(_wheel if _wheel.is_dir() else _checkout)]
