"""Runs that are stopped, killed, starved of disk space, or damaged on disk."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import CACHE, ITER, ROOT, TINY, TRAIN, one_line_error, run, saved, start_processes, train

from jax_checkpoint import CHECKSUMS, Checkpoints, find_damage, steps_on_disk

KILLS = int(os.environ.get('KILLS', 5))  # 50 by hand, see JAX_README.md

RESUME = ['--init_from=resume', '--device=cpu']


def start(folder, *args, command=TRAIN):
    """A running process of train_jax.py that has made its first step."""
    process = subprocess.Popen([*command, *args], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | CACHE | {'PYTHONPATH': ROOT})
    for line in process.stdout:
        if line.startswith('iter '):
            return process
    raise AssertionError(process.stderr.read())


# -----------------------------------------------------------------------------
# signals

@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_run_is_saved_and_ends_as_if_never_stopped(folder, signum, code):
    process = start(folder, *TINY, '--max_iters=100000', '--dropout=0.1', '--out_dir=parts')
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and not err
    last = int(re.search(r'stopped by SIG\w+ before iteration (\d+); .*--init_from=resume --out_dir=parts', out)[1])
    assert str(last) in os.listdir(folder / 'parts')
    result = run(folder, 'train_jax.py', *RESUME, '--out_dir=parts', f'--max_iters={last + 5}')
    assert int(ITER.findall(result.stdout)[0][0]) == last
    train(folder, f'--max_iters={last + 5}', '--dropout=0.1', '--out_dir=whole')
    state, _ = saved(folder, 'parts', last + 6)
    np.testing.assert_equal(state, saved(folder, 'whole', last + 6)[0])


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_processes_agree_on_the_step_to_stop_at(folder, signum):
    started = start_processes(folder, 2, *TINY, '--max_iters=100000', '--log_interval=50')
    for line in started[0].stdout:
        if line.startswith('iter '):
            break
    started[-1].send_signal(signum)  # the notice reaches one of them
    (out, err), (_, other) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], err + other
    last = re.search(r'stopped by SIGTERM before iteration (\d+)', out)[1]
    assert last == str(Checkpoints(folder / 'out_jax', read_only=True).newest_whole())


def test_a_log_reader_that_dies_of_the_same_ctrl_c_costs_nothing(folder):
    script = ' '.join(TRAIN + TINY) + ' --max_iters=100000 | tee train.log'
    process = subprocess.Popen(['bash', '-c', script], cwd=folder, start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | CACHE)
    line = ''
    while not line.startswith('iter '):
        line = process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert 'Traceback' not in process.communicate(timeout=60)[1]  # returns when the last of the pipeline has ended
    assert Checkpoints(folder / 'out_jax', read_only=True).newest_whole() > int(ITER.match(line)[1])


def test_a_stop_before_the_first_step_promises_no_checkpoint(folder):
    code = '''
import os, runpy, signal
import jax_train_utils as utils
draw = utils.get_train_batch
def stopped(*args):  # the first batch is drawn before the step is compiled
    os.kill(os.getpid(), signal.SIGTERM)
    return draw(*args)
utils.get_train_batch = stopped
runpy.run_path(ROOT + "/train_jax.py", run_name="__main__")
'''
    result = subprocess.run([sys.executable, '-c', code.replace('ROOT', repr(ROOT)), *TINY], cwd=folder, capture_output=True,
                            text=True, env=os.environ | CACHE | {'PYTHONPATH': ROOT})
    assert result.returncode == 0 and not result.stderr and 'compiled in' in result.stdout
    assert 'iter 0' not in result.stdout and 'go on with' not in result.stdout and not steps_on_disk(folder / 'out_jax')


def test_a_second_signal_stops_at_once(folder):
    code = 'import time\nfrom jax_train_utils import StopRequest\nstop = StopRequest()\nprint("ready", flush=True)\n' \
           'while True:\n    time.sleep(0.01)\n    if stop.signum: print("asked", flush=True)'
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == 'asked\n'
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(10) == -signal.SIGTERM


def test_kills_at_random_moments_cost_the_work_since_the_last_save_and_no_more(folder):
    rng = random.Random(0)
    args = [*TINY, '--eval_interval=1', '--eval_iters=1', '--dropout=0.1', '--max_iters=100000', '--out_dir=killed']
    process, last_seen, kills = start(folder, *args), 0, 0
    while True:
        time.sleep(rng.uniform(0, 0.4))  # a step with its save takes some 20 ms: during a save as often as not
        process.kill()
        out = process.communicate()[0]
        kills += 1
        reader = Checkpoints(folder / 'killed', read_only=True)
        step = reader.newest_whole()
        assert step == reader.steps()[-1]  # what is in place is whole
        assert step >= last_seen  # and no earlier than what there was before
        printed = [int(s) for s in re.findall(r'^iter (\d+):', out, re.M)]
        assert not printed or step >= printed[-1] - 2  # a save follows its evaluation by at most the step in between
        last_seen = step
        if kills == KILLS:
            break
        process = start(folder, *RESUME, '--out_dir=killed')
    end = last_seen + 3
    result = run(folder, 'train_jax.py', *RESUME, '--out_dir=killed', f'--max_iters={end}')
    assert result.returncode == 0, result.stderr
    assert not [name for name in os.listdir(folder / 'killed') if 'tmp' in name]
    train(folder, '--eval_interval=1000', '--dropout=0.1', f'--max_iters={end}', '--out_dir=whole')
    np.testing.assert_equal(saved(folder, 'killed', end + 1)[0], saved(folder, 'whole', end + 1)[0])
    print(f'{kills} kills survived, up to iteration {end}')


# -----------------------------------------------------------------------------
# what is on disk

def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(folder):
    train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    # writing more than 8 KiB to a file fails, as on a full disk
    limited = ['bash', '-c', 'ulimit -f 8; exec "$@"', 'bash', *TRAIN]
    result = subprocess.run([*limited, *RESUME, '--max_iters=100'], cwd=folder, text=True, capture_output=True)
    one_line_error(result, 'saving to out_jax failed', 'checkpoint 5 is whole')
    assert sorted(name for name in os.listdir(folder / 'out_jax') if 'tmp' not in name) == before
    assert train(folder, '--init_from=resume', '--max_iters=6').count('\niter ') == 2


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
    """An out_dir with the checkpoints 4 (the best) and 6 (the latest)."""
    from conftest import with_data
    folder = with_data(tmp_path_factory.mktemp('damage'))
    train(folder, '--max_iters=5', '--always_save_checkpoint=False')
    assert steps_on_disk(folder / 'out_jax') == [4, 6]
    return folder


def damage(step, rng):
    """Flip a bit of, cut, or remove one of the files of a checkpoint; returns what was done."""
    files = [os.path.join(root, name) for root, _, names in os.walk(step) for name in names if root != str(step)]
    path = rng.choice([f for f in files if os.path.getsize(f)])
    content = bytearray(open(path, 'rb').read())
    kind = rng.choice(['flip', 'flip', 'cut', 'remove'])
    if kind == 'flip':
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if kind == 'cut':
        del content[rng.randrange(len(content)):]
    os.remove(path)
    if kind != 'remove':
        with open(path, 'wb') as f:
            f.write(content)
    return f'{kind} {path}'


def test_every_flipped_bit_cut_and_removed_file_is_detected(two_checkpoints, tmp_path):
    rng = random.Random(0)
    original = two_checkpoints / 'out_jax' / '6'
    assert find_damage(original) is None
    for i in range(100):
        copy = shutil.copytree(original, tmp_path / str(i))
        done = damage(copy, rng)
        assert find_damage(copy) is not None, done
        shutil.rmtree(copy)


@pytest.mark.parametrize('content', ['', '{}', '[]', '3'])
def test_checksums_that_name_nothing_vouch_for_nothing(two_checkpoints, tmp_path, content):
    copy = shutil.copytree(two_checkpoints / 'out_jax' / '6', tmp_path / '6')
    (copy / CHECKSUMS).write_text(content)
    assert find_damage(copy) is not None


def test_resume_falls_back_to_the_newest_whole_checkpoint_and_says_so(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    done = damage(folder / 'out_jax' / '6', random.Random(1))
    sampled = run(folder, 'sample_jax.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=3', '--start=a', '--which=latest')
    assert sampled.returncode == 0 and 'sampling from iteration 4' in sampled.stderr and 'is damaged' in sampled.stderr
    result = run(folder, 'train_jax.py', *RESUME, '--max_iters=7')
    assert result.returncode == 0, result.stderr
    assert f'{os.sep}6 is damaged' in result.stdout and 'from iteration 4' in result.stdout, done
    assert [i[0] for i in ITER.findall(result.stdout)] == ['4', '5', '6', '7']
    names = os.listdir(folder / 'out_jax')
    assert '8' in names and any(name.startswith('damaged-6') for name in names)  # set aside, not deleted


def test_sampling_says_that_a_later_checkpoint_was_left(two_checkpoints):
    sampled = run(two_checkpoints, 'sample_jax.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=3', '--start=a')
    assert 'sampling from iteration 4 of out_jax, the best; --which=latest takes a later one\n' in sampled.stderr


@pytest.mark.parametrize('step', ['4', '6'])
def test_any_damaged_file_leaves_the_rest_of_a_run_usable(two_checkpoints, tmp_path, step):
    rng = random.Random(2)
    for root, _, names in os.walk(two_checkpoints / 'out_jax' / step):
        for name in names:
            copy = shutil.copytree(two_checkpoints / 'out_jax', tmp_path / 'copy')
            path = copy / os.path.relpath(os.path.join(root, name), two_checkpoints / 'out_jax')
            path.write_bytes(rng.choice([b'', b'{}', path.read_bytes()[:-1]]))
            checkpoints = Checkpoints(copy, read_only=True)
            for which in ('auto', 'latest'):
                found = checkpoints.find(which)
                assert found in (4, 6) and find_damage(checkpoints.folder(found)) is None
                assert checkpoints.meta(found)['iter_num'] == found
            shutil.rmtree(copy)


def test_with_nothing_whole_left_it_stops_with_one_line(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    for step in ('4', '6'):
        os.remove(folder / 'out_jax' / step / CHECKSUMS)
    before = sorted(os.listdir(folder / 'out_jax'))
    one_line_error(run(folder, 'train_jax.py', *RESUME), 'no checkpoint in out_jax is whole')
    one_line_error(run(folder, 'sample_jax.py', '--device=cpu', '--which=best'), 'is damaged')
    assert sorted(os.listdir(folder / 'out_jax')) == before


def test_half_written_checkpoints_are_removed(folder):
    train(folder, '--max_iters=2')
    half = folder / 'out_jax' / '9.orbax-checkpoint-tmp'
    shutil.copytree(folder / 'out_jax' / '3', half)
    assert 'iter 3:' in train(folder, '--init_from=resume', '--max_iters=3') and not half.exists()


# -----------------------------------------------------------------------------
# a loss that is no number

def test_a_non_finite_loss_stops_the_run_and_saves_nothing(folder):
    train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    result = run(folder, 'train_jax.py', *RESUME, '--learning_rate=1e38', '--min_lr=1e38', '--max_iters=50')
    one_line_error(result, 'not a finite number', 'checkpoint 5', '--learning_rate')
    assert sorted(os.listdir(folder / 'out_jax')) == before


# -----------------------------------------------------------------------------
# host memory

def test_memory_stays_flat(folder):
    code = '''
import atexit, runpy, sys
sys.argv = ["train_jax.py", *sys.argv[1:]]
import jax_train_utils as utils
draw, sizes = utils.get_train_batch, []
def counted(*args):
    with open("/proc/self/statm") as f:
        sizes.append(int(f.read().split()[1]) * 4096)
    return draw(*args)
utils.get_train_batch = counted
atexit.register(lambda: print("grown by", [sizes[i + 500] - sizes[i] for i in range(500, len(sizes) - 500, 500)]))
runpy.run_path(ROOT + "/train_jax.py", run_name="__main__")
'''
    if not os.path.exists('/proc/self/statm'):
        pytest.skip('resident memory is read from /proc')
    steps = int(os.environ.get('MEMORY_STEPS', 4000))
    command = [sys.executable, '-c', code.replace('ROOT', repr(ROOT)), *TINY, f'--max_iters={steps}', '--eval_interval=500',
               '--log_interval=100', '--batch_size=64']
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | CACHE | {'PYTHONPATH': ROOT})
    assert result.returncode == 0, result.stderr
    grown = [int(n) for n in re.search(r'grown by \[(.*)\]', result.stdout)[1].split(',')]
    print(f'memory grown in each 500 iterations: {", ".join(f"{n / 1e6:.1f} MB" for n in grown)}')
    # the first saves take some for good, up to 12 MB at a time; a leak of one batch of 16 kB a step would be 8 MB every time
    assert len(grown) >= 7 and sorted(grown)[len(grown) // 2] < 4e6
