"""
Forms of the model's operations that are faster or take less memory than the plain ones;
docs/benchmarks-appendix.md has the figures. All run on any device, except the attention kernels of
cuDNN (NVIDIA GPUs) and Pallas (TPUs). They use custom_vjp, so forward mode (jax.jvp) fails.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


@jax.custom_vjp
def matmul(x, w):
    """x (..., n_in) @ w (n_in, n_out), computed and returned in x's dtype.

    The gradient of w is summed in w's own dtype.
    """
    return _matmul_forward(x, w)[0]


def _matmul_forward(x, w):
    return x @ w.astype(x.dtype), (x, w)


def _matmul_backward(saved, g):
    # 2-D operands: otherwise XLA's CPU compiler transposes x for the gradient of w, and there
    # recomputes the elementwise operations that produced x, with strided access
    x, w = saved
    x2d, g2d = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    grad_w = lax.dot_general(x2d, g2d, (((0,), (0,)), ((), ())), preferred_element_type=w.dtype)
    return g @ w.T.astype(g.dtype), grad_w


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(axes, x, w):
    """jnp.einsum(axes, x, w), like matmul: in x's dtype, and the gradient of w in w's dtype."""
    return jnp.einsum(axes, x, w.astype(x.dtype))


def _einsum_forward(axes, x, w):
    return einsum(axes, x, w), (x, w)


def _einsum_backward(axes, saved, g):
    x, w = saved
    of_x, of_w, out = axes.replace('->', ',').split(',')
    grad_x = jnp.einsum(f'{out},{of_w}->{of_x}', g, w.astype(g.dtype))
    return grad_x, jnp.einsum(f'{of_x},{out}->{of_w}', x, g, preferred_element_type=w.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)


@jax.custom_vjp
def normalize(x):
    """Float32 x minus its mean over the last axis, divided by its standard deviation."""
    return _normalize_forward(x)[0]


def _normalize_forward(x):
    # the mean of squares minus the squared mean is faster, but loses digits if the mean is large
    mean = x.mean(-1, keepdims=True)
    # torch's epsilon; flax's default is 1e-6
    rstd = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)
    return (x - mean) * rstd, (x, mean, rstd)


def _normalize_backward(saved, g):
    # written so that a TPU takes both sums over g in one pass, as it computes g
    x, mean, rstd = saved
    y = (x - mean) * rstd
    slope = (g * y).mean(-1, keepdims=True)
    return (g - g.mean(-1, keepdims=True) - y * slope) * rstd,


normalize.defvjp(_normalize_forward, _normalize_backward)


@jax.custom_vjp
def gelu(x):
    """The exact GELU, x times the normal CDF at x, in x's dtype.

    Uses erf in float32, as torch does. jax.nn.gelu's exact form uses erfc, which takes three
    times as long on a CPU.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    # save the derivative for the backward pass instead of x, so that erf is computed only once
    h = x.astype(jnp.float32)
    cdf = 0.5 + 0.5 * lax.erf(h * np.float32(0.5 ** 0.5))
    pdf = jnp.exp(-0.5 * h * h) * np.float32((2 * np.pi) ** -0.5)
    return (h * cdf).astype(x.dtype), (cdf + h * pdf).astype(x.dtype)


def _gelu_backward(derivative, g):
    # otherwise, in a loop over the blocks, a TPU transposes the product and copies the derivative
    return with_layout_constraint(derivative * g, Layout(tuple(range(g.ndim)))),


gelu.defvjp(_gelu_forward, _gelu_backward)


def random_bits(key, shape, t=0):
    """uint32 random bits of this shape: a hash of each element's index, a jax.random key and t.

    t: int, added to the key. The hash is MurmurHash3's finalizer
    (https://github.com/aappleby/smhasher, public domain), applied once for each half of the key.
    """
    # jax.random's threefry takes 10 to 25% of a training step on a CPU, and 0.3 s to compile
    strides = np.cumprod((1, *shape[:0:-1]))[::-1]
    bits = sum(lax.broadcasted_iota(jnp.uint32, shape, d) * np.uint32(s % 2 ** 32)
               for d, s in enumerate(strides))
    for half in jax.random.key_data(key)[:2]:
        bits = bits ^ (half + jnp.uint32(t))
        bits = (bits ^ bits >> 16) * np.uint32(0x85ebca6b)
        bits = (bits ^ bits >> 13) * np.uint32(0xc2b2ae35)
        bits = bits ^ bits >> 16
    return bits


def dropout(x, rate, key):
    """x with each element zeroed with probability `rate`, and divided by 1 - rate otherwise."""
    keep = random_bits(key, x.shape) >= np.uint32(rate * 2 ** 32)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


@jax.custom_vjp
def attention_scores(q, k):
    """q k^T of each head in float32, (B, nh, queries, keys), from q and k of (B, T, nh, hs)."""
    return jnp.einsum('bqnh,bknh->bnqk', q, k, preferred_element_type=jnp.float32)


def _attention_scores_backward(saved, g):
    # in q's dtype, as under torch's autocast: a float32 gradient would make its matmuls float32,
    # which GPUs before Ampere compute without tensor cores
    q, k = saved
    g = g.astype(q.dtype)
    return jnp.einsum('bnqk,bknh->bqnh', g, k), jnp.einsum('bnqk,bqnh->bknh', g, q)


attention_scores.defvjp(lambda q, k: (attention_scores(q, k), (q, k)), _attention_scores_backward)


def causal_attention(q, k, v, drop=lambda att: att):
    """Causal softmax(q k^T / sqrt(hs)) v; q, k, v and the result are (B, T, nh, hs).

    Scores and softmax are float32 in any dtype. drop: dropout of the attention weights
    (B, nh, queries, keys).
    """
    B, T, nh, hs = q.shape
    # split the queries into up to four parts, each with only the keys that it can see. This skips
    # 3/8 of the work, all masked. Parts below 32 queries gain nothing and take longer to compile
    size = max(32, -(-T // 4))
    parts = []
    for start in range(0, T, size):
        end = min(start + size, T)
        att = attention_scores(q[:, start:end], k[:, :end])
        visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        att = jnp.where(visible, att * hs ** -0.5, -jnp.inf)
        att = drop(jax.nn.softmax(att, axis=-1).astype(v.dtype))
        parts.append(jnp.einsum('bnqk,bknh->bqnh', att, v[:, :end]))
    return jnp.concatenate(parts, axis=1)


def splash_attention(q, k, v, interpret=False):
    """causal_attention without dropout, by JAX's Pallas kernel for TPUs; stores no (T, T) scores.

    The scale is applied to q, in q's dtype; scores and softmax are float32. interpret: run the
    kernel in Pallas's interpreter, on any device.
    """
    # imported here because it takes a third of a second, and only TPUs need it
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes, CausalMask, MultiHeadMask, QKVLayout, make_splash_mha,
    )
    T, nh, hs = q.shape[1:]
    q = (q.astype(jnp.float32) * hs ** -0.5).astype(q.dtype)  # exact where hs is a power of 4
    # the kernel needs multiples of 128; no real query sees the keys and values added at the end
    padding = (0, 0), (0, -T % 128), (0, 0), (0, 0)
    q, k, v = (jnp.pad(a, padding).swapaxes(1, 2) for a in (q, k, v))  # (B, nh, T, hs)
    L = q.shape[2]
    # block sizes with the fewest cycles on a v5e at 1024 tokens. In the backward pass, smaller
    # blocks of keys would skip more masked scores, but each writes a part of q's gradient
    block, rows = (max(n for n in range(128, size + 1, 128) if L % n == 0) for size in (512, 1024))
    seq_minor = QKVLayout.SEQ_MINOR  # as the last axis, a head size below 128 is padded
    sizes = BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=rows, block_kv_dkv=rows,
        use_fused_bwd_kernel=True, q_layout=seq_minor, k_layout=seq_minor, v_layout=seq_minor)
    kernel = make_splash_mha(MultiHeadMask([CausalMask((L, L))] * nh), block_sizes=sizes,
                             head_shards=1, q_seq_shards=1, interpret=interpret,
                             residual_checkpoint_name='attention')
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :T]


def fused_attention(q, k, v):
    """causal_attention without dropout, by cuDNN's fused kernel; stores no (T, T) scores.

    bfloat16 or float16 on NVIDIA GPUs.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')


@jax.custom_vjp
def cross_entropy(logits, targets, some_logits=None):
    """Mean negative log-likelihood, a float32 scalar, over the targets that are not -1.

    logits (..., V) of any float dtype, targets int (...). some_logits (..., n): logits of a few
    classes, computed apart, to speed up a TPU. nan if every target is -1, as in torch.
    """
    return _cross_entropy_forward(logits, targets, some_logits)[0]


def logsumexp(logits, some_logits=None):
    """jax.nn.logsumexp over the last axis, which it keeps, in float32."""
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)


def one_pass_logsumexp(logits, some_logits):
    """logsumexp in one pass: a TPU sums the logits as it computes them.

    It subtracts the maximum of some_logits, so it need not wait for the maximum of all.
    """
    shift = some_logits.astype(jnp.float32).max(-1, keepdims=True)
    total = jnp.exp(logits.astype(jnp.float32) - shift).sum(-1, keepdims=True)
    # the sum overflows where a logit exceeds that maximum by 88
    return lax.cond(jnp.isfinite(total).all(), lambda logits: shift + jnp.log(total), logsumexp,
                    logits)


def _cross_entropy_forward(logits, targets, some_logits):
    # sum in float32, but store no float32 copy of bfloat16 logits, GPT-2's largest array
    if some_logits is None:
        lse = logsumexp(logits)
    else:
        lse = lax.platform_dependent(logits, some_logits, tpu=one_pass_logsumexp, default=logsumexp)
    valid = targets != -1
    index = jnp.where(valid, targets, 0)[..., None]
    target_logits = jnp.take_along_axis(logits, index, axis=-1).astype(jnp.float32)
    nll = jnp.where(valid, (lse - target_logits)[..., 0], 0.0)
    return nll.sum() / valid.sum(), (logits, lse, targets)


def _cross_entropy_backward(saved, g):
    # softmax minus one-hot, by comparison with an iota: the gradient of a gather is a slow scatter
    logits, lse, targets = saved
    valid = targets != -1
    classes = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    one_hot = classes == targets[..., None]
    probs = jnp.exp(logits.astype(jnp.float32) - lse)
    grads = (probs - one_hot) * (valid * (g / valid.sum()))[..., None]
    return grads.astype(logits.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
