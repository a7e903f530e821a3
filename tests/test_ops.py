"""The operations of jax_ops.py against their plain forms, and on a GPU what its compiler made of them."""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_train_utils as utils
from jax_ops import causal_attention, dropout, fused_attention, gelu, random_bits
from jax_transformer import GPTConfig
from test_jax_transformer import tiny, tokens


def test_attention_in_parts_is_attention_under_a_mask():
    def plain(q, k, v):
        att = jnp.einsum('bqnh,bknh->bnqk', q, k) * q.shape[-1] ** -0.5
        att = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(att.shape[-2:], bool)), att, -jnp.inf))
        return jnp.einsum('bnqk,bknh->bqnh', att, v)
    for T in (1, 65, 258):  # one part, three of unequal length, four
        q, k, v = np.random.default_rng(T).normal(size=(3, 2, T, 2, 8)).astype(np.float32)
        got, want = (jax.vjp(f, q, k, v) for f in (causal_attention, plain))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)  # float32 rounding
        for a, b in zip(got[1](np.cos(want[0])), want[1](np.cos(want[0]))):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums over T


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_gelu_is_the_exact_form_and_its_derivative_computed_in_float32(dtype):
    x = jnp.concatenate([jnp.linspace(-12, 12, 4801), jnp.array([-1e4, 1e4])]).astype(dtype)  # 1e4 squared is no float16
    exact = np.asarray(x, np.float64)
    cdf = np.array([math.erfc(-v * 0.5 ** 0.5) / 2 for v in exact])
    pdf = np.exp(-exact ** 2 / 2) / (2 * math.pi) ** 0.5
    y, backward = jax.vjp(gelu, x)
    # one rounding to the type, and float32's along the way: 6e-8 each for erf and 1 + erf, times -x, up to 5.5
    rounding = jnp.finfo(dtype).eps / 2
    for got, want in ((y, exact * cdf), (backward(jnp.ones_like(x))[0], cdf + exact * pdf)):
        assert got.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1.01 * rounding + 3e-7, atol=1e-6)


def test_dropped_elements_are_a_random_share_that_differs_by_key_and_t():
    keys = [jax.random.key(1), jax.random.fold_in(jax.random.key(1), 0), jax.random.fold_in(jax.random.key(1), 1)]
    shape = (64, 4, 64, 64)
    sets = [np.unpackbits(np.asarray(random_bits(key, shape, t)).view(np.uint8)).reshape(*shape, 32) - 0.5
            for key, t in (*((key, 0) for key in keys), (keys[0], 1), (keys[0], 2))]
    n = math.prod(shape)
    bound = 5 * 0.5 / n ** 0.5  # five standard deviations of the mean of n fair bits
    for bits in sets:
        assert abs(bits.mean((0, 1, 2, 3))).max() < bound  # each of the 32 bits
        for axis in range(4):  # neighbours along each axis, bit for bit; a product of two has half the deviation
            products = (bits * np.roll(bits, 1, axis)).mean((0, 1, 2, 3))
            assert abs(products).max() < bound / 2
    for a, b in itertools.combinations(range(5), 2):
        assert abs((sets[a] * sets[b]).mean((0, 1, 2, 3))).max() < bound / 2
    kept = np.asarray(dropout(jnp.ones(shape), 0.2, keys[0]))
    assert set(np.unique(kept)) == {0, np.float32(1.25)} and abs((kept == 0).mean() - 0.2) < bound


def test_rematerialised_blocks_give_the_same_gradient_from_less_memory():
    x, y = tokens(2, 16), tokens(2, 16, seed=1)
    def loss(params, remat):
        graphdef = nnx.split(tiny(n_layer=3, dropout=0.2, remat=remat), nnx.Param)[0]
        return nnx.merge(graphdef, params)(x, y, rngs=nnx.Rngs(dropout=jax.random.key(0)))[1]
    params, results = nnx.state(tiny(n_layer=3), nnx.Param), []
    for remat in (False, True):
        kept = jax.eval_shape(lambda p, remat=remat: jax.vjp(partial(loss, remat=remat), p)[1], params)
        grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, remat)
        results.append((grads, sum(a.size for a in jax.tree.leaves(kept))))
    (with_all, kept_all), (with_remat, kept_remat) = results
    for a, b in zip(jax.tree.leaves(with_all), jax.tree.leaves(with_remat)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)  # float32 rounding: the same numbers, summed elsewhere
    assert kept_remat < kept_all / 2


needs_gpu = pytest.mark.skipif(jax.default_backend() != 'gpu', reason='cuDNN attention needs an NVIDIA GPU')


@needs_gpu
def test_fused_attention_is_causal_attention():
    q, k, v, g = (jax.random.normal(jax.random.key(i), (2, 256, 4, 64), jnp.bfloat16) for i in range(4))
    (fused, pull_fused), (plain, pull_plain) = (jax.vjp(f, q, k, v) for f in (fused_attention, causal_attention))
    # values of order 1 in bfloat16, whose rounding is 1/256 of them; the gradients are sums of several such
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (fused, plain)), atol=0.02)
    for a, b in zip(pull_fused(g), pull_plain(g)):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.1)


def buffers(hlo):
    """The shapes that a compiled program stores: results of instructions, but for those inside fused computations."""
    inside = set(re.findall(r'(?:calls|to_apply)=%([\w.-]+)', hlo))
    computation, shapes = None, []
    for line in hlo.splitlines():
        if head := re.match(r'(?:ENTRY )?%([\w.-]+) \(.*\{$', line):
            computation = head[1]
        elif (result := re.match(r'\s+(?:ROOT )?%[\w.-]+ = (\(.*?\)|\S+) [\w-]+\(', line)) and computation not in inside:
            shapes += re.findall(r'\w+\[[\d,]*\]', result[1])
    return shapes


@needs_gpu
def test_the_gpu_program_stores_neither_scores_nor_float32_logits():
    B, T, V, nh, n_layer = 4, 1024, 50304, 12, 2
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=n_layer, n_head=nh, n_embd=768, dtype='bfloat16', attention='cudnn')
    mesh, tx = utils.make_mesh(jax.devices()[:1]), utils.create_optimizer(lambda it: 1e-3, 0.1, (0.9, 0.95), 1.0)
    state = utils.init_train_state(config, tx, 0, mesh)
    batch = utils.shard_batch(mesh, *np.zeros((2, 1, B, T), np.int32))
    step = utils.make_train_step(utils.split_model(config)[1], tx, 0)
    hlo = step.lower(state, *batch, np.int32(0)).compile().as_text()
    assert hlo.count('custom_call_target="__cudnn$fmha') == 2 * n_layer  # forward and backward
    stored = buffers(hlo)
    assert any(re.fullmatch(rf'bf16\[({B},{T}|{B * T}),{V}\]', shape) for shape in stored)  # the logits: the search finds buffers
    assert not [shape for shape in stored if re.fullmatch(rf'f32\[({B},{T}|{B * T}),{V}\]', shape)]
    assert not [shape for shape in stored if re.fullmatch(rf'\w+\[{B},{nh},\d+,{T}\]', shape)]
