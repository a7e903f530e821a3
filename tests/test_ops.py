"""nanogpt_jax/ops.py against the plain formulas, and on a GPU what the compiler makes of them."""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hlo_text import stored_shapes

import jax_train_utils as utils
from jax_transformer import GPTConfig, run_blocks
from nanogpt_jax.ops import (
    causal_attention, dropout, fused_attention, gelu, logsumexp, normalize, one_pass_logsumexp,
    random_bits, splash_attention,
)
from nanogpt_jax.sharding import is_matmul, shard_batch
from test_jax_transformer import one_device_mesh, scan, tiny, tokens

pytestmark = pytest.mark.usefixtures('unoptimized')


def test_attention_in_parts_equals_masked_attention():
    def masked_attention(q, k, v):
        att = jnp.einsum('bqnh,bknh->bnqk', q, k) * q.shape[-1] ** -0.5
        mask = jnp.tril(jnp.ones(att.shape[-2:], bool))
        return jnp.einsum('bnqk,bknh->bqnh', jax.nn.softmax(jnp.where(mask, att, -jnp.inf)), v)
    for T in (1, 65, 258):  # one part, three of unequal length, four
        q, k, v = np.random.default_rng(T).normal(size=(3, 2, T, 2, 8)).astype(np.float32)
        y, pull = jax.vjp(jax.jit(causal_attention), q, k, v)
        want, want_pull = jax.vjp(jax.jit(masked_attention), q, k, v)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)  # float32 rounding
        g = np.cos(want)
        for a, b in zip(pull(g), want_pull(g)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums over T


@pytest.mark.slow
def test_splash_attention_equals_causal_attention():
    # padded to three blocks of 384 tokens in each direction. Tracing the interpreted kernels takes
    # seconds; without a TPU nothing else shows their numbers
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1100, 2, 8)).astype(np.float32)
    want, want_pull = jax.vjp(jax.jit(causal_attention), q, k, v)
    y, pull = jax.vjp(jax.jit(partial(splash_attention, interpret=True)), q, k, v)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)  # float32 rounding
    g = np.cos(want)
    for a, b in zip(pull(g), want_pull(g)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums over T


def test_a_loop_saves_splash_attention_once_and_computes_it_once():
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    attention = jax.checkpoint(splash_attention, policy=is_matmul)
    saved = jax.eval_shape(lambda *qkv: jax.vjp(attention, *qkv)[1], q, q, q)
    # q, k, v, the result and a float32 sum for each row of scores, not one in each of 128 columns
    assert sum(a.size for a in jax.tree.leaves(saved)) < 5 * q.size
    program = jax.make_jaxpr(jax.grad(lambda *qkv: attention(*qkv).sum()))(q, q, q)
    # forward and backward; jax 0.10 leaves a third call in, whose results nothing uses
    assert str(program).count('pallas_call[') == 2 + (jax.__version_info__ < (0, 11))


def test_the_matmuls_around_splash_attention_are_those_of_other_attention(monkeypatch):
    monkeypatch.setattr('jax_transformer.splash_attention', causal_attention)
    x, y = (tokens(2, 16, seed=seed)[None] for seed in (0, 1))
    results = []
    for attention in ('xla', 'splash'):
        graphdef, params = nnx.split(tiny(n_layer=1, attention=attention), nnx.Param)
        step = jax.jit(utils.make_grad_fn(graphdef, one_device_mesh()))
        results.append(step(nnx.to_pure_dict(params), x, y, jax.random.key(0), jnp.float32(1)))
    assert results[0][1] > 1  # the loss
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_all_matmuls_of_attention_by_xla_are_in_the_compute_type():
    x = jax.ShapeDtypeStruct((2, 64, 2, 8), jnp.bfloat16)

    def both_passes(*qkv):
        y, pull = jax.vjp(causal_attention, *qkv)
        return y, pull(y)
    text = jax.jit(both_passes).lower(x, x, x).as_text()
    matmuls = [line for line in text.splitlines() if 'dot_general' in line]
    operands = [re.findall(r'x([a-z]+\d+)>', line.split(' : ')[-1])[:2] for line in matmuls]
    # in each of two parts two forward and four backward
    assert operands == [['bf16', 'bf16']] * 2 * (2 + 4), matmuls


@pytest.mark.parametrize('ratio', [0, 1, 30, 1000])
def test_normalize_and_its_gradient_lose_no_digits_of_large_means(ratio):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 768)) + ratio).astype(np.float32)
    g = rng.normal(size=x.shape).astype(np.float32)
    exact = x.astype(np.float64)
    rstd = (exact.var(-1, keepdims=True) + 1e-5) ** -0.5
    want = (exact - exact.mean(-1, keepdims=True)) * rstd
    slope = (g * want).mean(-1, keepdims=True)
    want_grad = (g - g.mean(-1, keepdims=True, dtype=float) - want * slope) * rstd
    y, pull = jax.vjp(jax.jit(normalize), x)
    # the mean is rounded to float32, 6e-8 of it, as are the partial sums of 768 before it; 5 is the
    # largest of want. E[x^2] - E[x]^2 would be wrong by 6e-8 * ratio^2, 6% at 1000
    for got, exact in ((y, want), (pull(g)[0], want_grad)):
        np.testing.assert_allclose(got, exact, rtol=0, atol=6e-8 * (4 * ratio + 10 * 5))


def test_one_pass_logsumexp_equals_logsumexp_at_any_logits():
    rng = np.random.default_rng(0)
    ordinary = rng.normal(0, 5, (16, 512)).astype(np.float32)
    far, missing = ordinary.copy(), ordinary.copy()
    far[3, 300] = 200  # above the first 128 by more than float32's exponential can show
    missing[5, 2] = np.nan
    for logits in (ordinary, ordinary - 300, ordinary + 300, far, missing):
        got = jax.jit(one_pass_logsumexp)(logits, logits[:, :128])
        # float32 rounding of the largest argument of exp
        np.testing.assert_allclose(got, logsumexp(logits), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_gelu_and_its_derivative_are_the_exact_form_computed_in_float32(dtype):
    # the square of 1e4 exceeds float16's range
    x = jnp.concatenate([jnp.linspace(-12, 12, 4801), jnp.array([-1e4, 1e4])]).astype(dtype)
    exact = np.asarray(x, np.float64)
    cdf = np.array([math.erfc(-v * 0.5 ** 0.5) / 2 for v in exact])
    pdf = np.exp(-exact ** 2 / 2) / (2 * math.pi) ** 0.5
    y, pull = jax.vjp(gelu, x)
    # one rounding to dtype, and those of float32 before it: 6e-8 each for erf and 1 + erf, times
    # -x, up to 5.5
    rounding = jnp.finfo(dtype).eps / 2
    for got, want in ((y, exact * cdf), (pull(jnp.ones_like(x))[0], cdf + exact * pdf)):
        assert got.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1.01 * rounding + 3e-7,
                                   atol=1e-6)


def test_random_bits_are_fair_and_uncorrelated_across_positions_keys_and_t():
    key = jax.random.key(1)
    keys = [key, jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)]
    shape = (16, 4, 64, 64)

    def centered_bits(key, t):
        words = np.asarray(random_bits(key, shape, t)).view(np.uint8)
        return np.unpackbits(words).reshape(*shape, 32) - 0.5
    samples = [centered_bits(key, t) for key, t in
               (*((key, 0) for key in keys), (keys[0], 1), (keys[0], 2))]
    # five standard deviations of the mean of n fair bits; for a product of two bits, half of that
    bound = 5 * 0.5 / math.prod(shape) ** 0.5
    for bits in samples:
        assert abs(bits.mean((0, 1, 2, 3))).max() < bound  # each of the 32 bits
        for axis in range(4):  # neighbours along each axis, bit by bit
            correlation = (bits * np.roll(bits, 1, axis)).mean((0, 1, 2, 3))
            assert abs(correlation).max() < bound / 2
    for a, b in itertools.combinations(samples, 2):
        assert abs((a * b).mean((0, 1, 2, 3))).max() < bound / 2


def test_dropout_zeroes_the_given_fraction_and_scales_the_rest():
    shape = (64, 4, 64, 64)
    y = np.asarray(dropout(jnp.ones(shape), 0.2, jax.random.key(1)))
    assert set(np.unique(y)) == {0, np.float32(1.25)}
    bound = 5 * 0.4 / math.prod(shape) ** 0.5  # five standard deviations: sqrt(0.2 * 0.8) = 0.4
    assert abs((y == 0).mean() - 0.2) < bound


@pytest.mark.slow
def test_remat_and_the_scan_give_the_same_gradient_and_remat_saves_less():
    x, y = tokens(2, 16), tokens(2, 16, seed=1)
    params = nnx.state(tiny(n_layer=2), nnx.Param)

    def loss(params, remat, way):
        graphdef = nnx.split(tiny(n_layer=2, dropout=0.2, remat=remat), nnx.Param)[0]
        rngs = nnx.Rngs(dropout=jax.random.key(0))
        return nnx.merge(graphdef, params)(x, y, rngs=rngs, run_blocks=way)[1]

    def saved(*how):
        """Numbers saved for the backward pass, beside the weights, which matmuls save."""
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, *how), p)[1], params)
        return sum(a.size for a in jax.tree.leaves(residuals)) - sum(
            p.size for p in jax.tree.leaves(nnx.state(tiny(n_layer=2).transformer.h)))
    grad = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    want = grad(params, False, run_blocks)
    for way in (run_blocks, scan):
        for a, b in zip(jax.tree.leaves(grad(params, True, way)), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)  # sums in another order
        assert saved(True, way) < saved(False, way) / 2


def test_an_evaluation_with_remat_gives_the_same_losses():
    x, y = tokens(2, 16), tokens(2, 16, seed=1)
    params = nnx.to_pure_dict(nnx.state(tiny(), nnx.Param))
    plain, remat = (
        utils.make_eval_step(utils.split_model(tiny(remat=remat).config).eval_graphdef)
        for remat in (False, True))
    np.testing.assert_array_equal(remat(params, x, y), plain(params, x, y))


# -----------------------------------------------------------------------------
# on a GPU

needs_gpu = pytest.mark.skipif(jax.default_backend() != 'gpu',
                               reason='cuDNN attention needs an NVIDIA GPU')


@needs_gpu
def test_fused_attention_equals_causal_attention():
    q, k, v, g = (jax.random.normal(jax.random.key(i), (2, 256, 4, 64), jnp.bfloat16)
                  for i in range(4))
    fused, pull = jax.vjp(fused_attention, q, k, v)
    plain, plain_pull = jax.vjp(causal_attention, q, k, v)

    def assert_close(a, b, atol):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)
    # values of order 1, which bfloat16 rounds to 1/256; the gradients are sums of several of them
    assert_close(fused, plain, 0.02)
    for a, b in zip(pull(g), plain_pull(g)):
        assert_close(a, b, 0.1)


@needs_gpu
def test_the_gpu_program_stores_neither_scores_nor_float32_logits():
    B, T, V, nh, n_layer = 4, 1024, 50304, 12, 2
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=n_layer, n_head=nh, n_embd=768,
                       dtype='bfloat16', attention='cudnn')
    mesh = one_device_mesh()
    tx = utils.create_optimizer(lambda it: 1e-3, 0.1, (0.9, 0.95), 1.0)
    state = utils.init_train_state(config, tx, 0, mesh)
    batch = shard_batch(mesh, *np.zeros((2, 1, B, T), np.int32))
    step = utils.make_train_step(utils.split_model(config)[1], tx, 0)
    hlo = step.lower(state, *batch, np.int32(0)).compile().as_text()
    # forward and backward
    assert hlo.count('custom_call_target="__cudnn$fmha') == 2 * n_layer
    shapes = stored_shapes(hlo)
    logits = rf'\[({B},{T}|{B * T}),{V}\]'
    assert any(re.fullmatch('bf16' + logits, s) for s in shapes)  # so the search finds buffers
    assert not [s for s in shapes if re.fullmatch('f32' + logits, s)]
    assert not [s for s in shapes if re.fullmatch(rf'\w+\[{B},{nh},\d+,{T}\]', s)]
