"""The configurations in which kernels/ ships its kernels, for kernel_report.py: a function a file, of its module.

Each returns a list of (kernel, types, constants, num_warps, num_stages, kind), as kernel_report.py explains them. Sizes
of the published models are multiples of 16: D, F and R of a layer, 152,064 and 156,032 columns of logits; the common
vocabulary is not.
"""


def logprob(module):
    configs, constants = [], {"BLOCK_V": module.BLOCK_V}
    for logits in ("fp32", "bf16"):
        types = f"*{logits}:16 *i64:16 *i64:16 *fp32:16 i32:16 i32 i32:16 i32 i32 fp32"
        configs.append((module._row_stats_kernel, types, constants, module.NUM_WARPS, 3, "row"))
    for logits, out in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        types = f"*fp32:16 *{logits}:16 *i64:16 *i64:16 *fp32:16 *fp32:16 *{out}:16 i32:16 i32:16 i32:16 i32 i32 fp32"
        configs.append((module._logits_grad_kernel, types, constants, module.NUM_WARPS, 3, "row"))
    return configs


def grpo(module):
    configs = []
    for logits, out, ref, k3, grad in (
        ("fp32", "fp32", True, True, True),
        ("fp32", "bf16", True, True, True),
        ("bf16", "bf16", True, True, True),
        ("fp32", "bf16", True, False, True),
        ("fp32", "bf16", False, True, True),
        ("fp32", "fp32", True, True, False),
    ):
        types = (f"*{logits}:16 *i64:16 *fp32:16 *fp32:16 *fp32:16 *fp32:16 *i64:16 *fp32:16 *{out}:16 i32:16 i32:16 "
                 "i32 i32:16 i32 i32 fp32 fp32 fp32 fp32")
        constants = {"BLOCK_V": module.BLOCK_V, "HAS_REF": ref, "K3": k3, "HAS_OUT": grad}
        configs.append((module._grpo_kernel, types, constants, module.NUM_WARPS, 3, "row"))
    return configs


def distill(module):
    configs = []
    for teacher in ("bf16", "fp32"):
        for out, grad in (("fp32", False), ("fp32", True), ("bf16", True)):
            for reverse in (False, True):
                front, behind = ("fp32", teacher) if reverse else (teacher, "fp32")
                types = (f"*{front}:16 *{behind}:16 *i8:16 *fp32:16 *fp32:16 *fp32:16 *fp32:16 *{out}:16 "
                         "i32:16 i32:16 i32:16 i32 i32:16 i32:16 fp32")
                constants = {"BLOCK_V": module.BLOCK_V, "REVERSE": reverse, "GRAD": grad}
                configs.append((module._kl_kernel, types, constants, module.NUM_WARPS, module.NUM_STAGES, "row"))
    return configs


def distill_topk(module):
    configs = []
    for out, grad in (("fp32", False), ("fp32", True), ("bf16", True)):
        types = (f"*fp32:16 *i32:16 *fp32:16 *fp32:16 *i8:16 *fp32:16 *fp32:16 *fp32:16 *{out}:16 "
                 "i32:16 i32:16 i32 i32:16 i32 fp32")
        constants = {"BLOCK_V": module.BLOCK_V, "BLOCK_J": module.BLOCK_J, "GRAD": grad}
        configs.append((module._topk_kernel, types, constants, module.NUM_WARPS, module.NUM_STAGES, "row"))
    return configs


def lora_triton(module):
    configs = []
    for t, R, bias in (("bf16", 16, True), ("bf16", 16, False), ("bf16", 32, True), ("bf16", 64, True),
                       ("fp16", 16, True)):
        types = f"{f'*{t}:16 ' * 6}i32:16 i32:16 i32:16 i32 i32:16 i32:16 i32:16 fp32"
        constants = {"BLOCK_N": module.BLOCK_N, "BLOCK_F": module._block_f(R), "BLOCK_D": module.BLOCK_D, "BLOCK_R": R,
                     "GROUP_N": module.GROUP_N, "HAS_BIAS": bias}
        configs.append((module._lora_forward_kernel, types, constants, module.FORWARD_WARPS, module.FORWARD_STAGES,
                        "gemm"))
    for t, R in (("bf16", 16), ("bf16", 32), ("fp16", 16)):
        types = f"{f'*{t}:16 ' * 3}*fp32:16 *fp32:16 i32:16 i32 i32:16 i32:16 i32"
        constants = {"BLOCK_N": module.DY_BLOCK_N, "BLOCK_F": module.DY_BLOCK_F, "BLOCK_R": R}
        configs.append((module._dy_pass_kernel, types, constants, module.DY_WARPS, module.DY_STAGES, "gemm"))
    for t in ("bf16", "fp32"):
        constants = {"BLOCK": module.BLOCK_SUM}
        configs.append((module._sum_partials_kernel, f"*fp32:16 *{t}:16 i32 i32 fp32", constants, module.SUM_WARPS,
                        module.SUM_STAGES, "row"))
    return configs


def decode(module):
    configs = []
    for t, block, prompt_rows, kind in (("bf16", module.BLOCK_S, (16, module.MOST_R), "dot"),
                                        ("fp32", module.FP32_BLOCK_S, (module.FP32_MOST_R,), "row")):
        prompt = f"{f'*{t}:16 ' * 3}*i64:16 *i64:16 *fp32:16 *fp32:16 i32:16 i32:16 fp32 i32 i32 i32 i32"
        suffix = f"{f'*{t}:16 ' * 3}{'*i64:16 ' * 3}*fp32:16 *fp32:16 *{t}:16 i32:16 i32:16 fp32 i32 i32 i32"
        cases = [(module._prompt_kernel, prompt, rows) for rows in prompt_rows] + [(module._suffix_kernel, suffix, 16)]
        for kernel, types, rows in cases:
            constants = {"K": 128, "BLOCK_K": 128, "BLOCK_R": rows, "BLOCK_S": block, "SPLIT": module.SPLIT}
            configs.append((kernel, types, constants, module.NUM_WARPS, module.NUM_STAGES, kind))
    return configs


def rmsnorm(module):
    configs = []
    for t in ("bf16", "fp16", "fp32"):
        for block, added in ((4096, True), (8192, True), (4096, False)):
            types = f"{f'*{t}:16 ' * 5}*fp32:16 i32:16 i32:16 i32:16 fp32"
            constants = {"HAS_ADDED": added, "BLOCK_D": block}
            configs.append((module._rms_norm_kernel, types, constants, module.NUM_WARPS, 3, "row"))
        for block, residual, trained in ((4096, True, False), (8192, True, True), (4096, False, True)):
            types = f"{f'*{t}:16 ' * 4}*fp32:16 *{t}:16 *fp32:16 i32:16 i32:16 i32:16 i32 i32:16"
            constants = {"HAS_RESIDUAL": residual, "HAS_DW": trained, "BLOCK_D": block}
            configs.append((module._rms_norm_grad_kernel, types, constants, module.NUM_WARPS, 3, "row"))
    return configs


def rotary(module):
    configs = []
    for t in ("bf16", "fp16", "fp32"):
        for half in (64, 64 // 2):
            types = f"{f'*{t}:16 ' * 4}*fp32:16 *fp32:16 i32:16 i32:16 i32 i32 i32:16 fp32"
            constants = {"BLOCK_H": module.BLOCK_H, "BLOCK_K": half}
            configs.append((module._rotate_kernel, types, constants, module.NUM_WARPS, 3, "row"))
    return configs


def swiglu(module):
    configs = []
    for t in ("bf16", "fp16", "fp32"):
        for kernel, tensors in ((module._swiglu_kernel, 3), (module._swiglu_grad_kernel, 5)):
            types = f"{f'*{t}:16 ' * tensors}i32:16"
            configs.append((kernel, types, {"BLOCK": module.BLOCK}, module.NUM_WARPS, 3, "row"))
    return configs


def adamw(module):
    configs = []
    for half, grad, scaled, size in (
        (True, "bf16", False, "i32:16"),
        (True, "bf16", True, "i32:16"),
        (True, "bf16", True, "i64:16"),
        (True, "bf16", True, "i32"),
        (True, "fp32", True, "i32:16"),
        (False, "fp32", False, "i32:16"),
        (False, "fp32", True, "i32:16"),
    ):
        p, residual = ("i16", "i16") if half else ("fp32", grad)
        moment, scale = ("u8", "fp32") if scaled else ("fp32", grad)
        pointers = " ".join(f"*{t}:16" for t in (p, grad, residual, moment, moment, scale, scale))
        constants = {"HAS_RESIDUAL": half, "HAS_SCALES": scaled, "ROWS": module.ROWS, "BLOCK": module.BLOCK}
        configs.append((module._adamw_kernel, f"{pointers} {size} i32 {'fp32 ' * 7}", constants, module.NUM_WARPS, 3,
                        "row"))
    return configs
