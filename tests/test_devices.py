"""Several devices and several processes: the same losses as one device, checkpoints that move, what is exchanged, who dies."""

import os
import re
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from conftest import ITER, ROOT, STEP, TINY, one_line_error, run, run_processes, saved, start_processes, train, with_data

EIGHT = {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
RESUME = ['--init_from=resume', '--device=cpu']
STEPS = ['--max_iters=12', '--eval_interval=6', '--eval_iters=3']  # 12 rows in an evaluation, which 8 devices do not divide


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """(folder, output) of a run on one device."""
    folder = with_data(tmp_path_factory.mktemp('one'))
    return folder, train(folder, *STEPS, '--out_dir=one')


def assert_same_run(got, want, tolerance):
    losses = [[float(loss) for _, loss, *_ in ITER.findall(out)] + [float(n) for line in STEP.findall(out) for n in line[1:]]
              for out in (got, want)]
    assert len(losses[0]) == len(losses[1]) > 12
    np.testing.assert_allclose(*losses, atol=tolerance)
    return np.abs(np.subtract(*losses)).max()


def spread(folder, out_dir, want_dir):
    """The largest difference between the weights of two runs that ended at the same iteration."""
    got, want = (saved(folder, name, 13)[0]['params'] for name in (out_dir, want_dir))
    return max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)))


# -----------------------------------------------------------------------------
# the same losses

@pytest.mark.parametrize('processes, devices, fsdp', [(1, 8, 1), (1, 8, 2), (1, 8, 8), (2, 2, 1), (2, 2, 4)])
def test_losses_do_not_depend_on_devices_and_processes(one, processes, devices, fsdp):
    folder, want = one
    out_dir = f'{processes}x{devices}-{fsdp}'
    flags = [*STEPS, f'--fsdp={fsdp}', f'--out_dir={out_dir}']
    if processes == 1:
        out = train(folder, *flags, **EIGHT)
    else:
        out = run_processes(folder, processes, *TINY, *flags, devices=devices)
    assert f'devices: {processes * devices} (cpu), processes: {processes}' in out
    assert f'mesh: data {processes * devices // fsdp} x fsdp {fsdp}, ' in out
    # float32 sums in another order, which may move the last of the printed digits
    loss_difference = assert_same_run(out, want, 1.1e-4)
    # AdamW divides by the gradient's own size, so rounding shows more in the weights: 1.3e-6 was seen, steps are of 1e-2
    difference = spread(folder, out_dir, 'one')
    print(f'{out_dir}: losses differ by {loss_difference:.4f}, weights by {difference:.1e} after 13 steps')
    assert difference < 1e-5


def test_with_dropout_several_devices_train_as_well(folder):
    flags = ['--max_iters=60', '--eval_interval=60', '--dropout=0.1']
    alone, several = train(folder, *flags, '--out_dir=a'), train(folder, *flags, '--out_dir=b', '--fsdp=2', **EIGHT)
    first, last = ([float(loss) for _, _, loss in STEP.findall(out)][i] for out, i in ((alone, 0), (alone, 1)))
    # other masks of the same kind: the losses differ, by far less than the training has brought
    assert 1e-4 < abs(float(STEP.findall(several)[1][2]) - last) < 0.1 * (first - last)


def test_devices_draw_masks_of_their_own():
    code = textwrap.dedent('''
        import jax, numpy as np
        import jax_train_utils as utils
        from jax_transformer import GPTConfig
        # the same row on every device, and a model whose loss is changed by dropout alone
        mesh, tx = utils.make_mesh(jax.devices()), utils.create_optimizer(lambda it: 0.0, 0.0, (0.9, 0.95), 0)
        config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
        losses = []
        for n in (1, 8):
            mesh = utils.make_mesh(jax.devices()[:n])
            step = utils.make_train_step(utils.split_model(config)[1], tx, 0, mesh)
            rows = utils.shard_batch(mesh, *np.ones((2, 1, n, 8), np.int32))
            losses.append(float(step(utils.init_train_state(config, tx, 0, mesh), *rows, np.int32(0))[1]['loss']))
        assert abs(losses[0] - losses[1]) > 1e-5, losses  # with the same masks, a rounding of 1e-7
    ''')
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=os.environ | EIGHT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -----------------------------------------------------------------------------
# what they exchange

@pytest.mark.parametrize('data, fsdp', [(8, 1), (2, 4), (1, 8)])
def test_a_step_exchanges_what_it_must_and_no_more(data, fsdp):
    code = textwrap.dedent('''
        import sys
        import jax, numpy as np
        import jax_train_utils as utils
        from jax_devices import collectives
        from jax_transformer import GPTConfig
        data, fsdp = map(int, sys.argv[1:])
        mesh, tx = utils.make_mesh(jax.devices(), fsdp), utils.create_optimizer(lambda it: 1e-3, 0.1, (0.9, 0.95), 1.0)
        config = GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=32, bias=False)
        state = utils.init_train_state(config, tx, 0, mesh)
        step = utils.make_train_step(utils.split_model(config)[1], tx, 0, mesh)
        step = step.lower(state, *utils.shard_batch(mesh, *np.zeros((2, 3, 16, 16), np.int32)), np.int32(0)).compile()
        leaves = jax.tree.leaves(state['params'])
        print([p.nbytes for p in leaves if p.ndim > 1], [p.nbytes for p in leaves if p.ndim == 1], utils.state_bytes(state))
        for each in collectives(step.as_text(), 8):
            print(*each)
    ''')
    result = subprocess.run([sys.executable, '-c', code, str(data), str(fsdp)], cwd=ROOT, env=os.environ | EIGHT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    split, small = (sorted(map(int, numbers.split(', '))) for numbers in re.findall(r'\[(.*?)\]', head))
    on_device, whole = map(int, re.search(r'\((\d+), (\d+)\)', head).groups())
    found = {op: [] for op in ('all-reduce', 'all-gather', 'reduce-scatter')}
    for op, n_bytes, devices, times, in_loop in (line.split() for line in lines):
        found[op].append((int(n_bytes), int(devices), int(times), in_loop == 'True'))

    # over data everything is reduced once, after the accumulation of three micro-steps
    assert all(not in_loop and times == 1 for _, _, times, in_loop in found['all-reduce'])
    over_data = sum(n_bytes for n_bytes, devices, _, _ in found['all-reduce'] if devices == data)
    over_all = sum(n_bytes for n_bytes, devices, _, _ in found['all-reduce'] if devices == 8)
    scalars = 4 * (1 + 2 * len(split))  # the loss, and sums of squares for the gradient's norm, as printed and in clipping
    if fsdp == 1:
        assert sum(split + small) < over_all <= sum(split + small) + 4
        assert not found['all-gather'] and not found['reduce-scatter'] and on_device == whole
        return
    if data > 1:
        assert over_data == sum(split) // fsdp  # of its shards alone
    assert sum(small) < over_all <= sum(small) + scalars
    # along fsdp the weights are gathered (XLA's CPU compiler does so ahead of the loop: they do not change in it), and
    # their gradients scattered in every micro-step
    assert sorted(n_bytes for n_bytes, *_ in found['all-gather']) == split
    assert sorted(n_bytes for n_bytes, *_ in found['reduce-scatter']) == split
    assert {each[1:] for each in found['reduce-scatter']} == {(fsdp, 3, True)}
    assert all(times <= 3 and devices == fsdp for _, devices, times, _ in found['all-gather'])
    # and a device holds its share of the weights and of both moments
    assert on_device == whole - 3 * (sum(split) - sum(split) // fsdp)


# -----------------------------------------------------------------------------
# checkpoints move

def test_checkpoints_move_between_devices_shardings_and_processes(one):
    folder, want = one
    outs = [train(folder, *STEPS, '--max_iters=2', '--out_dir=moved'),  # one device
            resume(folder, 5, **EIGHT),  # 1 to 8
            resume(folder, 8, '--fsdp=8', **EIGHT),  # data to fsdp
            run_processes(folder, 2, *RESUME, '--out_dir=moved', '--max_iters=10', '--fsdp=2', devices=2),
            resume(folder, 12)]  # 2 processes to 1
    assert 'mesh: data 8 x fsdp 1' in outs[1] and 'mesh: data 1 x fsdp 8' in outs[2] and 'mesh: data 2 x fsdp 2' in outs[3]
    got = [line for out in outs for line in ITER.findall(out)]
    assert [int(n) for n, *_ in got] == list(range(13))
    np.testing.assert_allclose([float(loss) for _, loss, *_ in got], [float(line[1]) for line in ITER.findall(want)], atol=1e-4)
    assert spread(folder, 'moved', 'one') < 1e-5
    # 8 to 1, and cropped on the way: 4 devices do not divide 10 positions, so their table is split the other way
    train(folder, '--max_iters=2', '--fsdp=8', '--out_dir=cropped', **EIGHT)
    assert 'iter 4: ' in resume(folder, 4, '--block_size=10', '--out_dir=cropped', '--fsdp=4', **EIGHT)
    assert 'iter 5: ' in resume(folder, 5, '--out_dir=cropped')


def resume(folder, max_iters, *flags, **env):
    result = run(folder, 'train_jax.py', *RESUME, '--out_dir=moved', f'--max_iters={max_iters}', *flags, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


# -----------------------------------------------------------------------------
# several processes

def test_each_process_reads_its_own_rows_and_the_first_alone_prints(folder):
    code = textwrap.dedent('''
        import runpy, sys
        import jax_train_utils as utils
        read = utils.read_rows
        def counted(data_dir, split, offsets, block_size):
            print(split, len(offsets), file=sys.stderr)
            return read(data_dir, split, offsets, block_size)
        utils.read_rows = counted
        runpy.run_path(sys.argv[1] + '/train_jax.py', run_name='__main__')
    ''').replace('sys.argv[1]', repr(ROOT))
    started = start_processes(folder, 2, *TINY, '--max_iters=2', '--eval_iters=1', command=[sys.executable, '-c', code])
    (out, err), (silent, other) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], err + other
    assert len(ITER.findall(out)) == 3 and not silent
    for lines in (err, other):  # 8 rows a step, 4 in an evaluation batch, on a device for each process
        assert set(re.findall(r'^(train|val) (\d+)$', lines, re.M)) == {('train', '4'), ('train', '2'), ('val', '2')}


@pytest.mark.parametrize('victim, signum, peer_timeout', [
    (0, signal.SIGKILL, 10000), (1, signal.SIGKILL, 10000),  # noticed by an exchange that fails
    (1, signal.SIGSTOP, 5)])  # and by silence
def test_a_dead_process_ends_the_others_and_the_run_goes_on(folder, victim, signum, peer_timeout):
    started = start_processes(folder, 2, *TINY, '--max_iters=100000', '--log_interval=20', '--eval_interval=40',
                              f'--peer_timeout={peer_timeout}')
    for line in started[0].stdout:
        if line.startswith('iter 100:'):
            break
    started[victim].send_signal(signum)
    survivor = started[1 - victim]
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode != 0 and ('since one has ended' in err or 'another task died' in err), err
    started[victim].kill()
    started[victim].communicate()
    out = run_processes(folder, 2, *RESUME, '--max_iters=130', '--eval_interval=1000')
    assert int(ITER.findall(out)[0][0]) % 20 == 0 and 'iter 120:' in out


@pytest.mark.parametrize('env, words', [
    ({'JAX_NUM_PROCESSES': 'two', 'JAX_PROCESS_ID': '0'}, ["'two'"]),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, ["'2'", 'counted from 0']),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}, ['JAX_COORDINATOR_ADDRESS', 'None']),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0', 'JAX_COORDINATOR_ADDRESS': 'node1'}, ["'node1'", 'node1:1234'])])
def test_wrong_process_variables_are_refused(folder, env, words):
    one_line_error(run(folder, 'train_jax.py', *TINY, **env), *words)


def test_an_fsdp_or_a_timeout_that_cannot_be_is_refused(folder):
    one_line_error(run(folder, 'train_jax.py', *TINY, '--fsdp=3', **EIGHT), 'fsdp=3', 'fsdp can be 1, 2, 4, 8')
    one_line_error(run(folder, 'train_jax.py', *TINY, '--fsdp=0'), 'fsdp is 0', 'at least 1')
    one_line_error(run(folder, 'train_jax.py', *TINY, '--peer_timeout=0'), 'peer_timeout is 0', 'at least 1')
    assert not (folder / 'out_jax').exists()


# -----------------------------------------------------------------------------
# planning

def test_the_plan_counts_what_a_step_exchanges(folder):
    flags = ['--model=gpt2', '--devices=4,8', '--fsdp=4', '--batch_size=1', '--gradient_accumulation_steps=3', '--block_size=64',
             '--dtype=float32']
    result = run(folder, 'plan_jax.py', *flags)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in result.stdout.splitlines() if line.startswith('| gpt2 ')]
    params = 4 * (123_587_328 + 64 * 768)  # bytes of the weights, with 64 positions
    for row, n in zip(rows, (4, 8)):
        assert row[1] == str(n) and row[2] == f'{3 * 64 * n:,}'
        assert float(row[3]) == pytest.approx(3 * params / 4 / 2**30, abs=0.01)  # weights and two moments, a quarter of each
        # three times gathered and three times scattered, of which three quarters go to others
        assert float(row[6]) == pytest.approx(6 * params * 3 / 4 / 1e9, abs=0.01)
    # two groups reduce their quarters once: each sends one of them, in a ring of two
    assert float(rows[0][7]) == 0 and float(rows[1][7]) == pytest.approx(params / 4 / 1e9, abs=0.01)
    one_line_error(run(folder, 'plan_jax.py', '--devices=6', '--fsdp=4'), 'fsdp=4', '6')
    one_line_error(run(folder, 'plan_jax.py', '--model=gpt3'), "'gpt3'", 'gpt2-xl')
