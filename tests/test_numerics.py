"""The training step at the sizes that people train, against NumPy in float64.

The other tests compare tiny models; a compiler that goes wrong on large arrays only would pass
them (jax 0.10.2 does: https://github.com/jax-ml/jax/issues/39103).
"""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import erf

import jax_train_utils as utils
from jax_transformer import GPT, GPTConfig, export_torch_weights
from nanogpt_jax.sharding import choose_micro_batch_size, make_mesh, shard_batch

# -----------------------------------------------------------------------------
# GPT and its gradient, written by hand. A function returns its result and its backward pass: from
# the gradient of the result to that of the input, adding those of the weights to `grads`

def linear(x, weights, grads, name):
    w, b = weights[f'{name}.weight'], weights.get(f'{name}.bias')

    def backward(g):
        grads[f'{name}.weight'] = np.tensordot(g, x, ((0, 1), (0, 1)))
        if b is not None:
            grads[f'{name}.bias'] = g.sum((0, 1))
        return g @ w
    return x @ w.T + (0 if b is None else b), backward


def layer_norm(x, weights, grads, name):
    w, b = weights[f'{name}.weight'], weights.get(f'{name}.bias')
    rstd = (x.var(-1, keepdims=True) + 1e-5) ** -0.5
    x_hat = (x - x.mean(-1, keepdims=True)) * rstd

    def backward(g):
        grads[f'{name}.weight'] = (g * x_hat).sum((0, 1))
        if b is not None:
            grads[f'{name}.bias'] = g.sum((0, 1))
        g = g * w
        mean, slope = g.mean(-1, keepdims=True), (g * x_hat).mean(-1, keepdims=True)
        return (g - mean - x_hat * slope) * rstd
    return x_hat * w + (0 if b is None else b), backward


def attention(qkv, n_head):
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(B, T, 3, n_head, C // n_head).transpose(2, 0, 3, 1, 4)  # (B, nh, T, hs)
    scale = q.shape[-1] ** -0.5
    att = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(-1, -2) * scale, -np.inf)
    att = np.exp(att - att.max(-1, keepdims=True))
    att /= att.sum(-1, keepdims=True)

    def backward(g):
        g = g.reshape(B, T, n_head, -1).transpose(0, 2, 1, 3)
        g_att = g @ v.swapaxes(-1, -2)
        g_scores = att * (g_att - (g_att * att).sum(-1, keepdims=True)) * scale
        parts = g_scores @ k, g_scores.swapaxes(-1, -2) @ q, att.swapaxes(-1, -2) @ g
        return np.stack(parts).transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * C)
    return (att @ v).transpose(0, 2, 1, 3).reshape(B, T, C), backward


def gelu(x):
    cdf = 0.5 * (1 + erf(x / 2 ** 0.5))

    def backward(g):
        return g * (cdf + x * np.exp(-0.5 * x * x) / (2 * np.pi) ** 0.5)
    return x * cdf, backward


def cross_entropy(x, wte, targets, grads):
    """The mean loss of the targets that are not -1, and its gradient by hidden states x; 256 of
    them at a time to save memory."""
    x2d, targets = x.reshape(-1, x.shape[-1]), targets.ravel()
    kept = np.flatnonzero(targets != -1)
    total, g, n = 0.0, np.zeros_like(x2d), len(kept)
    grads['transformer.wte.weight'] = np.zeros_like(wte)
    for part in np.split(kept, range(256, n, 256)):
        p = x2d[part] @ wte.T
        p -= p.max(-1, keepdims=True)
        index = np.arange(len(p)), targets[part]
        total -= p[index].sum()
        np.exp(p, out=p)
        sums = p.sum(-1, keepdims=True)
        total += np.log(sums).sum()
        p /= sums * n
        p[index] -= 1 / n
        g[part] = p @ wte
        grads['transformer.wte.weight'] += p.T @ x2d[part]
    return total / n, g.reshape(x.shape)


def loss_and_gradients(weights, n_layer, n_head, idx, targets):
    """(loss, {nanoGPT's name: gradient}) of a GPT with the given float64 weights."""
    grads, steps = {}, []

    def run(f, x, *args):
        y, backward = f(x, *args)
        steps.append(backward)
        return y
    wte, wpe = (weights[f'transformer.{name}.weight'] for name in ('wte', 'wpe'))
    x = wte[idx] + wpe[:idx.shape[1]]
    for i in range(n_layer):
        block = f'transformer.h.{i}'
        h = run(layer_norm, x, weights, grads, f'{block}.ln_1')
        h = run(linear, h, weights, grads, f'{block}.attn.c_attn')
        h = run(attention, h, n_head)
        x = x + run(linear, h, weights, grads, f'{block}.attn.c_proj')
        h = run(layer_norm, x, weights, grads, f'{block}.ln_2')
        h = run(linear, h, weights, grads, f'{block}.mlp.c_fc')
        h = run(gelu, h)
        x = x + run(linear, h, weights, grads, f'{block}.mlp.c_proj')
    x, last_norm = layer_norm(x, weights, grads, 'transformer.ln_f')
    loss, g = cross_entropy(x, wte, targets, grads)
    g = last_norm(g)
    while steps:  # each half of a block adds to the residual stream
        branch = g
        for _ in range(4):
            branch = steps.pop()(branch)
        g = g + branch
    np.add.at(grads['transformer.wte.weight'], idx, g)
    grads['transformer.wpe.weight'] = np.zeros_like(wpe)
    grads['transformer.wpe.weight'][:idx.shape[1]] = g.sum(0)
    return loss, grads


# -----------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('batch_size, with_target, settings', [
    # config/train_shakespeare_char.py's model, with a quarter of its batch, and two of its six
    # blocks, all of one size
    (16, 256, dict(n_layer=2, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False)),
    # one block of GPT-2 124M and its full head; a fourth of the positions has a target, as NumPy
    # has to compute the logits, most of its work, of these alone
    (2, 256, dict(n_layer=1, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=True)),
])
def test_a_training_steps_loss_and_gradients_are_those_of_float64(
        batch_size, with_target, settings):
    config = GPTConfig(**settings)
    model = GPT(config, rngs=nnx.Rngs(0))
    # an optimizer that stores the gradient as its state and changes nothing
    tx = optax.GradientTransformation(
        optax.tree.zeros_like,
        lambda grads, state, params: (optax.tree.zeros_like(grads), grads))
    mesh = make_mesh(jax.devices()[:1])
    T = config.block_size
    rng = np.random.default_rng(0)
    x, y = rng.integers(config.vocab_size, size=(2, batch_size, T), dtype=np.int32)
    for row in y:  # equally many in each micro-batch, whose means are averaged
        row[rng.permutation(T)[with_target:]] = -1
    loss, grads = loss_and_gradients(
        {name: w.astype(np.float64) for name, w in export_torch_weights(model).items()},
        config.n_layer, config.n_head, x, y)

    size = choose_micro_batch_size(batch_size, T, config.n_embd, jax.default_backend())
    graphdef = utils.split_model(config)[1]
    step = utils.make_train_step(graphdef, tx, 0, mesh)
    batch = shard_batch(mesh, *(a.reshape(-1, size, T) for a in (x, y)))
    state, metrics = step(utils.create_train_state(model, tx, mesh), *batch, np.int32(0))
    ours = export_torch_weights(nnx.merge(graphdef, state['opt_state']))

    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)  # float32's rounding is 6e-8
    assert grads.keys() == ours.keys() - {'lm_head.weight'}
    for name, want in grads.items():
        # relative to the largest entry, float32's rounding in sums of thousands of terms of both
        # signs: at most 1.4e-6 was seen
        assert np.abs(ours[name] - want).max() < 5e-6 * np.abs(want).max(), name
