"""
The quick test suite: python test_jax_transformer.py, or pytest.

Needs only jax, flax, optax, orbax-checkpoint and numpy. Each test claims one property; testdata/
has figures of the PyTorch original (see the README there). tests/ has the tests of whole runs.
"""

import contextlib
import functools
import io
import json
import math
import os
import sys
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_train_utils as utils
import jax_transformer
from jax_transformer import (
    GPT, CausalSelfAttention, GPTConfig, Linear, export_torch_weights, load_torch_weights,
)
from nanogpt_jax import devices, launch, sharding, tokenizer
from nanogpt_jax.checkpoint import Checkpoints, checksum
from nanogpt_jax.errors import UserError
from nanogpt_jax.ops import cross_entropy, matmul
from nanogpt_jax.sampling import (
    Continuation, Sampler, filter_logits, sampling_weights, stream_tokens,
)

TESTDATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'testdata')
COMPILER, PARITY = 'XLA on this machine', 'parity with nanoGPT'
VARIANTS = ['bias', 'nobias']  # of the figures in testdata/
TINY = dict(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32)

# a GPU or TPU may run float32 matmuls in lower precision; the tolerances below assume float32
jax.config.update('jax_default_matmul_precision', 'highest')


def area(name, optimized=False):
    """Mark the area that a test belongs to, for the report.

    optimized: compile with XLA's optimizations, as real runs do. The other tests do not depend on
    them and compile in half the time without them.
    """
    def mark(test):
        @functools.wraps(test)
        def run():
            jax.config.update('jax_disable_most_optimizations', not optimized)
            try:
                test()
            finally:
                jax.config.update('jax_disable_most_optimizations', False)
        run.area = name
        return run
    return mark


def tiny(model=GPT, **changes):
    """A small model with random weights, the same in every call.

    NumPy makes them: compiling the real initialization for every shape would take most of the
    suite's time.
    """
    model = nnx.eval_shape(lambda: model(GPTConfig(**(TINY | changes)), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        p.set_value(jnp.asarray(rng.normal(path[-1] == 'scale', 0.02, p.shape), jnp.float32))
    return model


def forward(model, x, y=None):
    """model(x, y), in one jit."""
    graphdef, params = nnx.split(model, nnx.Param)
    return jax.jit(lambda p: nnx.merge(graphdef, p)(x, y))(params)


def tokens(*shape, seed=0, high=65):
    return np.random.default_rng(seed).integers(high, size=shape, dtype=np.int32)


def golden(name):
    """(arrays, config, model with the initial weights) of one model of the PyTorch original."""
    data = np.load(os.path.join(TESTDATA, f'nanogpt_{name}.npz'))
    config = json.loads(str(data['config']))
    model = tiny(**config['model'])
    load_torch_weights(model, {k[5:]: data[k] for k in data.files if k.startswith('init/')})
    return data, config, model


def golden_numbers():
    with open(os.path.join(TESTDATA, 'nanogpt_numbers.json'), encoding='utf-8') as f:
        return json.load(f)


def scan(blocks, *args):
    """run_blocks by scan_blocks, for a model that has its blocks as a list."""
    params = {i: params_of(block) for i, block in enumerate(blocks)}
    tree = {'transformer': {'h': params}}
    stacked = sharding.stack_blocks(tree, tree)[0]['transformer']['h']
    return sharding.scan_blocks(blocks, *args, stacked)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


def assert_refused(call, *words):
    """call() raises a UserError whose message contains all the words."""
    try:
        call()
    except UserError as e:
        missing = [w for w in words if w not in str(e)]
        assert not missing, f'{missing} not in the message: {e}'
    else:
        raise AssertionError('no UserError was raised')


@functools.cache  # so that tests share compiled steps
def jitted_step(graphdef, seed, scale_loss):
    tx = utils.create_optimizer(lambda it: 1e-2, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=0.1)
    return tx, utils.make_train_step(graphdef, tx, seed, scale_loss=scale_loss)


def make_step(model, seed=0, scale_loss=False):
    """(jitted train step, a fresh state that it may donate) for a model."""
    tx, step = jitted_step(nnx.split(model, nnx.Param)[0], seed, scale_loss)
    return step, fresh_state(model, tx)


def fresh_state(model, tx):
    state = jax.tree.map(jnp.copy, utils.create_train_state(model, tx))
    return jax.device_put(state, sharding.shardings(state, one_device_mesh()))


def one_device_mesh():
    return sharding.make_mesh(jax.devices()[:1])


def layout_of(mesh, batch_size, micro_steps=1):
    """A Layout whose optimizer step has micro_steps * batch_size sequences."""
    return sharding.Layout(mesh, micro_steps * batch_size, micro_steps, batch_size // mesh.size)


# -----------------------------------------------------------------------------

@area(COMPILER, optimized=True)
def test_products_summed_in_each_of_many_rows_are_right():
    # jaxlib 0.10.2 reads other rows than the last 1 and 7,000 here, on a CPU (jax-ml/jax #39103)
    m = jnp.eye(3)
    f = jax.jit(lambda x: jax.vmap(lambda row: jnp.sum((m @ row) ** 2))(x))
    for n in (32_769, 40_000):
        x = np.zeros((n, 3), np.float32)
        x[:, 0] = np.arange(n)
        want = np.arange(n, dtype=np.float64) ** 2
        np.testing.assert_allclose(f(x), want, rtol=1e-6)  # one rounding to float32 is 6e-8


@area(COMPILER, optimized=True)
def test_the_loss_and_its_gradients_of_many_rows_are_those_of_float64():
    """matmul and cross_entropy, the products and sums of the head, over 40,000 positions."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((40_000, 32), (32, 65)))
    y = tokens(len(x))

    def loss(x, w):
        return cross_entropy(matmul(x, w), y)
    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

    x, w = np.float64(x), np.float64(w)
    logits = x @ w
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    target_probs = probs[np.arange(len(y)), y]
    g = (probs - np.eye(65)[y]) / len(y)
    np.testing.assert_allclose(got, -np.log(target_probs).mean(), rtol=1e-5)
    for grad, want in zip(grads, (g @ w.T, x.T @ g)):
        # relative to the largest entry: float32's rounding in sums of both signs
        assert np.abs(grad - want).max() < 1e-5 * np.abs(want).max()


# -----------------------------------------------------------------------------

@area('devices')
def test_every_device_is_in_the_mesh():
    selected = devices.select_devices('auto')
    mesh = sharding.make_mesh(selected)
    assert mesh.axis_names == ('data', 'fsdp')
    assert mesh.shape['data'] == len(selected) == len(jax.devices())


@area('devices')
def test_absent_and_unknown_devices_are_refused_by_name():
    for name in ('mps', 'rocm', 'gtx'):
        assert_refused(functools.partial(devices.select_devices, name), f"'{name}'",
                       '--device=auto or --device=' + jax.default_backend())
    assert_refused(lambda: devices.select_devices('auto:99'), 'auto:99')
    assert_refused(lambda: devices.select_devices('auto:one'), "'auto:one'", 'auto:1')


@area('devices')
def test_a_global_batch_is_split_equally_across_devices_or_refused():
    split = sharding.split_global_batch
    assert split(480, 12, 8) == (8, 5)    # nanoGPT's 124M run on 8 devices
    assert split(12, 12, 8) == (6, 1)     # 12 sequences do not divide evenly across 8 devices
    assert split(20, 12, 1) == (1, 2)     # 2 micro-batches of 10
    for global_batch_size in range(1, 50):
        for n_devices in range(1, 9):
            used, micro_steps = split(global_batch_size, 4, n_devices)
            assert global_batch_size % (used * micro_steps) == 0
            assert global_batch_size // (used * micro_steps) <= 4
    assert split(24, 12, 16, fsdp=4) == (12, 1)  # three groups of four
    assert split(24, 12, 16, fsdp=4, n_processes=8) == (8, 1)  # one device of each process
    assert_refused(lambda: split(12, 12, 8, fsdp=8), 'fsdp=8', 'fsdp can be 1, 2, 4')
    assert_refused(lambda: split(24, 12, 8, fsdp=3), 'fsdp=3', 'fsdp can be 1, 2, 4, 8')
    assert_refused(lambda: split(5, 12, 8, n_processes=2), '2 processes', '5 sequences')


@area('devices')
def test_every_process_contributes_the_same_number_of_devices():
    class Device:
        def __init__(self, process_index):
            self.process_index = process_index
    available = [Device(p) for p in (0, 0, 0, 1, 1, 1)]
    assert sharding.select_mesh_devices(available, 4) == [*available[:2], *available[3:5]]


@area('devices')
def test_a_tensor_is_sharded_along_its_first_divisible_dimension():
    class Mesh:
        shape = {'data': 2, 'fsdp': 4}
    arrays = [np.zeros(shape) for shape in ((8, 12), (65, 12), (65, 6), (8,), ())]
    specs = sharding.partition_specs(arrays, Mesh)
    assert [tuple(spec) for spec in specs] == [('fsdp',), (None, 'fsdp'), (), (), ()]


@area('devices')
def test_only_kernels_are_gathered_in_the_compute_type():
    params = nnx.to_pure_dict(nnx.state(tiny(bias=True), nnx.Param))
    cast = sharding.cast_kernels(params, 'bfloat16')
    for path, p in jax.tree.leaves_with_path(cast):
        assert p.dtype == ('bfloat16' if path[-1].key == 'kernel' else 'float32'), path


@area('devices')
def test_launchers_are_recognized_by_their_environment_variables():
    from unittest import mock
    for env, want in (
            ({}, (0, 1)),
            ({'JAX_PROCESS_ID': '1', 'JAX_NUM_PROCESSES': '3'}, (1, 3)),
            ({'SLURM_PROCID': '2', 'SLURM_STEP_NUM_TASKS': '4'}, (2, 4)),
            ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '4'}, (0, 1)),  # the shell of an allocation
            ({'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '2'}, (1, 2)),
            ({'RANK': '3', 'WORLD_SIZE': '4'}, (3, 4)),  # torchrun
            ({'WORLD_SIZE': '4'}, (0, 1)),  # a job script's, for another program
            # SLURM has started torchrun once on each machine
            ({'RANK': '3', 'WORLD_SIZE': '4', 'SLURM_PROCID': '1', 'SLURM_STEP_NUM_TASKS': '2'},
             (3, 4))):
        with mock.patch.dict(os.environ, env):
            assert launch.process_rank() == want, env


@area('devices')
def test_micro_batches_of_large_models_are_smaller_on_a_cpu():
    assert sharding.choose_micro_batch_size(12, 1024, 768, 'gpu') == 12
    assert sharding.choose_micro_batch_size(12, 64, 128, 'cpu') == 12
    assert sharding.choose_micro_batch_size(64, 256, 384, 'cpu') == 2
    assert sharding.choose_micro_batch_size(12, 1024, 1600, 'cpu') == 1  # never 0


class Device:
    """The attributes of a jax.Device that the code reads, for devices that this machine lacks."""

    def __init__(self, device_kind, compute_capability=None):
        self.device_kind, self.compute_capability = device_kind, compute_capability
        self.platform = 'cpu' if device_kind == 'cpu' else 'gpu'


T4 = Device('Tesla T4', '7.5')


@area('devices')
def test_a_fused_attention_kernel_is_chosen_only_where_it_exists():
    # older drivers leave out the maker's name; an AMD GPU's capability is not a number
    h200, a100 = Device('NVIDIA H200', '9.0'), Device('A100-SXM4-40GB', '8.0')
    b200, mi300x = Device('NVIDIA B200', '10.0'), Device('AMD Instinct MI300X', 'gfx942')
    cpu, tpu, old_tpu = Device('cpu'), Device('TPU v5 lite'), Device('TPU v3')
    path = devices.attention_path
    for case in (('auto', 'bfloat16', 64, h200), ('cudnn', 'float16', 128, a100),
                 ('auto', 'bfloat16', 256, h200), ('auto', 'bfloat16', 256, b200)):
        assert path(*case) == 'cudnn', case
    for case in (('xla', 'bfloat16', 64, h200), ('auto', 'float32', 64, h200),
                 ('auto', 'bfloat16', 12, h200), ('auto', 'bfloat16', 256, a100),
                 ('auto', 'bfloat16', 264, h200), ('auto', 'float16', 64, T4),
                 ('auto', 'bfloat16', 64, mi300x), ('auto', 'bfloat16', 64, old_tpu),
                 ('xla', 'bfloat16', 64, tpu), ('auto', 'float16', 64, tpu),
                 ('auto', 'bfloat16', 64, cpu)):
        assert path(*case) == 'xla', case
    for case in (('auto', 'bfloat16', 64, tpu), ('splash', 'float32', 12, tpu)):
        assert path(*case) == 'splash', case
    assert_refused(lambda: path('cudnn', 'bfloat16', 64, cpu), 'NVIDIA', '--attention=xla')
    assert_refused(lambda: path('cudnn', 'bfloat16', 136, a100), 'up to 128')
    assert_refused(lambda: path('cudnn', 'bfloat16', 264, h200), 'up to 256')
    assert_refused(lambda: path('splash', 'bfloat16', 64, h200), 'TPU v4', '--attention=xla')
    assert_refused(lambda: path('splash', 'float16', 64, tpu), 'float16', '--attention=xla')
    assert_refused(lambda: path('cudnn', 'bfloat16', 64, tpu), 'NVIDIA', '--attention=xla')
    assert_refused(lambda: path('flash', 'bfloat16', 64, h200), "'flash'", 'cudnn, splash or xla')


@area('devices')
def test_gpus_without_bfloat16_compute_in_float16_unless_told_otherwise():
    for device, default in ((T4, 'float16'), (Device('NVIDIA L4', '8.9'), 'bfloat16'),
                            (Device('AMD Instinct MI300X', 'gfx942'), 'bfloat16'),
                            (Device('TPU v2'), 'bfloat16'), (Device('cpu'), 'float32')):
        assert devices.compute_dtype('bfloat16', [device]) == default, device.device_kind
    for dtype in ('float32', 'float16'):
        assert devices.compute_dtype(dtype, [T4]) == dtype
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert devices.compute_dtype('bfloat16', [T4], given=True) == 'bfloat16'
    assert out.getvalue().startswith('WARNING: a Tesla T4 has no bfloat16'), out.getvalue()


@area('devices')
def test_the_longest_name_that_a_device_kind_has_as_whole_words_gives_its_peak():
    for kind, name in (('NVIDIA A100-SXM4-80GB', 'a100'), ('NVIDIA A10G', 'a10g'),
                       ('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA H100 PCIe', 'h100 pcie'),
                       ('NVIDIA H200', 'h200'), ('NVIDIA H20', 'h20'), ('NVIDIA L40S', 'l40s'),
                       ('NVIDIA GH200 480GB', 'gh200'), ('NVIDIA GB200', 'gb200'),
                       ('Tesla V100-SXM2-16GB', 'v100'), ('Tesla T4', 't4'),
                       ('NVIDIA GeForce RTX 4070 Ti SUPER', 'rtx 4070 ti super'),
                       ('AMD Instinct MI250X', 'mi250x'), ('TPU v4 lite', 'tpu v4 lite'),
                       ('TPU v5', 'tpu v5p'), ('TPU v5 lite', 'tpu v5e'), ('TPU7x', 'tpu7x')):
        assert devices.peak_flops(Device(kind)) == devices.PEAK_FLOPS[name], kind
        assert kind in devices.describe_peak(Device(kind))
    for kind in ('abacus', 'NVIDIA GeForce RTX 4090 Laptop GPU', 'NVIDIA GeForce RTX 5090 D',
                 'NVIDIA A100-SXM4-40GB MIG 1g.5gb', 'NVIDIA T400 4GB'):
        assert devices.peak_flops(Device(kind)) == devices.PEAK_FLOPS['a100'], kind
        assert f'an A100: no peak of {kind} is known' in devices.describe_peak(Device(kind)), kind


# -----------------------------------------------------------------------------

@area('model creation')
def test_parameter_paths_read_like_nanogpt_state_dict_keys():
    names = set(export_torch_weights(tiny(n_layer=2)))
    data = np.load(os.path.join(TESTDATA, 'nanogpt_bias.npz'))
    assert names == {k[5:] for k in data.files if k.startswith('init/')} | {'lm_head.weight'}


@area('model creation')
def test_init_follows_gpt2():
    config = GPTConfig(**(TINY | dict(n_layer=2, n_embd=128, vocab_size=512)))
    for name, w in export_torch_weights(GPT(config, rngs=nnx.Rngs(0))).items():
        if name.endswith('bias'):
            assert not w.any(), name
        elif '.ln_' in name:
            assert (w == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 2) if name.endswith('c_proj.weight') else 0.02
            # five standard errors: for the smallest tensor's 2048 entries, that of the standard
            # deviation is 1/sqrt(2 * 2048) = 1.6%
            assert abs(w.std() / std - 1) < 0.08, name
            assert abs(w.mean()) < 5 * std / math.sqrt(w.size), name


@area('model creation')
def test_invalid_configurations_are_refused():
    assert_refused(lambda: GPTConfig(n_embd=768, n_head=5), 'n_embd', '768', '5')
    assert_refused(lambda: GPTConfig(n_head=0), 'n_head is 0')
    assert_refused(lambda: GPTConfig(dropout=1.0), 'dropout is 1.0')
    assert_refused(lambda: GPTConfig(dtype='int8'), "'int8'", 'bfloat16')
    assert_refused(lambda: GPTConfig(attention='flash'), "'flash'", 'cudnn')
    assert_refused(lambda: GPTConfig(attention='cudnn', dtype='float32'),
                   'float32', '--attention=xla')


@area('model creation')
def test_a_checkpoints_model_args_are_read_back_and_those_of_another_model_are_refused():
    config = GPTConfig(**TINY, dropout=0.1, dtype='bfloat16', remat=True)
    args, read = jax_transformer.model_args(config), GPTConfig.from_model_args
    assert args.keys() >= TINY.keys() and not args.keys() & {'dtype', 'attention', 'remat'}
    assert read(args, dtype='bfloat16', remat=True) == config
    assert read({k: v for k, v in args.items() if k != 'dropout'}).dropout == 0.0
    assert_refused(lambda: read({k: v for k, v in args.items() if k != 'n_head'}), 'lacks n_head')
    changed = args | {'mixer': 'convolution'}
    assert_refused(lambda: read(changed), 'written by another model', "'mixer': 'convolution'")
    jax_transformer.VARIANT['mixer'] = 'convolution'
    try:
        assert jax_transformer.model_args(config) == changed
        assert_refused(lambda: read(args), 'written by another model', "'mixer': 'convolution'")
    finally:
        del jax_transformer.VARIANT['mixer']


@area('model creation')
def test_weights_that_do_not_fit_are_all_named_and_nothing_changes():
    model, weights = tiny(), export_torch_weights(tiny(n_embd=16))
    weights.pop('transformer.ln_f.bias')
    weights['transformer.extra'] = np.zeros(3)
    before = export_torch_weights(model)
    assert_refused(lambda: load_torch_weights(model, weights),
                   'transformer.ln_f.bias is missing', 'transformer.extra is not in the model',
                   'transformer.wpe.weight has shape (16, 16), the model has (16, 32)')
    assert_equal_trees(before, export_torch_weights(model))
    untied = before | {'lm_head.weight': before['lm_head.weight'] + 1}
    assert_refused(lambda: load_torch_weights(model, untied), 'lm_head.weight differs')


# -----------------------------------------------------------------------------

@area('forward, training')
def test_targets_of_minus_one_do_not_count():
    x, y = tokens(2, 16), tokens(2, 16, seed=1)
    logits, _ = forward(tiny(), x, y)
    masked = y.copy()
    masked[0, :10] = -1
    log_p = np.asarray(jax.nn.log_softmax(logits))
    log_p = np.take_along_axis(log_p, y[..., None], axis=-1)[..., 0]
    want = -log_p[masked != -1].mean()
    # float32 rounding of a mean of 22
    np.testing.assert_allclose(cross_entropy(logits, masked), want, rtol=1e-6)


@area('forward, training')
def test_dropout_is_applied_where_nanogpt_applies_it_and_only_in_training():
    model, x = tiny(dropout=0.5), tokens(2, 16)
    places, dropout = [], jax_transformer.dropout

    def recorded(x, rate, key):
        places.append((rate, list(x.shape)))
        return dropout(x, rate, key)
    jax_transformer.dropout = recorded
    try:
        jax.eval_shape(lambda: model(x, x, rngs=nnx.Rngs(dropout=jax.random.key(0))))
    finally:
        jax_transformer.dropout = dropout
    embeddings, att, residual = (0.5, [2, 16, 32]), (0.5, [2, 2, 16, 16]), (0.5, [2, 16, 32])
    assert places == [embeddings, att, residual, residual]
    model.eval()
    np.testing.assert_array_equal(forward(model, x, x)[1], forward(tiny(), x, x)[1])


@area('forward, training')
def test_dropout_without_a_key_is_refused():
    assert_refused(lambda: tiny(dropout=0.1)(tokens(1, 4)), 'rngs=nnx.Rngs(dropout=key)')


@area('forward, inference')
def test_a_sequence_longer_than_block_size_is_refused():
    assert_refused(lambda: tiny()(tokens(1, 17)), '17', '16')


@area('forward, inference')
def test_cropped_model_computes_the_same_on_short_sequences():
    model, x = tiny(), tokens(2, 8)
    before, _ = forward(model, x, x)
    model.crop_block_size(8)
    np.testing.assert_array_equal(forward(model, x, x)[0], before)
    assert model.config.block_size == 8 and model.transformer.wpe.embedding.shape == (8, 32)
    assert_refused(lambda: model.crop_block_size(16), '8', '16')


# -----------------------------------------------------------------------------

@area('backward')
def test_custom_gradients_of_matmul_and_cross_entropy_equal_autodiff():
    rng = np.random.default_rng(0)
    targets = rng.integers(-1, 7, (3, 5))

    def normal(*shape):
        return jnp.asarray(rng.normal(0, 2, shape), jnp.float32)

    def plain_loss(logits):
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets == -1, 0, nll).sum() / (targets != -1).sum()
    for custom, plain, *args in (
            (matmul, jnp.matmul, normal(2, 3, 5), normal(5, 7)),
            (lambda logits: cross_entropy(logits, targets), plain_loss, normal(3, 5, 7))):
        value, pull = jax.vjp(jax.jit(custom), *args)
        plain_value, plain_pull = jax.vjp(jax.jit(plain), *args)
        # float32 rounding of another formula
        np.testing.assert_allclose(value, plain_value, rtol=1e-5, atol=1e-6)
        g = jnp.cos(plain_value)  # a cotangent that is not all ones
        for got, want in zip(pull(g), plain_pull(g)):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@area('backward')
def test_cross_entropy_saves_no_float32_copy_of_16_bit_logits():
    logits = jnp.zeros((4, 16, 65), jnp.bfloat16)
    _, pull = jax.vjp(lambda logits: cross_entropy(logits, tokens(4, 16)), logits)
    saved = [a for a in jax.tree.leaves(pull) if a.size >= logits.size]
    assert [a.dtype for a in saved] == [jnp.bfloat16]
    assert pull(jnp.float32(1))[0].dtype == jnp.bfloat16


@area('backward')
def test_future_tokens_have_zero_gradient():
    # all tokens differ, so each has a row of wte to itself; the head sees one position at a time
    model, x = tiny(), np.arange(16, dtype=np.int32)[None]
    graphdef, params = nnx.split(model, nnx.Param)

    def hidden_at_5(wte):
        p = nnx.to_pure_dict(params)
        p['transformer']['wte']['embedding'] = wte
        return nnx.merge(graphdef, p).hidden(x)[0, 5] @ jnp.arange(32.0)
    grad = jax.jit(jax.grad(hidden_at_5))(model.transformer.wte.embedding[...])[:16]
    assert not np.asarray(grad[6:]).any() and (np.abs(grad[:6]).max(axis=1) > 0).all()


# -----------------------------------------------------------------------------

@area('clipping')
def test_clipping_bounds_the_global_norm_and_zero_means_none():
    grads = {'a': jnp.full((3, 4), 2.0), 'b': jnp.full(5, -1.0)}
    norm = float(optax.tree.norm(grads))
    for clip, want in ((0.5, 0.5), (2 * norm, norm), (0.0, norm)):
        tx = utils.create_optimizer(lambda it: 1e-3, 0.0, (0.9, 0.95), clip)
        _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
        mu = optax.tree.get(state, 'mu')  # AdamW's update itself does not show the gradient's scale
        # mu is (1 - beta1) * gradient
        np.testing.assert_allclose(optax.tree.norm(mu), 0.1 * want, rtol=1e-6)


@area('optimizer step')
def test_weight_decay_applies_to_matrices_and_embeddings_only():
    params = params_of(tiny())
    tx = utils.create_optimizer(lambda it: 0.5, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)  # no gradient: only decay
    for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates)):
        np.testing.assert_allclose(u, -0.5 * 0.1 * p if p.ndim >= 2 else 0 * p, rtol=1e-6)
    decayed, others = utils.decay_groups(params)
    assert decayed and all(p.ndim >= 2 for p in decayed)
    assert others and all(p.ndim < 2 for p in others)


# -----------------------------------------------------------------------------

@area('jit')
def test_accumulation_equals_one_large_batch():
    x, y = tokens(8, 16), tokens(8, 16, seed=1)
    results = []
    for grad_accum_steps in (1, 4):
        step, state = make_step(tiny())
        batch = (a.reshape(grad_accum_steps, -1, 16) for a in (x, y))
        state, metrics = step(state, *batch, 0)
        results.append((metrics, optax.tree.get(state['opt_state'], 'mu')))
    (one, one_mu), (four, four_mu) = results
    # float32 sums in another order
    np.testing.assert_allclose(four['loss'], one['loss'], rtol=1e-6)
    np.testing.assert_allclose(four['grad_norm'], one['grad_norm'], rtol=1e-5)
    # gradients times 0.1, clipped to a norm of 0.1: entries of at most 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), four_mu, one_mu)


@area('jit')
def test_step_is_compiled_once_and_donates_its_state():
    step, state = make_step(tiny())
    x = tokens(4, 2, 16)
    state, _ = step(state, x, x, np.int32(0))
    compiled = step._cache_size()
    for it in range(1, 4):
        old = state
        state, _ = step(state, x, x, np.int32(it))
    assert step._cache_size() == compiled
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


@area('jit')
def test_dropout_depends_on_seed_iteration_and_micro_batch():
    x = tokens(2, 1, 16)  # two micro-batches

    def loss(x, it, seed=0):
        step, state = make_step(tiny(dropout=0.5), seed)
        return float(step(state, x, x, it)[1]['loss'])
    assert loss(x, 3) == loss(x, 3)
    # with the same mask for both micro-batches their order would not matter
    assert len({loss(x, 3), loss(x, 4), loss(x, 3, seed=1), loss(x[::-1], 3)}) == 4


# -----------------------------------------------------------------------------

@area('generation')
def test_generate_continues_the_prompt_past_block_size():
    model, x = tiny(), np.tile(tokens(1, 5), (3, 1))
    y = model.generate(x, 20, key=jax.random.key(0))
    assert y.shape == (3, 25) and (y[:, :5] == x).all()
    assert int(y.max()) < 65 and int(y.min()) >= 0
    assert model.generate(x, 0, key=jax.random.key(0)).shape == (3, 5)


def generate_plainly(model, y, n):
    """y (B, T) continued by the n most likely tokens, each from a full forward pass."""
    block_size = model.config.block_size
    logits_of = jax.jit(lambda x: model(x, x)[0])
    for _ in range(n):
        seen = y[:, -block_size:]  # right-padded: attention is causal
        padded = np.pad(seen, ((0, 0), (0, block_size - seen.shape[1])))
        logits = logits_of(padded)[:, seen.shape[1] - 1]
        y = np.concatenate([y, np.asarray(logits.argmax(-1, keepdims=True), np.int32)], axis=1)
    return y


@area('generation')
def test_a_sample_depends_on_the_key_and_not_on_the_batch():
    model, x = tiny(), np.tile(tokens(1, 5), (3, 1))
    three = model.generate(x, 20, key=jax.random.key(7))
    np.testing.assert_array_equal(three, model.generate(x, 20, key=jax.random.key(7)))
    np.testing.assert_array_equal(three[:1], model.generate(x[:1], 20, key=jax.random.key(7)))
    assert (three[0] != three[1]).any()
    assert (three != model.generate(x, 20, key=jax.random.key(8))).any()


@area('generation')
def test_generate_turns_dropout_off_and_leaves_the_model_in_training_mode():
    model, x = tiny(dropout=0.5), tokens(1, 5)
    y = model.generate(x, 8, temperature=0)
    assert not model.transformer.drop.deterministic
    model.eval()
    np.testing.assert_array_equal(model.generate(x, 8, temperature=0), y)


@area('generation')
def test_top_k_keeps_the_k_most_likely_and_temperature_divides():
    logits = jnp.array([[1.0, 3.0, 2.0, 0.0]])
    want = [[-np.inf, 6.0, 4.0, -np.inf]]
    np.testing.assert_array_equal(filter_logits(logits, 0.5, 2), want)
    np.testing.assert_array_equal(filter_logits(logits, 1.0, 99), logits)


@area('generation')
def test_top_p_keeps_the_fewest_most_likely_tokens_that_reach_it():
    logits, rank = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25])), np.array([3, 0, 2, 1])
    for top_p, n in ((1.0, 4), (0.9, 3), (0.75, 2), (0.7, 2), (0.5, 1), (0.1, 1)):
        filtered = filter_logits(logits, 1.0, top_p=top_p - 1e-6)  # rounding must not decide
        np.testing.assert_array_equal(np.isfinite(filtered), rank < n, err_msg=str(top_p))


@area('generation')
def test_cached_generation_equals_the_full_forward_pass():
    # past block_size from a prompt of one token, and from one longer than it; where block_size is
    # not a power of two; and where a prompt or text one token shorter would need a smaller prefill
    # (66) or cache (46)
    for block_size, bias, prompt, B in ((16, False, 1, 2), (16, True, 20, 3), (160, False, 150, 2),
                                        (128, True, 66, 12), (128, True, 46, 12)):
        model, x = tiny(bias=bias, block_size=block_size), tokens(B, prompt)
        # with the small initial weights the last token alone would decide, and not attention
        nnx.update(model, jax.tree.map(lambda p: 10 * p, nnx.state(model, nnx.Param)))
        want = generate_plainly(model, x, 20)
        np.testing.assert_array_equal(model.generate(x, 20, temperature=0), want)


class ChangedAttention(CausalSelfAttention):
    """Half of the values' heads, each for two heads of queries, which turn with their position."""

    def to_heads(self, x, splash=False):
        q, k, v = super().to_heads(x, splash)
        return q, k[:, :, :1], v[:, :, :1]

    def __call__(self, x, rngs=None, cache=None):
        x = x * jnp.cos((cache.start if cache else 0) + jnp.arange(x.shape[1]))[:, None]
        return super().__call__(x.astype(self.dtype), rngs, cache or AllPositions())


class AllPositions:
    start = 0

    def attend(self, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)


class ChangedGPT(GPT):
    """Another attention, and a head of its own, whose logits change their sign."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        for block in self.transformer.h:
            block.attn = ChangedAttention(config, rngs=rngs)
            block.attn.dtype = config.dtype
        self.lm_head = Linear(config.n_embd, config.vocab_size, config, rngs=rngs)

    def head_kernel(self):
        return self.lm_head.kernel[...]

    def head(self, x, kernel=None):
        return -super().head(x, kernel)


@area('generation')
def test_a_changed_model_is_sampled_as_its_forward_pass_computes():
    for dtype, tolerance in (('float32', 1e-4), ('bfloat16', 2 ** -5)):  # of logits around 3
        model = tiny(ChangedGPT, dtype=dtype, n_layer=2, bias=False)
        nnx.update(model, jax.tree.map(lambda p: 10 * p, nnx.state(model, nnx.Param)))
        assert model.empty_cache(3, 8)[1][0].shape == (3, 1, 8, 16)
        y = np.asarray(model.generate(tokens(2, 5), 20, temperature=0))
        full = jax.jit(lambda x: model(x, x)[0])  # noqa: B023
        for t in range(5, 25):  # 16 is block_size
            seen = y[:, max(0, t - 16):t]
            logits = full(np.pad(seen, ((0, 0), (0, 16 - seen.shape[1]))))[:, seen.shape[1] - 1]
            logits = np.float32(logits)
            chosen = np.take_along_axis(logits, y[:, t:t + 1], axis=1)[:, 0]
            assert (chosen >= logits.max(-1) - tolerance).all(), (dtype, t)


@area('generation')
def test_tokens_are_sampled_from_the_models_distribution():
    # a vocabulary of 7, of which 5 and 6 are padding; the second token is sampled from the cache
    model, n = tiny(vocab_size=7), 4000
    x = np.tile(tokens(1, 3, high=5), (n, 1))
    y = np.asarray(model.generate(x, 2, temperature=0.7, key=jax.random.key(3), n_vocab=5))
    for first in range(5):
        samples = y[y[:, 3] == first]
        logits = model(samples[:1, :4])[0][0, 0, :5]
        want = np.asarray(jax.nn.softmax(filter_logits(logits, 0.7))) * len(samples)
        got = np.bincount(samples[:, 4], minlength=7)
        # chi-squared with 4 degrees of freedom exceeds 23.5 once in 10,000 times
        assert got[5:].sum() == 0 and (np.square(got[:5] - want) / want).sum() < 23.5


@area('generation')
def test_chunks_and_a_sequence_alone_give_the_tokens_of_the_full_batch():
    model, x, key = tiny(), tokens(3, 5), jax.random.key(1)
    want = np.asarray(model.generate(x, 20, key=key))[:, 5:]
    for chunk in (1, 7):
        chunks = list(stream_tokens(model, x, 20, Sampler(), key, chunk))
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), want)
    alone = list(stream_tokens(model, x[1:2], 20, Sampler(), key, first=1))
    np.testing.assert_array_equal(np.concatenate(alone, axis=1), want[1:2])


@area('generation')
def test_sampling_casts_only_kernels_and_the_head_and_leaves_the_model_unchanged():
    assert sampling_weights(tiny())[2] is None  # float32: the head is wte itself
    model = tiny(dtype='bfloat16')
    graphdef, params, head = sampling_weights(model)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, p in leaves:
        assert p.dtype == ('bfloat16' if path[-1].key == 'kernel' else 'float32'), path
    assert all(p.dtype == 'float32' for p in jax.tree.leaves(params_of(model)))
    x = tokens(2, 9)
    np.testing.assert_array_equal(nnx.merge(graphdef, params)(x)[0], model(x)[0])
    np.testing.assert_array_equal(model.hidden(x)[:, -1:] @ head, model(x)[0])


@area('generation')
def test_streamed_text_has_no_partial_characters():
    text = Continuation(bytes)  # a token is a byte
    pieces = [text.add([byte]) for byte in 'aé€😀\n'.encode()]
    assert pieces == ['a', '', 'é', '', '', '€', '', '', '', '😀', '\n']
    assert text.text == 'aé€😀\n' and text.n_tokens == 11
    text.add(list('€'.encode()[:2]))
    assert text.close() == '\ufffd'  # the text ended inside a character


@area('generation')
def test_a_text_ends_before_its_stop_string_and_shows_no_part_of_it():
    for size in (1, 2, 5, 99):  # tokens at a time
        text, ids = Continuation(bytes, stop='STOP'), list(b'abSTSTOPxyzSTOP')
        shown = ''.join(text.add(ids[k:k + size]) for k in range(0, len(ids), size))
        assert shown == text.text == 'abST'
        # the eighth byte completes the stop string
        assert text.ended and text.n_tokens == min(-(-8 // size) * size, 15)
        assert text.close() == '' and text.add([97]) == ''
    text = Continuation(bytes, stop='STOP')
    assert [text.add([byte]) for byte in b'aSTa'] == ['a', '', '', 'STa']
    assert text.add(list(b'ST')) == ''
    assert text.close() == 'ST' and not text.ended and text.n_tokens == 6


@area('generation')
def test_invalid_sampling_settings_are_refused():
    model, x = tiny(), tokens(1, 5)
    assert_refused(lambda: model.generate(x, 3, temperature=-1), 'temperature is -1')
    assert_refused(lambda: model.generate(x, 3, top_k=0), 'top_k is 0')
    assert_refused(lambda: model.generate(x, 3, top_p=0), 'top_p is 0')
    assert_refused(lambda: model.generate(x, 3, temperature=1e-40), '1e-30')
    assert_refused(lambda: model.generate(x, 2 ** 40), 'max_new_tokens is 1099511627776')
    assert_refused(lambda: model.generate(x[:, :0], 3), 'prompt is empty')
    assert_refused(lambda: model.generate(x, 3), 'key=')


# -----------------------------------------------------------------------------

@area('dtypes')
def test_norms_softmax_and_loss_are_computed_in_float32_in_a_bfloat16_model():
    graphdef, params = nnx.split(tiny(dtype='bfloat16'), nnx.Param)
    program = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, x)[1])
    text = program.lower(params, tokens(2, 16)).as_text()
    # softmax and loss; norms; loss; all of them
    for operation in ('exponential', 'rsqrt', 'log', 'reduce'):
        lines = [line for line in text.splitlines() if f'stablehlo.{operation}' in line]
        assert lines and not any('bf16' in line for line in lines), operation
    assert 'bf16' in text  # the matmuls


@area('dtypes')
def test_every_compute_type_learns():
    x, y = tokens(1, 8, 16), tokens(1, 8, 16, seed=1)
    curves = {}
    for dtype in ('float32', 'bfloat16', 'float16'):
        step, state = make_step(tiny(dtype=dtype), scale_loss=dtype == 'float16')
        curves[dtype] = []
        for it in range(30):
            state, metrics = step(state, x, y, it)
            curves[dtype].append(float(metrics['loss']))
    assert curves['float32'][-1] < curves['float32'][0] - 1  # it overfits a single batch
    for dtype in ('bfloat16', 'float16'):
        # rounding errors that grow over 30 steps
        np.testing.assert_allclose(curves[dtype], curves['float32'], atol=0.1)


@area('dtypes')
def test_an_overflow_skips_the_step_and_halves_the_loss_scale():
    step, state = make_step(tiny(dtype='float16'), scale_loss=True)
    before = jax.tree.map(np.array, state)
    state['loss_scale']['scale'] = jnp.float32(2.0 ** 40)  # float16's largest number is 65504
    x = tokens(1, 8, 16)
    state, metrics = step(state, x, x, 0)
    assert float(metrics['loss_scale']) == 2.0 ** 40
    assert float(state['loss_scale']['scale']) == 2.0 ** 39
    assert np.isfinite(metrics['loss'])
    assert_equal_trees(state['params'], before['params'])
    mu, mu_before = (optax.tree.get(s['opt_state'], 'mu') for s in (state, before))
    assert_equal_trees(mu, mu_before)
    adam, schedule_state = state['opt_state'][1][0], state['opt_state'][1][2]
    assert int(adam.count) == 0
    assert int(schedule_state.count) == 1  # the learning rate still follows iter_num


@area('dtypes')
def test_the_loss_scale_doubles_after_2000_good_steps():
    state = {'scale': jnp.float32(1024), 'good_steps': jnp.int32(0)}
    update = jax.jit(utils.update_loss_scale)
    for _ in range(1999):
        state = update(state, True)
    assert float(state['scale']) == 1024
    state = update(state, True)
    assert float(state['scale']) == 2048 and int(state['good_steps']) == 0
    state = update(update(state, True), False)
    assert float(state['scale']) == 1024 and int(state['good_steps']) == 0


@area('dtypes')
def test_check_finite_accepts_skipped_float16_steps_and_refuses_other_non_finite_numbers():
    class Saved:
        def describe_valid(self):
            return 'checkpoint 5 is complete'

    def check(numbers):
        utils.check_finite(7, numbers, Saved())
    overflow = {'loss': jnp.float32(np.nan), 'grad_norm': jnp.float32(np.inf)}
    check({'loss': jnp.float32(1.0), 'grad_norm': jnp.float32(2.0)})
    assert_refused(lambda: check(overflow), 'loss is nan and grad_norm is inf at iteration 7',
                   'checkpoint 5 is complete', '--learning_rate')
    check(overflow | {'loss_scale': jnp.float32(1024)})
    # below 1, halving the scale has not helped
    assert_refused(lambda: check(overflow | {'loss_scale': jnp.float32(0.5)}), 'iteration 7')


# -----------------------------------------------------------------------------

@area('learning rate')
def test_schedule_is_nanogpts_at_every_iteration():
    schedule = utils.create_learning_rate_schedule(6e-4, 2000, 600000, 6e-5)
    for it, lr in golden_numbers()['lr_default'].items():
        assert math.isclose(schedule(int(it)), lr, rel_tol=1e-12)  # float64 in both
        # float32 inside jit; near the end 1 + cos cancels, and the rounding of cos remains
        assert math.isclose(jax.jit(schedule)(int(it)), lr, rel_tol=2e-6)


@area('learning rate')
def test_schedule_works_without_warmup_and_with_one_longer_than_the_decay():
    late = utils.create_learning_rate_schedule(1.0, 10, 5, 0.1)
    np.testing.assert_allclose([late(i) for i in (0, 9, 10, 11)], [1 / 11, 10 / 11, 0.1, 0.1])
    none = utils.create_learning_rate_schedule(1.0, 0, 4, 0.0)
    np.testing.assert_allclose([none(i) for i in (0, 2, 4, 5)], [1, 0.5, 0, 0], atol=1e-12)
    constant = utils.create_learning_rate_schedule(1.0, 10, 5, 0.1, decay_lr=False)
    assert constant(0) == constant(100) == 1.0


# -----------------------------------------------------------------------------

def write_split(folder, ids, split='train'):
    np.asarray(ids, np.uint16).tofile(os.path.join(folder, f'{split}.bin'))


def batches_of(folder, layout, vocab_size=65, seed=1, eval_iters=3, batch_size=5):
    return utils.Batches(layout, folder, 16, vocab_size, seed, eval_iters, batch_size)


@area('batches')
def test_targets_are_the_next_tokens():
    with tempfile.TemporaryDirectory() as folder:
        write_split(folder, np.arange(1000) + 60000)  # beyond int16
        x, y = batches_of(folder, layout_of(one_device_mesh(), 16, 4), 2 ** 16).train(0)
    assert x.shape == y.shape == (4, 16, 16) and x.dtype == y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x, x[..., :1] + np.arange(16))


@area('batches')
def test_batches_are_a_function_of_seed_iteration_and_stream():
    def offsets(n=64, seed=1, iter_num=5, stream=utils.TRAIN):
        return utils.batch_offsets(n, 10**6, seed, iter_num, stream)
    np.testing.assert_array_equal(offsets(), offsets())
    others = [offsets(seed=2), offsets(iter_num=6), offsets(stream=utils.EVAL)]
    # not the same numbers in other places either, as of a counter that goes on from the iteration
    assert not any(set(offsets()) & set(other) for other in others)
    np.testing.assert_array_equal(offsets(n=8), offsets()[:8])
    with tempfile.TemporaryDirectory() as folder:
        write_split(folder, tokens(500))
        batches = [batches_of(folder, layout_of(one_device_mesh(), 16), seed=seed).train(it)[0]
                   for seed, it in ((1, 5), (2, 5), (1, 6), (1, 5))]
    assert not any(np.array_equal(batches[0], other) for other in batches[1:3])
    np.testing.assert_array_equal(batches[0], batches[3])


@area('batches')
def test_offsets_cover_every_position_and_exceed_int32():
    offsets = [utils.batch_offsets(100, 10, 0, it, utils.TRAIN) for it in range(20)]
    assert set(np.concatenate(offsets)) == set(range(10))
    assert utils.batch_offsets(1000, 9 * 10**9, 0, 0, utils.TRAIN).max() > 2 ** 32
    with tempfile.TemporaryDirectory() as folder:
        write_split(folder, np.arange(17))  # block_size + 1 tokens: the only sequence there is
        _, y = batches_of(folder, layout_of(one_device_mesh(), 4)).train(0)
    np.testing.assert_array_equal(y[0], np.tile(np.arange(1, 17), (4, 1)))


@area('batches')
def test_estimated_loss_is_the_mean_over_the_evaluation_batches():
    model = tiny()
    mesh = sharding.make_mesh(jax.devices())
    with tempfile.TemporaryDirectory() as folder:
        ids = {split: tokens(500, seed=len(split)) for split in ('train', 'val')}
        for split in ids:
            write_split(folder, ids[split], split)

        def batch_loss(split, k):
            offsets = utils.batch_offsets(5, 500 - 16, 0, k, utils.EVAL)
            sequences = np.stack([ids[split][i:i + 17] for i in offsets])
            return float(model(sequences[:, :-1], sequences[:, 1:])[1])
        step = utils.make_eval_step(utils.split_model(model.config).eval_graphdef, mesh)
        # in micro-batches of 5 sequences, and of 4, the last of which needs padding
        got, padded = (
            utils.estimate_loss(step, params_of(model), batches_of(
                folder, layout_of(mesh, micro_batch_size * mesh.size), seed=7))
            for micro_batch_size in (5, 4))
        for split in ('train', 'val'):
            want = np.mean([batch_loss(split, k) for k in range(3)])
            # the same float32 losses up to the order of their sums
            assert math.isclose(got[split], want, rel_tol=1e-6)
            assert math.isclose(got[split], padded[split], rel_tol=1e-6)


@area('batches')
def test_characters_round_trip_and_unknown_ones_are_refused():
    encode, make_decode, n = tokenizer.get_tokenizer(['\n', 'a', 'é'])
    assert n == 3 and encode('aé\n') == [1, 2, 0]
    assert make_decode([0])([1, 2, 0]).decode() == 'aé\n'
    assert_refused(lambda: encode('axb'), "['b', 'x']")


# -----------------------------------------------------------------------------

def save(checkpoints, state, iter_num, val_loss=None, **config):
    config = {'always_save_checkpoint': True} | config
    checkpoints.save(state, dict(iter_num=iter_num, best_val_loss=1.0, model_args=dict(TINY),
                                 config=config, chars=None), val_loss)


def toy_state():
    return {'params': {'w': jnp.ones((2, 2))}, 'opt_state': jnp.zeros(2), 'loss_scale': jnp.ones(1)}


@area('checkpoint round trip')
def test_a_checkpoint_is_restored_bit_for_bit():
    schedule = utils.create_learning_rate_schedule(1e-2, 2, 9, 1e-3)
    tx = utils.create_optimizer(schedule, 0.1, (0.9, 0.95), 1.0)
    config, mesh = GPTConfig(**TINY), sharding.make_mesh(jax.devices())
    state = utils.init_train_state(config, tx, 0, mesh)
    step = utils.make_train_step(utils.split_model(config)[1], tx, 0, mesh)
    x = tokens(1, 8 * len(jax.devices()), 16)
    state, _ = step(state, *sharding.shard_batch(mesh, x, x), 0)
    abstract = utils.abstract_train_state(config, tx, mesh)
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(folder) as checkpoints:
            save(checkpoints, state, 7)
        with Checkpoints(folder, read_only=True) as checkpoints:
            step, meta, restored = checkpoints.load('auto', lambda meta: abstract)
            only = checkpoints.load('7', lambda meta: {'params': abstract['params']})[2]
    assert_equal_trees(restored, state)
    assert_equal_trees(only, {'params': state['params']})
    assert step == meta['iter_num'] == 7
    assert meta['best_val_loss'] == 1.0 and meta['model_args'] == TINY


@area('checkpoint round trip')
def test_the_latest_and_the_best_checkpoint_are_kept():
    state = toy_state()
    def abstract(meta):
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state)
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(folder) as checkpoints:
            for iter_num, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
                save(checkpoints, state, iter_num, val_loss, always_save_checkpoint=False)
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.steps() == [2, 4]
            names = 'latest', 'best', 'auto', '4'
            assert [checkpoints.load(name, abstract)[0] for name in names] == [4, 2, 2, 4]
            assert_refused(lambda: checkpoints.load('3', abstract), "'3'", '[2, 4]')
            assert_refused(lambda: save(checkpoints, state, 2), 'not saved')
            save(checkpoints, state, 5, always_save_checkpoint=True)
        assert Checkpoints(folder, read_only=True).load('auto', abstract)[0] == 5


@area('checkpoint round trip')
def test_every_changed_bit_changes_the_checksum_and_sharding_does_not():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, jnp.bfloat16, np.int32):
        a = rng.standard_normal((8, 6)).astype(dtype)
        mesh = sharding.make_mesh(jax.devices())
        spec = jax.sharding.PartitionSpec(('data', 'fsdp') if 8 % mesh.size == 0 else None)
        sharded = jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))
        assert checksum(sharded) == checksum(jnp.asarray(a))
        words = a.view(f'uint{8 * a.dtype.itemsize}')
        bits = [words ^ (np.arange(48).reshape(8, 6) == i) * words.dtype.type(1 << bit)
                for i in range(48) for bit in range(8 * a.dtype.itemsize)]
        sums = {int(checksum(b.view(dtype))) for b in bits}
        assert len(sums) == len(bits) and int(checksum(a)) not in sums
        assert checksum(a[::-1]) != checksum(a) != checksum(a[:, ::-1])


@area('checkpoint round trip')
def test_other_arrays_than_were_saved_are_detected():
    with tempfile.TemporaryDirectory() as folder:
        mine, other = (os.path.join(folder, name) for name in 'ab')
        for out_dir, factor in ((mine, 1), (other, 2)):
            with Checkpoints(out_dir) as checkpoints:
                save(checkpoints, jax.tree.map(lambda a: factor * a, toy_state()), 1)  # noqa: B023
        checkpoints = Checkpoints(mine, read_only=True)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), toy_state())
        assert_equal_trees(checkpoints.load('latest', lambda meta: abstract)[2], toy_state())
        # they can be read, so that only their checksums tell
        os.rename(os.path.join(mine, '1', 'params'), os.path.join(folder, 'away'))
        os.rename(os.path.join(other, '1', 'params'), os.path.join(mine, '1', 'params'))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert_refused(lambda: checkpoints.load('1', lambda meta: abstract), 'is damaged')
            assert_refused(lambda: checkpoints.load('latest', lambda meta: abstract),
                           'no checkpoint', 'is valid')
        assert 'is damaged' in out.getvalue() and 'ignoring it' in out.getvalue()


@area('checkpoint round trip')
def test_reading_without_a_checkpoint_is_refused_and_creates_nothing():
    with tempfile.TemporaryDirectory() as folder:
        assert_refused(lambda: Checkpoints(folder, read_only=True), 'no checkpoint of this')
        absent = os.path.join(folder, 'a')
        assert_refused(lambda: Checkpoints(absent, read_only=True), 'does not exist')
        assert os.listdir(folder) == []


@area('checkpoint round trip')
def test_cropping_a_state_crops_its_moments():
    tx = utils.create_optimizer(lambda it: 1e-2, 0.1, (0.9, 0.95), 1.0)
    state = utils.crop_state(utils.create_train_state(tiny(), tx), 8, one_device_mesh())
    want = utils.create_train_state(tiny(block_size=8), tx)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, want)
    np.testing.assert_array_equal(state['params']['transformer']['wpe']['embedding'],
                                  tiny().transformer.wpe.embedding[:8])


@area('checkpoint round trip')
def test_resumed_settings_come_from_the_checkpoint_unless_given():
    saved = dict(n_layer=2, block_size=64, learning_rate=1e-3, out_dir='old', device='cuda',
                 dropout=0.0)
    config = dict(n_layer=12, block_size=1024, learning_rate=6e-4, out_dir='new', device='auto',
                  dropout=0.2)
    merged, differs = utils.merge_resumed_config(config, {'out_dir'}, saved)
    assert merged == saved | dict(out_dir='new', device='auto') and differs == ''
    merged, differs = utils.merge_resumed_config(config, {'learning_rate', 'n_layer'}, saved)
    assert merged['learning_rate'] == 6e-4 and merged['n_layer'] == 2
    assert 'learning_rate 0.001 -> 0.0006' in differs and 'n_layer 2 (kept' in differs
    _, differs = utils.merge_resumed_config(config, set(), saved | {'z_loss': 1e-4})
    assert 'z_loss 0.0001 (not a setting' in differs
    assert_refused(lambda: utils.merge_resumed_config(config, {'block_size'}, saved), '1024', '64')


# -----------------------------------------------------------------------------

# the fixtures are float64, ours is float32: 1e-5 is its rounding in a sum of a few hundred terms
@area(PARITY, optimized=True)
def test_logits_loss_and_every_gradient_are_nanogpts():
    # one by the list of blocks, one by the scan over them; test_ops.py compares these two
    for name, way in zip(VARIANTS, (jax_transformer.run_blocks, scan)):
        data, _, model = golden(name)
        graphdef, params = nnx.split(model, nnx.Param)

        def loss_fn(params):
            model = functools.partial(nnx.merge(graphdef, params), run_blocks=way)  # noqa: B023
            logits, loss = model(data['x'], data['y'])  # noqa: B023
            return loss, (logits, model(data['x'])[0])  # noqa: B023
        run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (loss, (logits, last)), grads = run(params)
        np.testing.assert_allclose(loss, data['loss'], rtol=1e-6)
        np.testing.assert_allclose(logits, data['logits'], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(last, data['logits_last'], rtol=1e-5, atol=1e-6)
        grads = export_torch_weights(nnx.merge(graphdef, grads))
        expected = {k[5:]: data[k] for k in data.files if k.startswith('grad/')}
        # the tied head may have no entry of its own
        assert expected.keys() <= grads.keys() and len(expected) >= len(grads) - 1
        for key, want in expected.items():
            np.testing.assert_allclose(grads[key], want, rtol=1e-4, atol=1e-6, err_msg=key)
        largest = max(np.abs(grads[key] - want).max() / max(np.abs(want).max(), 1e-4)
                      for key, want in expected.items())  # the bias of the keys has no gradient
        print(f'{name}: loss {abs(float(loss) / data["loss"] - 1):.1e}, gradients {largest:.1e}')


@area(PARITY)
def test_counts_mfu_and_sampling_are_nanogpts():
    for name in VARIANTS:
        data, config, model = golden(name)
        assert model.get_num_params() == config['num_params']
        assert model.get_num_params(non_embedding=False) == config['num_params_all']
        assert math.isclose(model.estimate_mfu(12, 1.0), config['mfu_dt1'], rel_tol=1e-12)
        # past block_size 16
        np.testing.assert_array_equal(model.generate(data['x'][:, :5], 24, top_k=1), data['greedy'])
        logits = forward(model, data['x'][:, :7])[0][:, -1]
        probs = jax.nn.softmax(filter_logits(logits, 0.8, 10))
        np.testing.assert_allclose(probs, data['probs_t0.8_k10'], rtol=1e-5, atol=1e-7)


@area(PARITY, optimized=True)
def test_training_follows_nanogpts_trajectory():
    for name in VARIANTS:
        data, config, model = golden(name)
        t, mesh = config['train'], one_device_mesh()  # several in tests/test_devices.py
        graphdef = nnx.split(model, nnx.Param)[0]
        schedule = utils.create_learning_rate_schedule(t['learning_rate'], t['warmup_iters'],
                                                       t['lr_decay_iters'], t['min_lr'])
        tx = utils.create_optimizer(schedule, t['weight_decay'], (t['beta1'], t['beta2']),
                                    t['grad_clip'])
        step, state = utils.make_train_step(graphdef, tx, 0, mesh), fresh_state(model, tx)
        found = []
        for it in range(len(data['train/loss'])):
            x, y = (data[f'train/{key}'][it].astype(np.int32) for key in 'xy')
            state, metrics = step(state, *sharding.shard_batch(mesh, x, y), np.int32(it))
            np.testing.assert_allclose(schedule(it), data['train/lr'][it], rtol=1e-12)
            assert metrics['grad_norm'] > t['grad_clip']  # so the clipping has an effect
            # float32 against float64: AdamW divides by a small root, and so amplifies the rounding
            # from step to step
            np.testing.assert_allclose(metrics['loss'], data['train/loss'][it], rtol=1e-5)
            np.testing.assert_allclose(metrics['grad_norm'], data['train/grad_norm'][it], rtol=1e-4)
            found.append([abs(float(metrics[key]) / data[f'train/{key}'][it] - 1)
                          for key in ('loss', 'grad_norm')])
        final = export_torch_weights(nnx.merge(graphdef, state['params']))
        for key in (k for k in data.files if k.startswith('final/')):
            got, want = final[key[6:]], data[key]
            if key.endswith('c_attn.bias'):
                # softmax ignores the bias of the keys: its gradient is zero, and Adam steps by
                # the rounding noise
                got, want = np.delete(got, np.s_[32:64]), np.delete(want, np.s_[32:64])
            np.testing.assert_allclose(got, want, atol=2e-4, err_msg=key)
            found[-1].append(np.abs(got - want).max())
        print(f'{name}, {len(found)} steps: losses {max(loss for loss, *_ in found):.1e}, gradient '
              f'norms {max(norm for _, norm, *_ in found):.1e}, weights {max(found[-1][2:]):.1e}')


# -----------------------------------------------------------------------------

def main():
    """Run every test; print a line for each area and the claims that fail. Returns 1 if any do."""
    areas, failed = {}, []
    for test in [f for name, f in globals().items() if name.startswith('test_')]:
        areas.setdefault(test.area, []).append(test)
    print(f'jax {jax.__version__} on {len(jax.devices())} x {jax.devices()[0].device_kind}')
    for name, tests in areas.items():
        t0, n_failed = time.perf_counter(), len(failed)
        for test in tests:
            try:
                test()
            except Exception:
                traceback.print_exc()
                failed.append(test.__name__.removeprefix('test_').replace('_', ' '))
        mark = '✗' if len(failed) > n_failed else '✓'
        print(f'{mark} {name} ({len(tests)} claims, {time.perf_counter() - t0:.1f} s)')
    if failed:
        print(f'✗ {len(failed)} CLAIMS DO NOT HOLD:', *failed, sep='\n  ')
        return 1
    print('✓ ALL TESTS PASSED!')
    print('The JAX transformer library is working correctly.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
