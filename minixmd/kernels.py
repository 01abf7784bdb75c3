"""`minixmd.kernels` is the top-level kernels/ folder; huggingface owns the name `kernels` (README, "Layout")."""
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # lets editors jump from minixmd.kernels.logprob to kernels/logprob.py
    from kernels import decode as decode
    from kernels import distill as distill
    from kernels import distill_topk as distill_topk
    from kernels import grpo as grpo
    from kernels import logit_rows as logit_rows
    from kernels import logprob as logprob
    from kernels import lora as lora
    from kernels import lora_triton as lora_triton

_here = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()][:1]  # wheel, else checkout
