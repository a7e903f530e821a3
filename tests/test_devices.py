"""Several devices and processes: the same losses as on one device, what is exchanged, checkpoints
that move between them, dead processes."""

import os
import re
import signal
import sys
import textwrap

import jax
import jaxlib
import numpy as np
import pytest
from helpers import (
    ITER, OPTIMIZED, ROOT, STEP, TINY, finish, one_line_error, run, run_inside, run_processes,
    saved, start, start_processes, train, with_data,
)
from packaging.requirements import Requirement

from nanogpt_jax import devices as machine

EIGHT = {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
RESUME = ['--init_from=resume', '--device=cpu']
# two blocks; 12 sequences in an evaluation, which 8 devices do not divide
STEPS = ['--n_layer=2', '--max_iters=12', '--eval_interval=6', '--eval_iters=3']
# by how much weights may differ after these steps, of which each changes them by up to 1e-2. AdamW
# divides by the gradient's own size, so rounding shows where a gradient is near zero: 3.0e-6 was
# seen with jax 0.10.1, 2.1e-5 with 0.12.0.1, in 70 of 13,000 weights
ROUNDING = 1e-4


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """(folder, output) of a run on one device."""
    folder = with_data(tmp_path_factory.mktemp('one'))
    return folder, train(folder, *STEPS, '--out_dir=one')


def assert_same_losses(got, want, tolerance):
    """Compare every printed loss of two outputs; returns the largest difference."""
    losses = [[float(loss) for _, loss, *_ in ITER.findall(out)]
              + [float(n) for line in STEP.findall(out) for n in line[1:]] for out in (got, want)]
    assert len(losses[0]) == len(losses[1]) > 12
    np.testing.assert_allclose(*losses, atol=tolerance)
    return np.abs(np.subtract(*losses)).max()


def weight_difference(folder, out_dir, want_dir):
    """The largest difference between the weights of two runs that ended at the same iteration."""
    got, want = (saved(folder, name, 13)[0]['params'] for name in (out_dir, want_dir))
    return max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)))


def python_on_8_devices(code, *args):
    """stdout of a piece of Python, run in a process with 8 CPU devices."""
    result = finish(start(ROOT, '-c', textwrap.dedent(code), *args, **EIGHT))
    assert result.returncode == 0, result.stderr
    return result.stdout


# -----------------------------------------------------------------------------
# the same losses

@pytest.mark.xdist_group('one')
@pytest.mark.parametrize('processes, devices, fsdp', [(1, 8, 2), (2, 2, 1)])  # more of them below
def test_losses_and_weights_do_not_depend_on_devices_and_processes(one, processes, devices, fsdp):
    folder, want = one
    out_dir = f'{processes}x{devices}-{fsdp}'
    flags = [*STEPS, f'--fsdp={fsdp}', f'--out_dir={out_dir}']
    if processes == 1:
        out = train(folder, *flags, **EIGHT, **OPTIMIZED)
    else:
        out = run_processes(folder, processes, *TINY, *flags, devices=devices, launcher='torchrun')
    assert f'devices: {processes * devices} (cpu), processes: {processes}' in out
    assert 'tokens per iteration will be: 128' in out
    assert f'mesh: data {processes * devices // fsdp} x fsdp {fsdp}, ' in out
    # float32 sums in another order may change the last of the printed digits
    loss_difference = assert_same_losses(out, want, 1.1e-4)
    difference = weight_difference(folder, out_dir, 'one')
    print(f'{out_dir}: losses differ by {loss_difference:.4f}, weights by {difference:.1e}')
    assert difference < ROUNDING


def test_training_on_shards_follows_nanogpts_trajectory():
    python_on_8_devices('''
        import jax
        import test_jax_transformer as quick
        from nanogpt_jax.sharding import make_mesh
        quick.one_device_mesh = lambda: make_mesh(jax.devices()[:2], fsdp=2)
        quick.VARIANTS = ['bias']
        quick.test_training_follows_nanogpts_trajectory()
    ''')


def test_with_dropout_2_devices_reach_a_similar_loss_as_one(folder):
    flags = ['--max_iters=30', '--eval_interval=30', '--dropout=0.1']
    alone = train(folder, *flags, '--out_dir=a')
    several = train(folder, *flags, '--out_dir=b', '--fsdp=2', devices=2)
    (first, last), (_, other) = ([float(val) for *_, val in STEP.findall(out)]
                                 for out in (alone, several))
    # other masks from the same distribution: losses differ, by far less than training reduces them
    assert 1e-4 < abs(other - last) < 0.1 * (first - last)


def test_devices_draw_different_dropout_masks():
    python_on_8_devices('''
        import jax, numpy as np
        import jax_train_utils as utils
        from jax_transformer import GPTConfig
        from nanogpt_jax.sharding import make_mesh, shard_batch
        # the same sequence on every device, and a model in which only dropout changes the loss
        tx = utils.create_optimizer(lambda it: 0.0, 0.0, (0.9, 0.95), 0)
        config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
        losses = []
        for n in (1, 8):
            mesh = make_mesh(jax.devices()[:n])
            step = utils.make_train_step(utils.split_model(config)[1], tx, 0, mesh)
            batch = shard_batch(mesh, *np.ones((2, 1, n, 8), np.int32))
            state = utils.init_train_state(config, tx, 0, mesh)
            losses.append(float(step(state, *batch, np.int32(0))[1]['loss']))
        assert abs(losses[0] - losses[1]) > 1e-5, losses  # with the same masks, a rounding of 1e-7
    ''')


# -----------------------------------------------------------------------------
# what they exchange

COMPILED_STEP = '''
import sys
import jax, numpy as np
import jax_train_utils as utils
from jax_transformer import GPTConfig
from nanogpt_jax.sharding import make_mesh, shard_batch, state_bytes
from tools.hlo import collectives
tx = utils.create_optimizer(lambda it: 1e-3, 0.1, (0.9, 0.95), 1.0)
def compiled_step(fsdp, **config):
    mesh = make_mesh(jax.devices(), fsdp)
    config = GPTConfig(block_size=16, vocab_size=32, n_head=2, bias=False, **config)
    state = utils.abstract_train_state(config, tx, mesh)
    step = utils.make_train_step(utils.split_model(config)[1], tx, 0, mesh)
    batch = shard_batch(mesh, *np.zeros((2, 3, 16, 16), np.int32))
    return state, step.lower(state, *batch, np.int32(0)).compile()
'''
COLLECTIVES = COMPILED_STEP + '''
state, step = compiled_step(int(sys.argv[1]), n_layer=3, n_embd=32, remat=sys.argv[2] == 'True')
blocks = state['params']['transformer'].pop('h')
for params in (blocks, state['params']):
    print(*(p.size * 4 for p in jax.tree.leaves(params) if p.ndim > 1))
    print(*(p.size * 4 for p in jax.tree.leaves(params) if p.ndim == 1))
state['params']['transformer']['h'] = blocks
print(*state_bytes(state))
for each in collectives(step.as_text(), 8):
    print(*each)
'''


@pytest.mark.parametrize('data, fsdp, remat', [(8, 1, False), (2, 4, True), (1, 8, False)])
def test_a_step_reduces_gradients_once_and_gathers_each_block_at_most_twice(data, fsdp, remat):
    *head, state, lines = python_on_8_devices(COLLECTIVES, fsdp, remat).split('\n', 5)
    blocks, block_vectors, rest, vectors = (sorted(map(int, line.split())) for line in head)
    matrices, vectors = sorted(blocks + rest), block_vectors + vectors
    on_device, full = map(int, state.split())
    found = {op: [] for op in ('all-reduce', 'all-gather', 'reduce-scatter')}
    for op, n_bytes, devices, times, in_loop in (line.split() for line in lines.splitlines()):
        found[op].append((int(n_bytes), int(devices), int(times), in_loop == 'True'))

    # over data everything is reduced once, after the accumulation of three micro-steps
    assert all(not in_loop and times == 1 for _, _, times, in_loop in found['all-reduce'])
    over_data = sum(n_bytes for n_bytes, devices, _, _ in found['all-reduce'] if devices == data)
    over_all = sum(n_bytes for n_bytes, devices, _, _ in found['all-reduce'] if devices == 8)
    # the loss, and sums of squares for the gradient's norm, as printed and in clipping
    scalars = 4 * (1 + 2 * len(matrices))
    if fsdp == 1:
        assert sum(matrices + vectors) < over_all <= sum(matrices + vectors) + 4
        assert not found['all-gather'] and not found['reduce-scatter'] and on_device == full
        return
    if data > 1:
        assert over_data == sum(matrices) // fsdp  # only its own shards
    assert sum(vectors) < over_all <= sum(vectors) + scalars

    def exchanged(op):
        assert all(devices == fsdp for _, devices, _, _ in found[op])
        return sorted(each for n_bytes, _, times, _ in found[op] for each in [n_bytes] * times)
    # along fsdp a micro-step gathers each block for both passes, and reduce-scatters its gradient;
    # embeddings once (by XLA's CPU compiler before the loop, in which they do not change)
    assert exchanged('all-gather') == sorted(2 * 3 * blocks + rest)
    assert exchanged('reduce-scatter') == sorted(3 * matrices)
    # a device has its shards of the weights and of both moments only
    assert on_device == full - 3 * (sum(matrices) - sum(matrices) // fsdp)


def test_a_further_block_takes_less_memory_than_its_weights():
    out = python_on_8_devices(COMPILED_STEP + '''
for remat in (False, True):
    few, many = (compiled_step(8, n_layer=n, n_embd=256, remat=remat)[1].memory_analysis()
                 .temp_size_in_bytes for n in (2, 4))
    print((many - few) // 2)
''')
    without, with_remat = map(int, out.split())
    n_bytes = 4 * 12 * 256 ** 2  # of a block's weights
    # shards of an eighth: the stacked weights, and the sum that the loop over the blocks adds their
    # gradient to. The rest are activations
    assert with_remat < without < 0.42 * n_bytes


# -----------------------------------------------------------------------------
# checkpoints move

@pytest.mark.xdist_group('one')
def test_checkpoints_move_between_devices_shardings_and_processes(one):
    folder, want = one
    outs = [train(folder, *STEPS, '--max_iters=2', '--out_dir=moved'),  # one device
            resume(folder, 5, **EIGHT),  # 1 to 8
            resume(folder, 8, '--fsdp=8', **EIGHT),  # data to fsdp
            run_processes(folder, 2, *RESUME, '--out_dir=moved', '--max_iters=10', '--fsdp=4',
                          devices=2),
            resume(folder, 12)]  # 2 processes to 1
    for out, mesh in zip(outs[1:], ('data 8 x fsdp 1', 'data 1 x fsdp 8', 'data 1 x fsdp 4')):
        assert f'mesh: {mesh}' in out
    got = [line for out in outs for line in ITER.findall(out)]
    assert [int(n) for n, *_ in got] == list(range(13))
    np.testing.assert_allclose([float(loss) for _, loss, *_ in got],
                               [float(line[1]) for line in ITER.findall(want)], atol=1e-4)
    assert weight_difference(folder, 'moved', 'one') < ROUNDING


def test_a_checkpoint_is_cropped_on_several_devices(folder):
    # 4 devices do not divide 10 positions, so wpe is sharded along its other dimension
    train(folder, '--max_iters=2', '--out_dir=moved')
    assert 'iter 4: ' in resume(folder, 4, '--block_size=10', '--fsdp=4', **EIGHT)
    assert 'iter 5: ' in resume(folder, 5)


def resume(folder, max_iters, *flags, **env):
    """stdout of a run that resumes the checkpoints in out_dir moved, and must succeed."""
    result = (run if env else run_inside)(
        folder, 'train_jax.py', *RESUME, '--out_dir=moved', f'--max_iters={max_iters}', *flags,
        **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


# -----------------------------------------------------------------------------
# several processes

def test_each_process_reads_its_own_sequences_and_only_the_first_prints(folder):
    code = textwrap.dedent('''
        import runpy, sys
        import jax_train_utils as utils
        import jaxlib
        jaxlib.__version__ = '0.10.2'
        read = utils.read_sequences
        def counted(data_dir, split, offsets, *args):
            print(split, len(offsets), file=sys.stderr)
            return read(data_dir, split, offsets, *args)
        utils.read_sequences = counted
        runpy.run_path(ROOT + '/train_jax.py', run_name='__main__')
    ''').replace('ROOT', repr(ROOT))
    started = start_processes(folder, 2, *TINY, '--max_iters=2', '--eval_iters=1',
                              command=[sys.executable, '-c', code])
    (out, err), (silent, other) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], err + other
    assert len(ITER.findall(out)) == 3 and not silent
    assert out.count('WARNING: jaxlib 0.10.2') == 1  # printed like all else, by the first
    # 8 sequences per step and 4 per evaluation batch, on one device in each process
    for lines in (err, other):
        assert set(re.findall(r'^(train|val) (\d+)$', lines, re.M)) == {
            ('train', '4'), ('train', '2'), ('val', '2')}


@pytest.mark.parametrize('victim, signum, heartbeat_timeout', [
    (0, signal.SIGKILL, 10000), (1, signal.SIGKILL, 10000),  # a collective operation fails
    (1, signal.SIGSTOP, 5)])  # no heartbeat
def test_a_dead_process_ends_the_others_and_the_run_can_be_resumed(
        folder, victim, signum, heartbeat_timeout):
    started = start_processes(
        folder, 2, *TINY, '--max_iters=100000', '--log_interval=5', '--eval_interval=10',
        f'--heartbeat_timeout={heartbeat_timeout}')
    for line in started[0].stdout:
        if line.startswith('iter 25:'):
            break
    started[victim].send_signal(signum)
    survivor = started[1 - victim]
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode != 0, err
    # of a missing heartbeat JAX's own thread tells, which then ends the process
    said = 'another task died' if signum == signal.SIGSTOP else 'lost the connection to the other'
    assert said in err, err
    started[victim].kill()
    started[victim].communicate()
    # by one process, which is faster; a test above moves a run to and from two
    out = train(folder, *RESUME, '--max_iters=100', '--log_interval=5', '--eval_interval=1000')
    assert int(ITER.findall(out)[0][0]) in range(10, 100, 10) and 'iter 100:' in out


def test_what_one_process_cannot_read_is_resumed_by_none(folder):
    train(folder, '--max_iters=5', '--always_save_checkpoint=False')
    code = textwrap.dedent('''
        import os, runpy
        import orbax.checkpoint as ocp
        restore = ocp.StandardCheckpointHandler.restore
        def failing(self, directory, *args, **kwargs):
            if directory.parent.name == '6' and os.environ['JAX_PROCESS_ID'] == '1':
                raise ValueError('DATA_LOSS')
            return restore(self, directory, *args, **kwargs)
        ocp.StandardCheckpointHandler.restore = failing
        runpy.run_path(ROOT + '/train_jax.py', run_name='__main__')
    ''').replace('ROOT', repr(ROOT))
    started = start_processes(folder, 2, *RESUME, '--fsdp=2', '--max_iters=7',
                              command=[sys.executable, '-c', code])
    (out, err), (_, other) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], err + other
    assert '6 is damaged: OSError: another process cannot read it; it is not used' in out
    assert [n for n, *_ in ITER.findall(out)] == ['4', '5', '6', '7']


def test_an_impossible_fsdp_or_heartbeat_timeout_is_refused(folder):
    one_line_error(run(folder, 'train_jax.py', *TINY, '--fsdp=3', **EIGHT),
                   'fsdp=3', 'fsdp can be 1, 2, 4, 8')
    for flag in ('fsdp', 'heartbeat_timeout'):
        one_line_error(run_inside(folder, 'train_jax.py', *TINY, f'--{flag}=0'),
                       f'{flag} is 0', 'at least 1')
    assert not (folder / 'out_jax').exists()


# -----------------------------------------------------------------------------
# versions of JAX

@pytest.mark.parametrize('package', ['jax', 'jaxlib'])
def test_the_scripts_warn_of_the_versions_that_the_requirements_exclude(package):
    with open(os.path.join(ROOT, 'requirements_jax.txt'), encoding='utf-8') as f:
        text = f.read()
    allowed = Requirement(re.search(rf'^{package}\W.*', text, re.M)[0]).specifier
    versions = {part.version for part in allowed} | machine.WRONG_JAX.keys() | {
        '0.9.2', '0.10.0', '0.10.1', '0.12.0', '0.12.0.1', '0.12.9', '0.13.1', '1.0.0'}
    for version in versions:
        warning = machine.version_warning(package, version)
        assert (warning == '') == (version in allowed), version
        assert warning == '' or warning.startswith(f'WARNING: {package} {version} ')
    for version, reason in machine.WRONG_JAX.items():  # the same issue beside both
        line = re.search(rf'^# {re.escape(version)}: .*', text, re.M)[0]
        assert re.search(r'\w+/\w+ #\d+', reason)[0] in line
    # a nightly or local build counts as its release
    for version in ('0.10.2.dev20260610', '0.10.2+selfbuilt', '0.11.0rc1'):
        assert f'{package} {version} computes wrong' in machine.version_warning(package, version)


@pytest.mark.parametrize('script, flags', [
    ('train_jax.py', ['--device=cpu', '--dataset=none']),
    ('sample_jax.py', ['--device=cpu', '--out_dir=none']),
    ('bench_jax.py', ['--device=cpu', '--dataset=none']),
    ('convert_jax.py', ['--src=none', '--dst=out']),
    ('tools.sizing', ['--n_head=7'])])
def test_a_script_warns_of_an_excluded_version_in_one_line(folder, monkeypatch, script, flags):
    monkeypatch.setattr(jax, '__version__', '0.11.0')
    monkeypatch.setattr(jaxlib, '__version__', '0.10.2')
    result = run_inside(folder, script, *flags)
    assert result.returncode == 1  # each has a mistake, found after the devices
    lines = (result.stdout + result.stderr).splitlines()
    # of the two that are excluded jaxlib is named, which has the compiler
    assert [line for line in lines if line.startswith('WARNING')] == [
        'WARNING: jaxlib 0.10.2 computes wrong results on CPUs (jax-ml/jax #39103); '
        'use a version that requirements_jax.txt allows']
    monkeypatch.undo()
    result = run_inside(folder, script, *flags)
    assert 'WARNING' not in result.stdout + result.stderr


# -----------------------------------------------------------------------------
# the speed of a CPU

def test_mfu_on_a_cpu_is_counted_against_a_matmul_measured_there(folder):
    cpu = jax.devices()[0]
    rate = machine.matmul_flops()
    assert 1e8 < rate < 1e15  # between a tenth of a core and no machine
    assert machine.peak_flops(cpu) == rate / jax.local_device_count()
    out = train(folder, '--max_iters=20', '--eval_interval=100')
    line = re.search(r'^mfu is counted against (\S+) TFLOP/s, the float32 matmul rate measured on '
                     'this CPU$', out, re.M)
    assert abs(float(line[1]) / (rate / 1e12) - 1) < 0.06  # two digits
    assert float(re.search(r'^iter 20: .* mfu (.*)%$', out, re.M)[1]) > 0
