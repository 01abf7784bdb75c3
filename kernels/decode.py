"""Decode attention: one new token per completion, over a prompt that n completions share and the completion's own rows.

Prompts are in prompt slots and completions in decode slots; decode slot b continues prompt slot prompt_B[b]. Its keys
fall into parts X: stretches of SPLIT rows of the prompt, and its own rows, the suffix. With s = q kᵀ / sqrt(K), each
gives

    lse_X = log sum_{x in X} exp s[x],        o_X = sum_{x in X} exp(s[x] - lse_X) v[x]

and the parts combine exactly:  lse = log sum_X exp lse_X,   o = sum_X exp(lse_X - lse) o_X.

The prompt kernel has one program per (prompt slot, kv head, part). It gathers the queries that see these rows by
members_GM, the decode slots of each prompt, and they form one matrix product: keys and values are read once for all n
completions, wherever their slots are. A prompt that nobody continues is not read. The suffix kernel has one program per
(decode slot, kv head) and merges the prompt's parts into its own. A slot's arithmetic depends on its own lengths alone,
not on the batch: the splits are fixed, and no sum runs over rows that only others need.

Bytes per kv head, elements of i bytes, counted: 2 K i (P + n C), against 2 K i n (P + C) with a prompt's copy for each.
For n = 8, P = 850, C = 256 and Qwen2-Audio-7B (H = J = 32, K = 128, bf16), parts included, 49 MB a layer against 145.
Dims: G prompt slots, n completions each and M at most, B decode slots; H query heads, J kv heads, R = H / J, K head
size; P and C rows that the pools of prompts and of completions have room for."""
import torch
import triton
import triton.language as tl

from minixmd.kernels.logit_rows import LOG2E, LOWEST

SPLIT = 256  # prompt rows per program: 8 prompts of 850 rows and 4 kv heads make 128 programs for 132 SMs
MOST_R, BLOCK_S = 64, 64  # queries per program at most (others find the prompt's rows in L2); rows of keys per step
FP32_MOST_R, FP32_BLOCK_S = 16, 16  # exact fp32 products keep their operands in registers: larger tiles spill
NUM_WARPS, NUM_STAGES = 4, 2


def _part(q_XRK, k_XSK, v_XSK, length_X):
    """(o, lse) of one part over the first `length` of its rows. X stands for two dims: (G, J) or (B, J)."""
    seen_XS = torch.arange(k_XSK.shape[2], device=q_XRK.device) < length_X[:, None]
    s_XRS = (q_XRK @ k_XSK.to(q_XRK.dtype).transpose(2, 3)).where(seen_XS[:, None, None], LOWEST.value)
    top_XR1 = s_XRS.amax(-1, keepdim=True)
    e_XRS = (s_XRS - top_XR1).exp_()
    sum_XR1 = e_XRS.sum(-1, keepdim=True)
    return e_XRS @ v_XSK.to(q_XRK.dtype) / sum_XR1, top_XR1 + sum_XR1.log()


def decode_attention_ref(
        q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, members_GM, prompt_B, k_BJCK, v_BJCK, length_B):
    """What decode_attention returns, in plain PyTorch. It goes by members_GM alone."""
    (G, J, _, K), (B, H, _), M = prompt_k_GJPK.shape, q_BHK.shape, members_GM.shape[1]
    dtype = torch.promote_types(q_BHK.dtype, torch.float32)
    q_BJRK = (q_BHK.to(dtype) * K**-0.5).view(B, J, H // J, K)
    member_X = members_GM.flatten()
    q_GJRK = q_BJRK[member_X.clamp(min=0)].view(G, M, J, -1, K).transpose(1, 2).flatten(2, 3)  # R: of a prompt slot
    slot_X, parts = member_X % (B + 1), []  # -1, of no slot, is one more, which is cut off
    for part in _part(q_GJRK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G):
        part_X = part.unflatten(2, (M, -1)).transpose(1, 2).flatten(0, 1)
        none = part_X.new_full((B + 1, *part_X.shape[1:]), LOWEST.value)
        parts.append(none.index_copy(0, slot_X, part_X)[:B])
    o, lse = parts
    own_o, own_lse = _part(q_BJRK, k_BJCK, v_BJCK, length_B)
    return torch.lerp(o, own_o, torch.sigmoid(own_lse - lse)).reshape(B, H, K).to(q_BHK.dtype)


@triton.jit
def _attend_rows(q, k_ptr, v_ptr, start, end, scale, K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of queries q over rows start ... end - 1: largest scores (base 2), sums of weights, sums of weighted values."""
    c, scale = tl.arange(0, q.shape[1]), tl.cast(scale, tl.float32) * LOG2E
    m, total = tl.full([q.shape[0]], LOWEST, tl.float32), tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    for at in range(start, end, BLOCK_S):
        s = at + tl.arange(0, BLOCK_S)
        rows = s.to(tl.int64)[:, None] * K + c[None, :]
        ok = (s[:, None] < end) & (c[None, :] < K)
        k = tl.load(k_ptr + rows, mask=ok, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        z = tl.where(s[None, :] < end, z, LOWEST)
        top = tl.maximum(m, tl.max(z, 1))
        e, shrink = tl.exp2(z - top[:, None]), tl.exp2(m - top)
        v = tl.load(v_ptr + rows, mask=ok, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(e, 1)
        m = top
    return m, total, acc


@triton.jit(do_not_specialize=["M"])
def _prompt_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, member_ptr, o_ptr, lse_ptr,
    stride_kg, stride_kj, scale, M, H, J, splits,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    g, j = (tl.program_id(0) // J).to(tl.int64), tl.program_id(0) % J
    split, R = tl.program_id(1), H // J
    start, length = split * SPLIT, tl.load(length_ptr + g).to(tl.int32)
    r, c = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    slot = tl.load(member_ptr + g * M + r // R, mask=r < M * R, other=-1).to(tl.int32)
    if (start < length) & (tl.max(slot, 0) >= 0):  # the suffix kernel reads no part past the length
        row = slot * H + j * R + r % R  # of q: (decode slot, head)
        ok = (slot[:, None] >= 0) & (c[None, :] < K)
        q = tl.load(q_ptr + row[:, None] * K + c[None, :], mask=ok, other=0.0)
        at = g * stride_kg + j * stride_kj
        end = tl.minimum(start + SPLIT, length)
        m, total, acc = _attend_rows(q, k_ptr + at, v_ptr + at, start, end, scale, K, BLOCK_S)
        part = row * splits + split
        tl.store(o_ptr + part[:, None] * K + c[None, :], acc / total[:, None], mask=ok)
        tl.store(lse_ptr + part, m + tl.log2(total), mask=slot >= 0)  # base 2


@triton.jit
def _suffix_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, prompt_ptr, prompt_length_ptr, part_ptr, lse_ptr, out_ptr,
    stride_kb, stride_kj, scale, H, J, splits,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b, j, R = (tl.program_id(0) // J).to(tl.int64), tl.program_id(0) % J, H // J
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row, ok = b * H + j * R + r, (r[:, None] < R) & (c[None, :] < K)
    q = tl.load(q_ptr + row[:, None] * K + c[None, :], mask=ok, other=0.0)
    at = b * stride_kb + j * stride_kj
    length, g = tl.load(length_ptr + b).to(tl.int32), tl.load(prompt_ptr + b)
    prompt_length = tl.load(prompt_length_ptr + g, mask=g >= 0, other=0).to(tl.int32)
    m, total, acc = _attend_rows(q, k_ptr + at, v_ptr + at, 0, length, scale, K, BLOCK_S)
    for split in range(0, tl.cdiv(prompt_length, SPLIT)):
        part = row * splits + split
        lse = tl.load(lse_ptr + part, mask=r < R, other=0.0)
        o = tl.load(part_ptr + part[:, None] * K + c[None, :], mask=ok, other=0.0)
        top = tl.maximum(m, lse)
        shrink, weight = tl.exp2(m - top), tl.exp2(lse - top)
        acc = acc * shrink[:, None] + o * weight[:, None]
        total = total * shrink + weight
        m = top
    tl.store(out_ptr + row[:, None] * K + c[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


def decode_attention(
        q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, members_GM, prompt_B, k_BJCK, v_BJCK, length_B,
        backend="triton"):
    """softmax(q kᵀ / sqrt(K)) v of every decode slot b, over its prompt slot and then its own rows.

    q_BHK: (B, H, K) fp32 | bf16 | fp16, the query of one new token per decode slot. "torch" also takes fp64.
    prompt_k_GJPK, prompt_v_GJPK: (G, J, P, K) of q's dtype. prompt_length_G: (G,) int64 in [1, P].
    members_GM: (G, M) int64, the decode slots that continue each prompt slot, -1 for none. prompt_B: (B,) int64, the
        same the other way round: the prompt slot of each decode slot, -1 for one that sees its own rows alone.
    k_BJCK, v_BJCK: (B, J, C, K), the completions' own rows, that of the new token included.
    length_B: (B,) int64 in [0, C]; 0 only with a prompt.
        Lengths and slots are not checked: it would synchronise. "triton" reads nothing past a length and wants the last
        two dims packed; "torch" multiplies values there by 0, so they must be finite.
    backend: "triton" | "torch".
    Returns (B, H, K) in q's dtype. Raises ValueError: shapes that do not fit together, strides, or backend."""
    (B, H, K), (G, J, P, _), C, M = q_BHK.shape, prompt_k_GJPK.shape, k_BJCK.shape[2], members_GM.shape[-1]
    tensors = prompt_k_GJPK, prompt_v_GJPK, k_BJCK, v_BJCK, prompt_length_G, length_B, members_GM, prompt_B
    shapes = [tuple(x.shape) for x in tensors]
    if H % J or shapes != [(G, J, P, K)] * 2 + [(B, J, C, K)] * 2 + [(G,), (B,), (G, M), (B,)]:
        raise ValueError(f"need pools (G, J, P, K) and (B, J, C, K), with J dividing H, a length for each G and B, and "
                         f"slots (G, M) and (B,), got queries {(B, H, K)} and {shapes}")
    if backend == "torch":
        return decode_attention_ref(q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, members_GM, prompt_B, k_BJCK,
                                    v_BJCK, length_B)
    if backend != "triton":
        raise ValueError(f"backend must be 'triton' or 'torch', got {backend!r}")
    for a, b in ((prompt_k_GJPK, prompt_v_GJPK), (k_BJCK, v_BJCK)):
        if a.stride() != b.stride() or a.stride()[2:] != (K, 1):
            raise ValueError(f"keys and values need equal strides ending in {(K, 1)}, got {a.stride()}, {b.stride()}")
    R, splits = H // J, triton.cdiv(P, SPLIT)
    q_BHK = q_BHK.contiguous()
    out_BHK = torch.empty_like(q_BHK)
    part, lse = (torch.empty(B, H, splits, width, dtype=torch.float32, device=q_BHK.device) for width in (K, 1))
    most_r, block_s = (FP32_MOST_R, FP32_BLOCK_S) if q_BHK.dtype == torch.float32 else (MOST_R, BLOCK_S)
    launch = dict(K=K, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_S=block_s, SPLIT=SPLIT, num_warps=NUM_WARPS,
                  num_stages=NUM_STAGES)
    block = min(most_r, max(16, triton.next_power_of_2(M * R)))  # a tensor core takes no fewer than 16 rows
    _prompt_kernel[(G * J, splits, triton.cdiv(M * R, block))](
        q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, members_GM, part, lse, *prompt_k_GJPK.stride()[:2],
        K**-0.5, M, H, J, splits, BLOCK_R=block, **launch)
    _suffix_kernel[(B * J,)](
        q_BHK, k_BJCK, v_BJCK, length_B, prompt_B, prompt_length_G, part, lse, out_BHK, *k_BJCK.stride()[:2], K**-0.5,
        H, J, splits, BLOCK_R=max(16, triton.next_power_of_2(R)), **launch)
    return out_BHK
