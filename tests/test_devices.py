"""Several devices and processes: the same losses as on one device, what is exchanged, checkpoints
that move between them, dead processes."""

import os
import re
import signal
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest
from helpers import (
    ITER, OPTIMIZED, RESUME, ROOT, STEP, TINY, finish, resume, run, run_processes, saved,
    start_processes, train, with_data,
)
from packaging.requirements import Requirement

import jax_train_utils as utils
import test_jax_transformer as quick
from jax_transformer import GPTConfig
from nanogpt_jax import devices as machine
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.errors import UserError
from nanogpt_jax.sharding import make_mesh, shard_batch, state_bytes
from tools.hlo import collectives

pytestmark = pytest.mark.usefixtures('unoptimized')
CPUS = jax.devices('cpu')  # eight, by conftest.py
EIGHT = {'devices': 8}
# two blocks; 12 sequences in an evaluation, which 8 devices do not divide
STEPS = ['--n_layer=2', '--max_iters=12', '--eval_interval=6', '--eval_iters=3']
# by how much weights may differ after these steps, of which each changes them by up to 1e-2. AdamW
# divides by the gradient's own size, so rounding shows where a gradient is near zero: 3.0e-6 was
# seen with jax 0.10.1, 2.1e-5 with 0.12.0.1, in 70 of 13,000 weights
ROUNDING = 1e-4
TX = utils.create_optimizer(lambda it: 1e-2, 0.1, (0.9, 0.95), 1.0)


def step_of(config, mesh):
    return utils.make_train_step(utils.split_model(config)[1], TX, 0, mesh)


# -----------------------------------------------------------------------------
# the same losses

@pytest.mark.parametrize('n, fsdp', [pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)])
def test_training_on_devices_follows_nanogpts_trajectory(monkeypatch, n, fsdp):
    monkeypatch.setattr(quick, 'one_device_mesh', lambda: make_mesh(CPUS[:n], fsdp))
    monkeypatch.setattr(quick, 'VARIANTS', ['bias'])
    quick.test_training_follows_nanogpts_trajectory.__wrapped__()  # as compiled for these tests


@pytest.mark.slow
def test_devices_draw_different_dropout_masks():
    # the same sequence on every device, and a model in which only dropout changes the loss
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
    losses = []
    for n, fsdp in ((1, 1), (4, 2)):
        mesh = make_mesh(CPUS[:n], fsdp)
        grads = utils.make_grad_fn(utils.split_model(config)[1], mesh)
        params = utils.init_train_state(config, optax.identity(), 0, mesh)['params']
        batch = shard_batch(mesh, *np.ones((2, 1, n, 8), np.int32))
        losses.append(float(jax.jit(grads)(params, *batch, jax.random.key(0), 1.0)[1]))
    assert abs(losses[0] - losses[1]) > 1e-5, losses  # with the same masks, a rounding of 1e-7


# -----------------------------------------------------------------------------
# what they exchange

def compiled_step(fsdp, **config):
    """(training state, its specs) and the compiled step of three micro-steps on eight devices."""
    mesh = make_mesh(CPUS, fsdp)
    config = GPTConfig(block_size=16, vocab_size=32, n_head=2, bias=False, **config)
    state = utils.abstract_train_state(config, TX, mesh)
    batch = shard_batch(mesh, *np.zeros((2, 3, 16, 16), np.int32))
    return state, step_of(config, mesh).lower(state, *batch, np.int32(0)).compile()


@pytest.mark.parametrize('data, fsdp, remat', [
    (8, 1, False), (2, 4, True), pytest.param(1, 8, False, marks=pytest.mark.slow)])
def test_a_step_reduces_gradients_once_and_gathers_each_block_at_most_twice(data, fsdp, remat):
    state, step = compiled_step(fsdp, n_layer=3, n_embd=32, remat=remat)
    found = {'all-reduce': [], 'all-gather': [], 'reduce-scatter': []}
    for op, n_bytes, devices, times, in_loop in collectives(step.as_text(), 8):
        found[op].append((n_bytes * times, devices, in_loop))
    on_device, full = state_bytes(state)
    blocks = 4 * sum(p.size for p in jax.tree.leaves(state['params']['transformer'].pop('h')))
    rest = 4 * sum(p.size for p in jax.tree.leaves(state['params']))

    # over data everything is reduced once, after the accumulation of three micro-steps; little
    # else is reduced: the loss, and sums of squares for the gradient's norm
    assert not any(in_loop for _, _, in_loop in found['all-reduce'])
    reduced = sum(n_bytes for n_bytes, _, _ in found['all-reduce'])
    assert 0 <= reduced - (blocks + rest) / fsdp * (data > 1) < 0.05 * (blocks + rest)
    if fsdp == 1:
        assert not found['all-gather'] and not found['reduce-scatter'] and on_device == full
        return
    # along fsdp a micro-step gathers each block for both passes, embeddings once, and
    # reduce-scatters their gradient
    gathered, scattered = (sum(n_bytes for n_bytes, _, _ in found[op])
                           for op in ('all-gather', 'reduce-scatter'))
    assert blocks < gathered <= 3 * (2 * blocks + rest)
    assert 0.98 * 3 * (blocks + rest) < scattered <= 3 * (blocks + rest)  # without the norms
    assert all(devices == fsdp for op in ('all-gather', 'reduce-scatter')
               for _, devices, _ in found[op])
    # a device has its shards of the weights and of both moments only
    assert full / fsdp <= on_device < 1.05 * full / fsdp


@pytest.mark.slow
def test_devices_that_share_a_core_compute_many_checksums(tmp_path):
    code = textwrap.dedent('''
        import os
        if hasattr(os, 'sched_setaffinity'):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from nanogpt_jax.checkpoint import checksums_of
        from nanogpt_jax.sharding import make_mesh
        sharding = NamedSharding(make_mesh(jax.devices(), 2), PartitionSpec('fsdp'))
        tree = [jax.device_put(np.ones((32 * n, 64)), sharding) for n in range(1, 50)]
        for _ in range(40):
            checksums_of(tree)
    ''')
    result = run(tmp_path, '-c', code, devices=2)
    assert result.returncode == 0, result.stderr


def test_processes_need_as_many_devices_each(monkeypatch):
    found = [SimpleNamespace(process_index=i, platform='cpu') for i in (0, 1, 1)]
    monkeypatch.setattr(jax, 'devices', lambda platform: found)
    with pytest.raises(UserError, match='{0: 1, 1: 2} devices'):
        machine.select_devices()


@pytest.mark.slow
def test_a_further_block_takes_less_memory_than_its_weights():
    without, with_remat = (
        (many - few) // 2 for few, many in (
            [compiled_step(8, n_layer=n, n_embd=256, remat=remat)[1].memory_analysis()
             .temp_size_in_bytes for n in (2, 4)] for remat in (False, True)))
    n_bytes = 4 * 12 * 256 ** 2  # of a block's weights
    # shards of an eighth: the stacked weights, and the sum that the loop over the blocks adds their
    # gradient to. The rest are activations
    assert with_remat < without < 0.42 * n_bytes


# -----------------------------------------------------------------------------
# checkpoints move

@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_continued_on_another_and_cropped(tmp_path):
    # 4 devices do not divide 10 positions, so wpe is sharded along its other dimension
    config = GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=32)
    x, y = quick.tokens(2, 1, 8, 16, high=20)
    alone, several = make_mesh(CPUS[:1]), make_mesh(CPUS, fsdp=4)
    steps = {mesh: step_of(config, mesh) for mesh in (alone, several)}

    def step(state, mesh):
        state = jax.tree.map(jnp.copy, state)  # which the step may donate
        return steps[mesh](state, *shard_batch(mesh, x, y), np.int32(0))[0]

    def moved(state, mesh):
        with Checkpoints(tmp_path / str(mesh.size)) as checkpoints:
            quick.save(checkpoints, state, 1)
        with Checkpoints(tmp_path / str(mesh.size), read_only=True) as checkpoints:
            return checkpoints.load('latest', lambda meta: (
                utils.abstract_train_state(config, TX, mesh)))[2]
    first = step(utils.init_train_state(config, TX, 0, alone), alone)
    sharded = moved(first, several)
    np.testing.assert_equal(*(jax.tree.map(np.array, state) for state in (sharded, first)))
    cropped = utils.crop_state(sharded, 10, several)['params']['transformer']['wpe']['embedding']
    np.testing.assert_array_equal(cropped, first['params']['transformer']['wpe']['embedding'][:10])
    assert cropped.sharding.shard_shape(cropped.shape) == (10, 8)
    # three steps, of which the second is on all devices
    got, want = step(moved(step(sharded, several), alone), alone), step(step(first, alone), alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ROUNDING), got, want)


def assert_same_run(folder, out_dir, want, out):
    """Compare every printed loss, and the last weights, with those of the run on one device."""
    losses = [[float(loss) for _, loss, *_ in ITER.findall(text)]
              + [float(n) for line in STEP.findall(text) for n in line[1:]] for text in (out, want)]
    assert len(losses[0]) == len(losses[1]) > 12
    # float32 sums in another order may change the last of the printed digits
    np.testing.assert_allclose(*losses, atol=1.1e-4)
    states = (saved(folder, name, 13)[0]['params'] for name in (out_dir, 'one'))
    difference = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, states)))
    print(f'{out_dir}: losses differ by {np.abs(np.subtract(*losses)).max():.4f}, '
          f'weights by {difference:.1e}')
    assert difference < ROUNDING


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """(folder, output) of a run on one device."""
    folder = with_data(tmp_path_factory.mktemp('one'))
    return folder, train(folder, *STEPS, '--out_dir=one')


@pytest.mark.slow
def test_checkpoints_move_between_devices_shardings_and_processes(one):
    folder, want = one
    moved = ['--out_dir=moved']
    outs = [train(folder, *STEPS, '--max_iters=2', *moved),  # one device
            resume(folder, *moved, '--max_iters=5', **EIGHT),  # 1 to 8
            resume(folder, *moved, '--max_iters=8', '--fsdp=8', **EIGHT),  # data to fsdp
            run_processes(folder, 2, *RESUME, *moved, '--max_iters=10', '--fsdp=4', devices=2),
            resume(folder, *moved, '--max_iters=12')]  # 2 processes to 1
    for out, mesh in zip(outs[1:], ('data 8 x fsdp 1', 'data 1 x fsdp 8', 'data 1 x fsdp 4')):
        assert f'mesh: {mesh}' in out
    got = [line for out in outs for line in ITER.findall(out)]
    assert [int(n) for n, *_ in got] == list(range(13))
    assert_same_run(folder, 'moved', want, ''.join(outs))


# -----------------------------------------------------------------------------
# several processes

# a run with a version of JAX that is warned of, which says how many sequences it reads
COUNTING = textwrap.dedent('''
    import runpy, sys
    import jax_train_utils as utils
    import jaxlib
    jaxlib.__version__ = '0.10.2'
    read = utils.Batches._read
    def counted(self, split, offsets):
        print(split, len(offsets), file=sys.stderr)
        return read(self, split, offsets)
    utils.Batches._read = counted
    runpy.run_path(ROOT + '/train_jax.py', run_name='__main__')
''').replace('ROOT', repr(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize('processes, devices, fsdp', [(1, 8, 1), (1, 8, 2), (1, 8, 8), (2, 2, 4)])
def test_losses_and_weights_do_not_depend_on_the_mesh(one, processes, devices, fsdp):
    folder, want = one
    out_dir = f'{processes}x{devices}-{fsdp}'
    flags = [*TINY, *STEPS, f'--fsdp={fsdp}', f'--out_dir={out_dir}']
    assert_same_run(folder, out_dir, want, run_processes(
        folder, processes, *flags, devices=devices, **OPTIMIZED))


def test_losses_and_weights_do_not_depend_on_devices_and_processes(one):
    folder, want = one
    started = start_processes(folder, 2, COUNTING, *TINY, *STEPS, '--out_dir=two', devices=2,
                              launcher='torchrun', script='-c')
    first, second = map(finish, started)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert 'devices: 4 (cpu), processes: 2' in first.stdout
    assert 'tokens per iteration will be: 128' in first.stdout
    assert 'mesh: data 4 x fsdp 1, ' in first.stdout
    assert_same_run(folder, 'two', want, first.stdout)
    # only the first prints, and warns
    assert not second.stdout and first.stdout.count('WARNING: jaxlib 0.10.2 computes wrong') == 1
    # each reads its half of the 8 sequences of a step, and of the 12 of an evaluation
    for lines in (first.stderr, second.stderr):
        reads = set(re.findall(r'^(train|val) (\d+)$', lines, re.M))
        assert reads == {('train', '4'), ('train', '6'), ('val', '6')}


@pytest.mark.slow
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
    survivor = finish(started[1 - victim], timeout=60)
    assert survivor.returncode != 0, survivor.stderr
    # of a missing heartbeat JAX's own thread tells, which then ends the process
    said = 'another task died' if signum == signal.SIGSTOP else 'lost the connection to the other'
    assert said in survivor.stderr, survivor.stderr
    started[victim].kill()
    finish(started[victim])
    # by one process, which is faster; a test above moves a run to and from two
    out = resume(folder, '--max_iters=100', '--log_interval=5', '--eval_interval=1000')
    assert int(ITER.findall(out)[0][0]) in range(10, 100, 10) and 'iter 100:' in out


@pytest.mark.slow
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
    out = run_processes(folder, 2, code, *RESUME, '--fsdp=2', '--max_iters=7', script='-c')
    assert re.search('6 is damaged: .*DATA_LOSS.*; ignoring it', out)  # which process 0 prints
    assert [n for n, *_ in ITER.findall(out)] == ['4', '5', '6', '7']


# -----------------------------------------------------------------------------
# versions of JAX, and the speed of a CPU

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


def test_of_two_excluded_versions_the_compilers_is_named(monkeypatch, capsys):
    monkeypatch.setattr(jax, '__version__', '0.11.0')
    monkeypatch.setattr(jaxlib, '__version__', '0.10.2')
    machine.warn_about_versions()
    assert capsys.readouterr().out == (
        'WARNING: jaxlib 0.10.2 computes wrong results on CPUs (jax-ml/jax #39103); '
        'use a version that requirements_jax.txt allows\n')


def test_the_peak_of_a_cpu_is_measured_and_shared_by_its_devices():
    rate = machine.matmul_flops()
    assert 1e8 < rate < 1e15  # between a tenth of a core and no machine
    assert machine.peak_flops(CPUS[0]) == rate / 8
