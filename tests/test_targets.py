"""
Devices that are not there: what their compilers make of the training step, and tools.plan. Tests of
a compiler run where it is installed: pip install "jax[cuda12]", or "jax[tpu]".
"""

import importlib.util
import math
import re

import pytest
from helpers import one_line_error, run, run_inside

from jax_transformer import GPTConfig
from nanogpt_jax.devices import attention_path, compute_dtype, peak_flops
from nanogpt_jax.errors import UserError
from nanogpt_jax.sharding import make_mesh
from tools import targets
from tools.hlo import custom_calls, matmul_types, stored_shapes

needs_cuda = pytest.mark.skipif(not importlib.util.find_spec('jax_plugins'),
                                reason="JAX's CUDA plugin is not installed")
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec('libtpu'),
                                  reason='libtpu is not installed')


# -----------------------------------------------------------------------------
# GPUs

@needs_cuda
@pytest.mark.parametrize('target, dtype, attention', [
    ('v100', 'float16', 'xla'), ('t4', 'float16', 'xla'), ('l4', 'bfloat16', 'cudnn'),
    ('a100', 'bfloat16', 'cudnn'), ('h100', 'bfloat16', 'cudnn'), ('h200', 'bfloat16', 'cudnn'),
    ('b200', 'bfloat16', 'cudnn')])
def test_the_step_of_a_gpu_is_16_bit_and_stores_no_more_than_it_should(target, dtype, attention):
    device, = devices = targets.target_devices(target)
    assert math.isfinite(peak_flops(device))
    assert compute_dtype('bfloat16', devices) == dtype
    assert attention_path('auto', dtype, 64, device) == attention
    B, T, V, nh = 4, 1024, 50304, 12
    config = GPTConfig(T, V, n_layer=1, n_head=nh, bias=False, dtype=dtype, attention=attention)
    step = targets.compile_step(config, make_mesh(devices), 1, B)
    hlo = step.as_text()
    short = {'float16': 'f16', 'bfloat16': 'bf16'}[dtype]
    assert set(matmul_types(hlo)) == {(short, short)}
    assert custom_calls(hlo, '__cudnn$fmha') == (2 if attention == 'cudnn' else 0)
    shapes = stored_shapes(hlo)
    logits = rf'\[({B},{T}|{B * T}),{V}\]'
    assert any(re.fullmatch(short + logits, s) for s in shapes)  # so the search finds buffers
    assert not [s for s in shapes if re.fullmatch('f32' + logits, s)]
    scores = [s for s in shapes if re.fullmatch(rf'\w+\[({B},{nh}|{B * nh}),\d+,{T}\]', s)]
    assert bool(scores) == (attention == 'xla')
    # the logits, which their gradient replaces, the float32 gradients of 46M parameters, and the
    # block's activations with, in XLA's form, its scores: 0.98 to 1.03 of it was seen
    expected = 2 * B * T * V + 4 * 46e6 + 40 * B * T * 768
    expected += 10 * B * nh * T * T if attention == 'xla' else 0
    assert step.memory_analysis().temp_size_in_bytes < 1.1 * expected


@needs_cuda
def test_bfloat16_on_a_t4_is_computed_in_float32():
    # why float16 is the default there; if this fails, XLA has learnt better
    devices = targets.target_devices('t4')
    config = GPTConfig(256, 512, n_layer=1, n_head=2, n_embd=128, dtype='bfloat16')
    hlo = targets.compile_step(config, make_mesh(devices), 1, 2).as_text()
    assert set(matmul_types(hlo)) == {('f32', 'f32')}


@needs_cuda
def test_the_plan_of_gpus_is_what_their_compiler_says(tmp_path):
    flags = ['--n_layer=1', '--n_head=2', '--n_embd=128', '--vocab_size=512', '--block_size=256',
             '--batch_size=2', '--gradient_accumulation_steps=48']
    result = run(tmp_path, 'tools.plan', '--target=t4:16', '--fsdp=8', *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ('t4:16: 16 x Tesla T4, mesh: data 2 x fsdp 8; float16, attention xla, remat False',
                 'each device computes 3 micro-steps of 2 x 256 tokens in a step', 'it fits',
                 'only the compiler for TPUs estimates time'):
        assert line in result.stdout.splitlines(), result.stdout
    assert re.search(r'^usable \(XLA_CLIENT_MEM_FRACTION 0.75 of 14\.74\) +11.05$', result.stdout,
                     re.M)
    # each device keeps an eighth of the gradients
    assert re.search(r'^reduce-scatter +8  every micro-step', result.stdout, re.M)
    result = run(tmp_path, 'tools.plan', '--target=t4', *flags, XLA_CLIENT_MEM_FRACTION='.0001')
    assert result.returncode == 1 and 'it does NOT fit' in result.stdout


# -----------------------------------------------------------------------------
# TPUs

@needs_libtpu
def test_the_plan_of_a_tpu_has_communication_cycles_and_time(tmp_path):
    result = run(tmp_path, 'tools.plan', '--target=v5e:2x4', '--fsdp=8', '--n_layer=1',
                 '--n_head=2', '--n_embd=128', '--vocab_size=512', '--block_size=256',
                 '--batch_size=2', '--gradient_accumulation_steps=16')
    assert result.returncode == 0, result.stdout + result.stderr
    assert '8 x TPU v5 lite' in result.stdout and 'it fits' in result.stdout
    for part in ('attn', 'mlp', 'head', 'optimizer'):
        assert re.search(rf'^{part} +\d+\.\d +\d+%$', result.stdout, re.M), part
    # four matrices of the one block and two embeddings, in each of two micro-steps
    assert re.search(r'^all-gather +8  every micro-step +12 ', result.stdout, re.M), result.stdout
    assert re.search(r'^at 1.5 GHz a step takes at least \d+\.\d ms, mfu \d+\.\d%', result.stdout,
                     re.M)


@needs_libtpu
def test_a_topology_that_does_not_exist_is_refused(tmp_path):
    one_line_error(run(tmp_path, 'tools.plan', '--target=v5e:3x7'), 'v5e:3x7')


# -----------------------------------------------------------------------------
# without a compiler

def test_the_plan_counts_what_devices_exchange_in_a_step(tmp_path):
    result = run(tmp_path, 'tools.plan', '--target=cpu:8', '--fsdp=4', '--n_layer=2',
                 '--n_head=2', '--n_embd=128', '--vocab_size=512', '--block_size=64',
                 '--batch_size=1', '--gradient_accumulation_steps=24')
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'each device computes 3 micro-steps of 1 x 64 tokens in a step' in result.stdout

    def sent(row):
        return float(re.search(rf'^{row} +\d+ +([\d.]+)$', result.stdout, re.M)[1])
    # bytes of the matrices of two blocks, and of the embeddings of the vocabulary and 64 positions
    blocks, embeddings = 4 * 2 * 12 * 128 ** 2, 4 * (512 + 64) * 128
    # the blocks are gathered twice in each of three micro-steps, and all gradients scattered once;
    # three quarters go to other devices
    assert sent('all-gather +4  every micro-step') == pytest.approx(
        3 * 2 * blocks * 3 / 4 / 1e6, abs=0.06)
    assert sent('reduce-scatter +4  every micro-step') == pytest.approx(
        3 * (blocks + embeddings) * 3 / 4 / 1e6, abs=0.06)
    # two groups add up their quarters once: each sends one of them, in a ring of two
    assert sent('all-reduce +2 +once') == pytest.approx((blocks + embeddings) / 4 / 1e6, abs=0.06)


@pytest.mark.parametrize('target, words', [
    ('v9', ["'v9'", 'v5e:2x4', 'h100:8']), ('h100:two', ["'h100:two'", 'h100:8']),
    ('h100:0', ["'h100:0'"]), ('cpu:10000', ["'cpu:10000'"]), ('cpu:\u0663', ['cpu'])])
def test_an_unknown_target_is_refused(target, words):
    with pytest.raises(UserError) as e:
        targets.target_devices(target)
    assert all(word in str(e.value) for word in words)


@pytest.mark.parametrize('target, package', [('v5e', 'jax[tpu]'), ('h100:8', 'jax[cuda12]')])
def test_a_compiler_that_is_not_installed_is_named(tmp_path, monkeypatch, target, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: None if name in (
        'libtpu', 'jax_plugins') else find_spec(name))
    one_line_error(run_inside(tmp_path, 'tools.plan', f'--target={target}'), f'"{package}"')


def test_a_shape_that_the_plan_does_not_have_is_refused(tmp_path):
    one_line_error(run_inside(tmp_path, 'tools.plan', '--init_from=gpt3'), "'gpt3'", 'gpt2-xl')


def test_the_largest_micro_batch_of_a_cpu_is_not_searched_for(tmp_path):
    one_line_error(run(tmp_path, 'tools.plan', '--target=cpu', '--largest=True'), 'a TPU or a GPU')


def test_jax_takes_three_quarters_of_a_gpus_memory_unless_told_otherwise(monkeypatch):
    for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
        monkeypatch.delenv(name, raising=False)
    n_bytes = targets.GPUS['h100'].memory * 2 ** 30
    assert targets.usable_memory('h100:8')[0] == 0.75 * n_bytes
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '.5')
    assert targets.usable_memory('h100')[0] == 0.5 * n_bytes
    assert targets.usable_memory('V5E:2x4')[0] == 15.75 * 2 ** 30


def test_every_gpu_has_a_peak_and_a_description():
    for name, gpu in targets.GPUS.items():
        text = targets.gpu_description(gpu)
        assert text.count('{') == text.count('}') and f'"{gpu.kind}"' in text
        device = type('Device', (), {'device_kind': gpu.kind})
        assert math.isfinite(peak_flops(device)), name


@pytest.mark.parametrize('first', [1, 12, 400])
@pytest.mark.parametrize('offset, per_sequence, bend, hard', [
    (2, 0.7, 0, False), (2, 0.7, 0.004, False), (2, 0.7, -0.001, True), (15, 1.5, 0, True),
    (20, 1, 0, True)])
def test_the_largest_micro_batch_is_found_in_few_compilations(first, offset, per_sequence, bend,
                                                              hard):
    limit, asked = 16.0, []

    def needed(n):
        return offset + per_sequence * n + bend * n ** 2

    def measure(n):  # `hard`: the compiler does not say how much does not fit, as a TPU's
        asked.append(n)
        return math.inf if hard and needed(n) > limit else needed(n)
    found = targets.largest_fit(measure, limit, {first: measure(first)})
    assert found == max([n for n in range(1, 100) if needed(n) <= limit], default=0)
    # far from what fits, halved until one does
    assert len(asked) == len(set(asked)) <= (11 if first == 400 else 6), asked
