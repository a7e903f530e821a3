"""
The operations under the model whose obvious form is slow or takes too much memory; the figures are in BENCHMARKS.md.
All of it is plain JAX for every device, but for cuDNN's attention kernel on NVIDIA GPUs.
custom_vjp sets a function's gradient by hand: forward mode (jax.jvp) does not work through it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.custom_vjp
def matmul(x, w):
    """x (..., n_in) @ w (n_in, n_out), computed and returned in x's type. The gradient of w is summed in w's own type."""
    return x @ w.astype(x.dtype)


def _matmul_forward(x, w):
    return matmul(x, w), (x, w)


def _matmul_backward(saved, g):
    # in two dimensions: else XLA's CPU compiler transposes x in front of the product of w's gradient, and computes
    # what x was made by a second time there, with strided access
    x, w = saved
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, g)]
    return g @ w.T.astype(g.dtype), lax.dot_general(*rows, (((0,), (0,)), ((), ())), preferred_element_type=w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def gelu(x):
    """x times the normal distribution's cumulative function at x, in x's type; computed in float32, by erf, as torch does.

    jax.nn.gelu's exact form is by erfc, which takes three times as long on a CPU.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    # the derivative is kept for the backward pass in place of x, and needs no second erf there
    h = x.astype(jnp.float32)
    cdf = 0.5 + 0.5 * lax.erf(h * np.float32(0.5 ** 0.5))
    pdf = jnp.exp(-0.5 * h * h) * np.float32((2 * np.pi) ** -0.5)
    return (h * cdf).astype(x.dtype), (cdf + h * pdf).astype(x.dtype)


def _gelu_backward(derivative, g):
    return derivative * g,


gelu.defvjp(_gelu_forward, _gelu_backward)


def random_bits(key, shape, t=0):
    """uint32 of the given shape: each element's index, hashed with a jax.random key and a number t, int, that is added to it.

    MurmurHash3's finalizer (https://github.com/aappleby/smhasher, public domain), once for each half of the key.
    """
    # jax.random's own threefry takes a tenth to a quarter of a training step on a CPU, and a third of a second to compile
    strides = np.cumprod((1, *shape[:0:-1]))[::-1]
    bits = sum(lax.broadcasted_iota(jnp.uint32, shape, d) * np.uint32(s % 2 ** 32) for d, s in enumerate(strides))
    for half in jax.random.key_data(key)[:2]:
        bits = bits ^ (half + jnp.uint32(t))
        bits = (bits ^ bits >> 16) * np.uint32(0x85ebca6b)
        bits = (bits ^ bits >> 13) * np.uint32(0xc2b2ae35)
        bits = bits ^ bits >> 16
    return bits


def dropout(x, rate, key):
    """x with each element zero with probability `rate`, and divided by 1 - rate otherwise."""
    keep = random_bits(key, x.shape) >= np.uint32(rate * 2 ** 32)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def causal_attention(q, k, v, drop=lambda att: att):
    """softmax(q k^T / sqrt(hs)) v over the positions up to each query's own; q, k, v and the result (B, T, nh, hs).

    Scores and softmax are in float32, whatever the type. drop: dropout of the attention weights (B, nh, rows, keys).
    """
    B, T, nh, hs = q.shape
    # queries in up to four parts, each with the keys it can see: 3/8 of the work lies behind the mask and is left out; parts of
    # fewer than 32 rows gain nothing, and compile longer
    rows = max(32, -(-T // 4))
    parts = []
    for start in range(0, T, rows):
        end = min(start + rows, T)
        att = jnp.einsum('bqnh,bknh->bnqk', q[:, start:end], k[:, :end], preferred_element_type=jnp.float32)
        att = jnp.where(jnp.arange(start, end)[:, None] >= jnp.arange(end), att * hs ** -0.5, -jnp.inf)
        att = drop(jax.nn.softmax(att, axis=-1).astype(v.dtype))
        parts.append(jnp.einsum('bnqk,bknh->bqnh', att, v[:, :end]))
    return jnp.concatenate(parts, axis=1)


def fused_attention(q, k, v):
    """causal_attention without dropout as cuDNN's one kernel: no (T, T) scores in memory. float16 and bfloat16 only."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')


@jax.custom_vjp
def cross_entropy(logits, targets):
    """Mean negative log-likelihood, a float32 scalar, over the targets that are not -1.

    logits (..., V) of any float type, targets int (...). With no target left it is nan, as in torch.
    """
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits, targets):
    # sums are float32, but no float32 copy of bfloat16 logits is ever stored: for GPT-2 they are the largest array
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
    counted = targets != -1
    target_logits = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1).astype(jnp.float32)
    nll = jnp.where(counted, (lse - target_logits)[..., 0], 0.0)
    return nll.sum() / counted.sum(), (logits, lse, targets)


def _cross_entropy_backward(saved, g):
    # softmax minus one-hot, by comparison: the gather's own gradient would be a scatter
    logits, lse, targets = saved
    counted = targets != -1
    one_hot = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    grads = (jnp.exp(logits.astype(jnp.float32) - lse) - one_hot) * (counted * (g / counted.sum()))[..., None]
    return grads.astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
