"""Runs that are stopped, killed, run out of disk space, diverge, or lose files of a checkpoint."""

import errno
import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import helpers
import jax
import numpy as np
import pytest
from helpers import (
    ENV, ITER, OPTIMIZED, RESUME, ROOT, STEP, TINY, abstract_state, finish, one_line_error, run,
    saved, start_processes, train, with_data,
)

import jax_train_utils as utils
from nanogpt_jax.checkpoint import Checkpoints, steps_on_disk
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import LOCK, hold_out_dir, release_out_dir
from nanogpt_jax.launch import RobustStream, open_closed_streams
from nanogpt_jax.signals import StopRequest
from nanogpt_jax.sharding import make_mesh

KILLS = int(os.environ.get('KILLS', 5))  # 50 by hand, see BENCHMARKS.md
FLIPS = int(os.environ.get('FLIPS', 0))  # 0: each file is damaged once; 200 by hand

TRAIN = [sys.executable, os.path.join(ROOT, 'train_jax.py')]
SAMPLE = ['--device=cpu', '--num_samples=1', '--max_new_tokens=3', '--start=a']


def start(folder, *args):
    """A running process of train_jax.py that has made its first step."""
    process = helpers.start(folder, 'train_jax.py', *args)
    for line in process.stdout:
        if line.startswith('iter '):
            return process
    raise AssertionError(process.stderr.read())


def run_patched(folder, patch, *args, script='train_jax.py', **env):
    """The finished process of a script with these flags, after the Python code `patch`."""
    code = (f'{patch}\nimport runpy, sys\nsys.argv[0] = {script!r}\n'
            f'runpy.run_path({os.path.join(ROOT, script)!r}, run_name="__main__")')
    return finish(helpers.start(folder, '-c', code, *args, **env))


# -----------------------------------------------------------------------------
# signals

@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_run_is_saved_and_resumes_as_if_never_stopped(folder, signum, code):
    process = start(folder, *TINY, '--max_iters=100000', '--dropout=0.1', '--out_dir=parts')
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and not err
    stopped = (rf'^stopped by {signum.name} before iteration (\d+); '
               r'resume with: python train_jax\.py --init_from=resume --out_dir=parts$')
    last = int(re.search(stopped, out, re.M)[1])
    assert str(last) in os.listdir(folder / 'parts')
    result = run(folder, 'train_jax.py', *RESUME, '--out_dir=parts', f'--max_iters={last + 5}')
    assert int(ITER.findall(result.stdout)[0][0]) == last
    train(folder, f'--max_iters={last + 5}', '--dropout=0.1', '--out_dir=uninterrupted')
    state, _ = saved(folder, 'parts', last + 6)
    np.testing.assert_equal(state, saved(folder, 'uninterrupted', last + 6)[0])


def test_processes_agree_on_the_step_to_stop_at(folder):
    started = start_processes(folder, 2, *TINY, '--max_iters=100000', '--log_interval=50')
    for line in started[0].stdout:
        if line.startswith('iter '):
            break
    started[-1].send_signal(signal.SIGINT)  # to one of them only
    (out, err), (_, other) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [130, 130], err + other
    last = re.search(r'stopped by SIGINT before iteration (\d+)', out)[1]
    assert last == str(Checkpoints(folder / 'out_jax', read_only=True).latest_meta()[0])


def test_processes_agree_on_the_part_of_an_evaluation_to_stop_at(folder):
    code = textwrap.dedent('''
        import os, runpy, signal, sys, time
        import jax_train_utils as utils
        load_batch, parts = utils.load_batch, []
        def stopped(mesh, data_dir, split, *args):
            parts.append(split)
            print(split, file=sys.stderr)
            # the fifth of the second evaluation's 20 parts of this split
            if parts.count('val') == 25 and os.environ['JAX_PROCESS_ID'] == '1':
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)  # until the other has heard of it
            return load_batch(mesh, data_dir, split, *args)
        utils.load_batch = stopped
        runpy.run_path(ROOT + '/train_jax.py', run_name='__main__')
    ''').replace('ROOT', repr(ROOT))
    started = start_processes(folder, 2, code, *TINY, '--eval_interval=1', '--eval_iters=40',
                              script='-c')
    (out, err), (_, other) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], err + other
    assert 'stopped by SIGTERM before iteration 1;' in out
    assert err.count('val\n') == other.count('val\n') < 40
    assert [step for step, *_ in STEP.findall(out)] == ['0']
    assert steps_on_disk(folder / 'out_jax') == [1]


def test_a_run_is_saved_when_ctrl_c_also_ends_the_reader_of_its_log(folder):
    script = ' '.join(TRAIN + TINY) + ' --max_iters=100000 | tee train.log'
    process = subprocess.Popen(['bash', '-c', script], cwd=folder, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | ENV)
    line = ''
    while not line.startswith('iter '):
        line = process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    # communicate returns when every process of the pipeline has ended
    assert 'Traceback' not in process.communicate(timeout=60)[1]
    step = Checkpoints(folder / 'out_jax', read_only=True).latest_meta()[0]
    assert step > int(ITER.match(line)[1])


def test_a_stop_before_the_first_step_promises_no_checkpoint(folder):
    result = run_patched(folder, '''
import os, signal
import jax_train_utils as utils
get_train_batch = utils.get_train_batch
def stopped(*args, **kwargs):  # the first batch is read before the step is compiled
    os.kill(os.getpid(), signal.SIGTERM)
    return get_train_batch(*args, **kwargs)
utils.get_train_batch = stopped
''', *TINY)
    assert result.returncode == 0 and not result.stderr and 'compiled in' in result.stdout
    assert 'iter 0' not in result.stdout and 'resume with' not in result.stdout
    assert not steps_on_disk(folder / 'out_jax')


def test_an_evaluation_is_broken_off_at_its_next_part_and_the_run_saved(folder, monkeypatch):
    flags = ['--max_iters=8', '--dropout=0.1', '--eval_iters=4']
    uninterrupted = train(folder, *flags, '--out_dir=uninterrupted')
    load_batch, parts = utils.load_batch, []
    def stopped(mesh, data_dir, split, *args):
        parts.append(split)
        if parts.count('val') == 6:  # the second of the evaluation's four before iteration 4
            os.kill(os.getpid(), signal.SIGTERM)
        return load_batch(mesh, data_dir, split, *args)
    monkeypatch.setattr(utils, 'load_batch', stopped)
    result = run(folder, 'train_jax.py', *TINY, *flags, '--out_dir=parts')
    assert result.returncode == 0 and not result.stderr and parts.count('val') == 6
    assert result.stdout.count('SIGTERM: stopping after this step; press again to stop now') == 1
    assert 'stopped by SIGTERM before iteration 4; ' in result.stdout
    assert [step for step, *_ in STEP.findall(result.stdout)] == ['0']
    assert steps_on_disk(folder / 'parts') == [4]
    monkeypatch.undo()
    result = run(folder, 'train_jax.py', *RESUME, '--out_dir=parts')
    assert STEP.findall(result.stdout) == STEP.findall(uninterrupted)[1:]
    for got, want in zip(saved(folder, 'parts', 9), saved(folder, 'uninterrupted', 9)):
        if 'config' in got:
            got, want = ({**meta, 'config': None} for meta in (got, want))  # names the out_dir
        np.testing.assert_equal(got, want)


def test_parts_of_an_evaluation_are_equal_and_short():
    params = {'w': np.zeros(1000)}
    assert utils.n_parts(200, params, tokens=64) == 20
    assert utils.n_parts(7, params, tokens=64) == 7
    assert utils.n_parts(199, params, tokens=64) == 199  # a prime
    assert utils.n_parts(1200, params, tokens=10 ** 7) == 240  # five take 1e11 FLOPs
    assert utils.n_parts(1200, params, tokens=10 ** 9) == 1200


def test_an_evaluation_gives_the_devices_at_most_two_parts_at_a_time(folder, monkeypatch):
    waiting, most = [], []  # those after it would have to end before a run can stop
    def eval_step(params, x, y):
        waiting.append(x)
        most.append(len(waiting))
        return np.zeros(len(x)), np.ones(len(x))
    monkeypatch.setattr(jax, 'block_until_ready', lambda results: [waiting.pop(0) for _ in results])
    utils.estimate_loss(eval_step, {'w': np.zeros(9)}, make_mesh(jax.devices()[:1]),
                        folder / 'data' / 'tiny', 8, 4, 16, 4)
    assert max(most[:8]) == 2


COMPUTES_FOR_EVER = '''
import jax
from nanogpt_jax.signals import StopRequest
stop = StopRequest()
for_ever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: -x, x))
for_ever = for_ever.lower(1).compile()
print('ready', flush=True)
jax.block_until_ready(for_ever(1))
'''


def test_a_stop_is_announced_while_a_step_computes_and_a_second_signal_ends_it():
    process = helpers.start(ROOT, '-c', COMPUTES_FOR_EVER)
    kill = threading.Timer(60, process.kill)  # it would wait for ever
    kill.start()
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == (
        'SIGINT: stopping after this step; press again to stop now, without saving\n')
    process.send_signal(signal.SIGINT)
    assert finish(process).returncode == 130
    kill.cancel()


def test_a_hangup_stops_a_run_but_never_at_once(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, '_exit', ended.append)
    before = signal.getsignal(signal.SIGHUP)
    with StopRequest() as stop:
        assert not stop.reached()
        for _ in range(2):  # from a shell that ends, and from the kernel when the shell has ended
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.reached() and stop.signum == signal.SIGHUP and stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
    assert not ended and signal.getsignal(signal.SIGHUP) == before
    assert capsys.readouterr().out == 'SIGHUP: stopping after this step\n'
    with StopRequest() as stop:
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
    assert ended == [128 + signal.SIGINT] and stop.signum == signal.SIGTERM


def test_a_hangup_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.reached()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_is_saved_when_its_terminal_is_closed(folder):
    terminal, theirs = pty.openpty()
    # the first terminal that the leader of a session opens becomes its own
    process = subprocess.Popen(
        ['sh', '-c', f'exec "$@" <>{os.ttyname(theirs)} >&0', 'sh', *TRAIN, *TINY,
         '--max_iters=100000'],
        cwd=folder, stderr=subprocess.PIPE, env=os.environ | ENV, start_new_session=True)
    out = b''
    while b'\niter ' not in out:
        out += os.read(terminal, 2 ** 16)
    os.close(theirs)
    os.close(terminal)  # the kernel sends SIGHUP, and nothing can be printed any more
    assert process.communicate(timeout=60) == (None, b'') and process.returncode == 0
    assert Checkpoints(folder / 'out_jax', read_only=True).latest_meta()[0] > 0


def test_what_a_closed_terminal_cannot_take_is_discarded():
    terminal, theirs = pty.openpty()
    with open(theirs, 'w', buffering=1) as stream:
        os.close(terminal)
        with pytest.raises(OSError) as error:
            stream.write('lost\n')
        assert error.value.errno == errno.EIO
        RobustStream(stream).write('lost too\n')


# all three: so that descriptors 1 and 2 would go to other files
def test_a_run_with_closed_standard_streams_is_as_any_other(folder):
    subprocess.run(' '.join([*TRAIN, *TINY, '--max_iters=2', '<&- >&- 2>&-']), shell=True,
                   cwd=folder, env=os.environ | ENV, check=True)
    assert steps_on_disk(folder / 'out_jax') == [3]


@pytest.mark.parametrize('name, mode', [('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')])
def test_a_closed_standard_stream_is_opened(monkeypatch, name, mode):
    monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, f'__{name}__', None)
    open_closed_streams()
    stream = getattr(sys, name)
    assert stream is getattr(sys, f'__{name}__')
    assert (stream.name, stream.mode) == (os.devnull, mode)
    stream.close()


# -----------------------------------------------------------------------------
# one run in an out_dir

def test_a_second_run_is_refused_at_once_until_the_first_is_gone(folder):
    process = start(folder, *TINY, '--max_iters=100000', '--eval_interval=10')
    while not steps_on_disk(folder / 'out_jax'):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that it deletes no checkpoint that is read below
    owner = f'process {process.pid} on {socket.gethostname()}'
    for more in (TINY, RESUME):
        result = run(folder, 'train_jax.py', *more)
        one_line_error(result, 'another run is writing to out_jax', owner, '--out_dir')
        assert 'platform: ' not in result.stdout and 'Resuming' not in result.stdout
    # those that only read are not
    result = run(folder, 'sample_jax.py', *SAMPLE)
    assert result.returncode == 0, result.stderr
    result = run(folder, 'train_jax.py', *RESUME, '--eval_only=True', '--eval_iters=1')
    assert result.returncode == 0 and STEP.findall(result.stdout), result.stderr
    process.kill()
    process.communicate()
    assert (folder / 'out_jax' / LOCK).exists()  # but it is locked no longer
    step = steps_on_disk(folder / 'out_jax')[-1]
    result = run(folder, 'train_jax.py', *RESUME, f'--max_iters={step + 1}')
    assert result.returncode == 0, result.stderr


def test_the_lock_of_an_out_dir_holds_through_links_and_its_lack_is_a_warning(
        tmp_path, monkeypatch, capsys):
    (tmp_path / 'link').symlink_to(tmp_path / 'run')
    hold_out_dir(tmp_path / 'run')
    hold_out_dir(tmp_path / 'run')  # by another run of the same notebook
    release_out_dir()
    with open(tmp_path / 'run' / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='another run is writing to .*link: process'):
            hold_out_dir(tmp_path / 'link')
    def no_locks(lock, operation):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', no_locks)
    hold_out_dir(tmp_path / 'run')
    release_out_dir()
    assert re.match(r'WARNING: .* cannot be locked \(.*No locks available\)',
                    capsys.readouterr().out)


@pytest.mark.parametrize('more', [[], ['--init_from=resume'],
                                  ['--init_from=resume', '--eval_only=True']])
@pytest.mark.parametrize('out_dir, words', [
    ('', ['out_dir is empty', '--out_dir=out_jax']),
    ('data/tiny/val.bin', ['data/tiny/val.bin', 'a file and not a folder', '--out_dir']),
    ('data/tiny/val.bin/x', ['data/tiny/val.bin/x', '--out_dir']),
    ('dangling', ['a link to absent', '--out_dir']),
    ('back\\slash', [r'back\slash', 'a folder without one']),
    ('caf\udcea', ['UTF-8', '--out_dir']),
    ('x' * 5000, ['--out_dir'])])
def test_an_impossible_out_dir_is_refused_before_anything_is_computed(folder, out_dir, words, more):
    (folder / 'dangling').symlink_to('absent')
    result = run(folder, 'train_jax.py', *TINY, *more, f'--out_dir={out_dir}')
    one_line_error(result, *words, alone=True)
    assert {*os.listdir(folder)} == {'dangling', 'data'}
    assert 'tokens per iteration' not in result.stdout
    assert 'platform: ' not in result.stdout or '--eval_only=True' in more


# -----------------------------------------------------------------------------
# kills

def test_kills_at_random_moments_lose_only_the_work_since_the_last_save(folder):
    rng = random.Random(0)
    args = [*TINY, '--eval_interval=1', '--eval_iters=1', '--dropout=0.1', '--max_iters=100000',
            '--out_dir=killed']
    process, last_seen = start(folder, *args), 0
    for line in process.stdout:  # until the first checkpoint is complete: the next waits for it
        if line.startswith('iter 3:'):
            break
    for kill in range(KILLS):
        if kill:
            process = start(folder, *RESUME, '--out_dir=killed')
        # a step and its save take some 20 ms: about half of the kills are during a save
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        out = process.communicate()[0]
        checkpoints = Checkpoints(folder / 'killed', read_only=True)
        step = checkpoints.load('latest', abstract_state)[0]
        assert step == checkpoints.steps()[-1]  # every checkpoint that is in place is valid
        assert step >= last_seen  # none is lost
        printed = [int(s) for s in re.findall(r'^iter (\d+):', out, re.M)]
        # the save of an evaluation ends at most one step later
        assert not printed or step >= printed[-1] - 2
        last_seen = step
    end = last_seen + 3
    result = run(folder, 'train_jax.py', *RESUME, '--out_dir=killed', f'--max_iters={end}')
    assert result.returncode == 0, result.stderr
    assert not [name for name in os.listdir(folder / 'killed') if 'tmp' in name]
    train(folder, '--eval_interval=1000', '--dropout=0.1', f'--max_iters={end}',
          '--out_dir=uninterrupted')
    state, _ = saved(folder, 'killed', end + 1)
    np.testing.assert_equal(state, saved(folder, 'uninterrupted', end + 1)[0])
    print(f'{KILLS} kills survived, up to iteration {end}')


@pytest.mark.skipif(KILLS < 20, reason='of the exhaustive part: KILLS=20')
def test_kills_of_two_processes_with_changing_device_counts_lose_nothing_either(folder):
    rng, losses = random.Random(0), {}
    args = [*TINY, '--fsdp=2', '--eval_interval=2', '--max_iters=100000']
    for _ in range(KILLS):
        started = start_processes(folder, 2, *args, devices=rng.choice([1, 2]))
        for line in started[0].stdout:  # until it has made some steps, and saved at least once
            losses |= {int(step): float(loss) for step, loss, *_ in ITER.findall(line)}
            if line.startswith('iter ') and rng.random() < 0.2 and len(losses) > 4:
                break
        time.sleep(rng.uniform(0, 0.2))
        for process in rng.sample(started, 2):
            process.kill()
        for process in started:
            out, err = process.communicate()
            assert 'damaged' not in out and 'error' not in err.partition('lost the')[0], out + err
            losses |= {int(step): float(loss) for step, loss, *_ in ITER.findall(out)}
        args = [*RESUME, '--max_iters=100000', '--fsdp=2']
    assert list(losses) == [*range(len(losses))]
    whole = dict(found[:2] for found in ITER.findall(
        train(folder, f'--max_iters={len(losses) - 1}', '--out_dir=whole', '--eval_interval=1000')))
    # sums over another number of devices round otherwise
    np.testing.assert_allclose([*losses.values()], [float(x) for x in whole.values()], atol=0.02)
    print(f'{KILLS} kills survived, up to iteration {len(losses)}')


# -----------------------------------------------------------------------------
# damaged files

def test_a_full_disk_is_a_one_line_error_and_leaves_the_last_checkpoint_valid(folder):
    train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    # writing more than 8 KiB to a file fails, as on a full disk
    limited = ['bash', '-c', 'ulimit -f 8; exec "$@"', 'bash', *TRAIN]
    result = subprocess.run([*limited, *RESUME, '--max_iters=100'], cwd=folder, text=True,
                            capture_output=True)
    one_line_error(result, 'saving to out_jax failed', 'checkpoint 5 is complete')
    after = {*os.listdir(folder / 'out_jax')} - {'unfinished.json'}
    assert sorted(name for name in after if 'tmp' not in name) == before
    assert train(folder, '--init_from=resume', '--max_iters=6').count('\niter ') == 2
    assert {*os.listdir(folder / 'out_jax')} == {*before} - {'5'} | {'7'}


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
    """A working directory whose out_jax has checkpoints 4 (the best) and 6 (the latest)."""
    folder = with_data(tmp_path_factory.mktemp('damage'))
    train(folder, '--max_iters=5', '--always_save_checkpoint=False')
    assert steps_on_disk(folder / 'out_jax') == [4, 6]
    return folder


def files_of(folder):
    """Every file in a folder, Orbax's own among them."""
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def damage(path, rng, kinds=('flip', 'truncate', 'remove')):
    """Change a byte of a file, truncate or remove it; returns what was done."""
    kind = rng.choice(kinds)
    with open(path, 'rb') as f:
        content = bytearray(f.read())
    at = rng.randrange(len(content))
    if kind == 'flip':
        content[at] ^= rng.randrange(1, 256)
    if kind == 'truncate':
        del content[at:]
    os.remove(path)
    if kind != 'remove':
        with open(path, 'wb') as f:
            f.write(content)
    return f'{kind} {path} at {at}'


def test_damage_to_any_file_is_found_or_harmless(two_checkpoints, tmp_path):
    want = {n: saved(two_checkpoints, 'out_jax', n) for n in (4, 6)}
    rng, found = random.Random(0), 0
    files = files_of(two_checkpoints / 'out_jax' / '6')
    paths = [os.path.relpath(path, two_checkpoints) for path in files]
    for path in (paths * FLIPS)[:FLIPS] or paths:
        copy = shutil.copytree(two_checkpoints / 'out_jax', tmp_path / 'out_jax')
        done = damage(tmp_path / path, rng, *[['flip']] * bool(FLIPS))
        loaded, *rest = Checkpoints(copy, read_only=True).load('latest', abstract_state)
        np.testing.assert_equal(rest, want[loaded][::-1], err_msg=done)
        found += loaded == 4
        shutil.rmtree(copy)
    print(f'{found} of {FLIPS or len(paths)} found, the others harmless')
    assert found >= 5  # at least in meta, and in names and data of both items


def test_damage_to_the_best_checkpoint_leaves_the_latest(two_checkpoints, tmp_path):
    copy = shutil.copytree(two_checkpoints / 'out_jax', tmp_path / 'copy')
    data = max(files_of(copy / '4' / 'optimizer'), key=os.path.getsize)
    damage(data, random.Random(0))
    checkpoints = Checkpoints(copy, read_only=True)
    assert checkpoints.load('auto', abstract_state)[0] == 6
    checkpoints = Checkpoints(copy, read_only=True)
    with pytest.raises(UserError, match='4 is damaged: .*; try --checkpoint=latest'):
        checkpoints.load('best', abstract_state)
    # its weights are intact
    checkpoints = Checkpoints(copy, read_only=True)
    assert checkpoints.load('best', lambda meta: {'params': abstract_state(meta)['params']})[0] == 4


def test_resume_and_sampling_fall_back_to_the_latest_valid_checkpoint(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    meta = folder / 'out_jax' / '6' / 'meta' / 'metadata'
    text = meta.read_text()
    meta.write_text(text.replace('"iter_num": 6', '"iter_num": 5'))
    assert Checkpoints(folder / 'out_jax', read_only=True).load('latest', abstract_state).step == 4
    meta.write_text(text)
    # its meta is intact: only reading the arrays shows it
    data = max(files_of(folder / 'out_jax' / '6' / 'params'), key=os.path.getsize)
    done = damage(data, random.Random(1), ['flip'])
    sampled = run(folder, 'sample_jax.py', *SAMPLE)
    assert ('sampling from iteration 4 of out_jax, the best; '
            '--checkpoint=latest samples a later one\n') in sampled.stderr
    sampled = run(folder, 'sample_jax.py', *SAMPLE, '--checkpoint=latest')
    assert sampled.returncode == 0, sampled.stderr
    assert 'sampling from iteration 4' in sampled.stderr and 'is damaged' in sampled.stderr
    result = run(folder, 'train_jax.py', *RESUME, '--max_iters=7', '--eval_interval=3',
                        '--always_save_checkpoint=True')
    assert result.returncode == 0, result.stderr
    assert f'{os.sep}6 is damaged' in result.stdout and 'from iteration 4' in result.stdout, done
    assert [i[0] for i in ITER.findall(result.stdout)] == ['4', '5', '6', '7']
    names = os.listdir(folder / 'out_jax')
    # renamed, not deleted; what is saved under its number is intact
    assert {'6', '8'} < {*names} and sum(name.startswith('damaged-6') for name in names) == 1


def test_without_a_valid_checkpoint_scripts_end_with_one_line(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    for step in ('4', '6'):
        (folder / 'out_jax' / step / 'meta' / 'metadata').write_text('')  # as after a power failure
    before = sorted(os.listdir(folder / 'out_jax'))
    for script in ('train_jax.py', 'sample_jax.py'):
        result = run(folder, script, *RESUME)
        one_line_error(result, 'no checkpoint in out_jax is valid')
        assert (result.stdout + result.stderr).count('is damaged') == 2
    assert sorted(os.listdir(folder / 'out_jax')) == before


def test_what_a_killed_save_has_left_is_removed_on_resume(folder):
    train(folder, '--max_iters=2')
    half = folder / 'out_jax' / '9.orbax-checkpoint-tmp'
    shutil.copytree(folder / 'out_jax' / '3', half)
    (folder / 'out_jax' / 'other.txt').touch()
    names = ['9', '../out_jax/other.txt', 'other.txt', None]
    (folder / 'out_jax' / 'unfinished.json').write_text(json.dumps(names))
    assert 'iter 3:' in train(folder, '--init_from=resume', '--max_iters=3')
    assert {*os.listdir(folder / 'out_jax')} == {'4', 'metrics.jsonl', LOCK, 'other.txt'}


def test_an_error_that_says_nothing_about_a_checkpoint_stops_the_run(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    before = sorted(os.listdir(folder / 'out_jax'))
    for part in ('meta/metadata', 'params/_METADATA'):
        refuse = textwrap.dedent(f'''
            import sys
            def refuse(event, args):
                if event == 'open' and str(args[0]).endswith('out_jax/6/{part}'):
                    raise PermissionError(13, 'Permission denied', args[0])
            sys.addaudithook(refuse)
        ''')
        for script, *flags in (['train_jax.py', *RESUME, '--max_iters=9'],
                               ['sample_jax.py', *SAMPLE, '--checkpoint=latest']):
            result = run_patched(folder, refuse, *flags, script=script)
            one_line_error(result, 'cannot read', f'out_jax{os.sep}6', 'Permission denied')
            assert 'damaged' not in result.stdout + result.stderr
    assert {*before} == {*os.listdir(folder / 'out_jax')}


def test_a_checkpoint_of_a_changed_model_is_not_called_damaged(two_checkpoints, tmp_path):
    copy = shutil.copytree(two_checkpoints / 'out_jax', tmp_path / 'copy')
    def without_wpe(meta):
        state = abstract_state(meta)
        del state['params']['transformer']['wpe']
        return state
    with pytest.raises(UserError, match='written by another model: it has transformer.wpe, this '
                                        'one has not'):
        Checkpoints(copy, read_only=True).load('latest', without_wpe)
    def resized(meta):
        state = abstract_state(meta)
        return state | {'opt_state': (state['params'], *state['opt_state'])}
    with pytest.raises(UserError, match='written by another optimizer: it has opt_state'):
        Checkpoints(copy, read_only=True).load('latest', resized)


# -----------------------------------------------------------------------------
# what is saved, and where

NAME = '[x] %#?*{}:$\'"\t\n\N{LATIN SMALL LETTER E WITH ACUTE}'


def test_a_run_is_saved_and_resumed_whatever_its_folder_is_called(folder):
    train(folder, '--max_iters=2', f'--out_dir={NAME}/run')
    out = train(folder, '--init_from=resume', '--max_iters=4', f'--out_dir={NAME}/run')
    assert 'iter 3:' in out and steps_on_disk(folder / NAME / 'run') == [4, 5]
    assert saved(folder, f'{NAME}/run', 4)[1]['iter_num'] == 4
    # a checkpoint of another folder is read here, and the other way round
    train(folder, '--max_iters=2')
    shutil.move(folder / 'out_jax', folder / NAME)
    shutil.move(folder / NAME / 'run', folder)
    for out_dir in ('run', f'{NAME}/out_jax'):
        train(folder, '--init_from=resume', '--max_iters=5', f'--out_dir={out_dir}')


def test_a_save_that_cannot_be_read_back_is_an_error_and_deletes_nothing(folder):
    train(folder, '--max_iters=4')
    lost = '''
from etils import epath  # orbax merges what its glob finds
epath.gpath.PosixGPath.glob = lambda self, pattern: iter([])
'''
    unnoticed = lost + '''
from nanogpt_jax.checkpoint import Checkpoints
Checkpoints._try_to_save = lambda self: None
'''
    result = run_patched(folder, unnoticed, *RESUME, '--max_iters=100')
    one_line_error(result, 'saving to out_jax failed', 'checkpoint 5 is complete')
    assert {'4', '5'} < {*os.listdir(folder / 'out_jax')}
    result = run_patched(folder, lost, *TINY, '--out_dir=other')
    one_line_error(result, 'cannot save to other', '--out_dir')
    assert 'iter 0' not in result.stdout


def test_what_others_wrote_is_never_renamed_deleted_or_counted(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    out_dir = folder / 'out_jax'
    (out_dir / '2024' / 'raw').mkdir(parents=True)
    (out_dir / '2024' / 'raw' / 'data.csv').write_text('1,2')
    shutil.copytree(out_dir, out_dir / '7')  # a run in this one
    shutil.copytree(out_dir / '4', out_dir / '3')  # of another project that uses Orbax
    (out_dir / '3' / 'meta' / 'metadata').write_text('{"step": 3}')
    shutil.copytree(out_dir / '3', out_dir / '5.orbax-checkpoint-tmp')
    others = [path for name in ('2024', '7', '3', '5.orbax-checkpoint-tmp')
              for path in files_of(out_dir / name)]
    (out_dir / '6' / 'meta' / 'metadata').write_text('{')
    assert steps_on_disk(out_dir) == [4, 6]
    result = run(folder, 'train_jax.py', *RESUME, '--max_iters=6')
    one_line_error(result, 'iteration 7 could not be saved', f'out_jax{os.sep}7', '--out_dir')
    out = train(folder, '--init_from=resume', '--max_iters=11')
    assert 'from iteration 4' in out and steps_on_disk(out_dir) == [8, 12]
    assert all(os.path.exists(path) for path in others)
    train(folder, '--out_dir=out_jax/2024', '--max_iters=2')
    for other in ('2024/raw', '2024/3/params'):
        result = run(folder, 'sample_jax.py', f'--out_dir=out_jax/{other}')
        one_line_error(result, 'no checkpoint in')


def test_a_reader_beside_a_run_goes_on_with_what_replaced_its_checkpoint(
        two_checkpoints, tmp_path, capsys):
    copy = shutil.copytree(two_checkpoints / 'out_jax', tmp_path / 'copy')
    def replaced_meanwhile(meta):
        if (copy / '6').exists():
            shutil.copytree(copy / '6', copy / '8')
            shutil.rmtree(copy / '6')
            shutil.rmtree(copy / '4')
        return abstract_state(meta)
    assert Checkpoints(copy, read_only=True).load('latest', replaced_meanwhile)[0] == 8
    assert not capsys.readouterr().out


def test_validation_losses_are_compared_with_those_measured_alike(folder):
    easy = shutil.copytree(folder / 'data' / 'tiny', folder / 'data' / 'easy')
    np.tile(np.arange(20, dtype=np.uint16), 20).tofile(easy / 'val.bin')
    flags = ['--init_from=resume', '--always_save_checkpoint=False']
    losses = STEP.findall(train(folder, '--max_iters=8', flags[1]))
    out = train(folder, *flags, '--dataset=easy', '--max_iters=12')
    assert 'measured with another dataset: the best starts anew' in out
    assert float(STEP.findall(out)[0][2]) < float(losses[-1][2])  # so it would be the best
    out = train(folder, *flags, '--dataset=tiny', '--max_iters=20')
    found = STEP.findall(out)
    assert out.count('saving checkpoint') == 1 + sum(
        float(val) < min(float(v) for *_, v in losses + found[:i])
        for i, (*_, val) in enumerate(found))
    losses += found
    best = min(losses, key=lambda found: float(found[2]))
    checkpoints = Checkpoints(folder / 'out_jax', read_only=True)
    assert checkpoints.load('best', abstract_state).step == int(best[0])
    assert f'{checkpoints.best_val_loss(checkpoints.latest_meta()[1]["config"]):.4f}' == best[2]
    # the best of the other data is kept too
    assert len(checkpoints.steps()) == 3


@pytest.mark.parametrize('part, error, found', [
    ('meta/metadata', 'OSError(5, "Input/output error")', 'from iteration 6'),
    ('params/_METADATA', 'OSError(5, "Input/output error")', 'stops'),
    ('params/_METADATA', 'ValueError("DATA_LOSS: changed")', 'from iteration 4')])
def test_processes_resume_the_same_checkpoint(two_checkpoints, tmp_path, part, error, found):
    folder = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    code = textwrap.dedent(f'''
        import os, runpy, sys
        def refuse(event, args):
            if event == 'open' and str(args[0]).endswith('/out_jax/6/{part}'):
                raise {error}
        if os.environ['JAX_PROCESS_ID'] == '1':
            sys.addaudithook(refuse)
        runpy.run_path({ROOT!r} + '/train_jax.py', run_name='__main__')
    ''')
    started = start_processes(folder, 2, code, *RESUME, '--max_iters=9', script='-c')
    (out, err), (_, other) = (process.communicate(timeout=120) for process in started)
    codes = [process.returncode for process in started]
    names = {*os.listdir(folder / 'out_jax')}
    if found == 'stops':
        assert codes == [1, 1] and {'4', '6'} < names and 'Input/output error' in err + other
        assert 'damaged' not in out + ' '.join(names)
        return
    assert codes == [0, 0] and '10' in names, out + err + other
    assert out.count('Resuming training') == 1 + ('4' in found) and found in out
    assert ('is damaged: ValueError: DATA_LOSS: changed' in out) == ('4' in found)


# -----------------------------------------------------------------------------
# a loss that is not finite

def test_a_non_finite_loss_stops_the_run_and_saves_nothing(folder):
    train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    result = run(folder, 'train_jax.py', *RESUME, '--learning_rate=1e38', '--min_lr=1e38',
                 '--max_iters=50')
    one_line_error(result, 'not a finite number', 'checkpoint 5', '--learning_rate')
    assert sorted(os.listdir(folder / 'out_jax')) == before


# -----------------------------------------------------------------------------
# host memory and open files

@pytest.mark.xdist_group('memory')
def test_host_memory_and_open_files_do_not_grow(folder):
    if not os.path.exists('/proc/self/statm'):
        pytest.skip('resident memory is read from /proc')
    steps = int(os.environ.get('MEMORY_STEPS', 2000))  # 20000 by hand
    result = run_patched(folder, '''
import atexit, os
import jax_train_utils as utils
get_train_batch, sizes, files = utils.get_train_batch, [], []
def counted(*args, **kwargs):
    with open("/proc/self/statm") as f:
        sizes.append(int(f.read().split()[1]) * 4096)
    if len(sizes) % 200 == 150:
        files.append(len(os.listdir("/proc/self/fd")))
    return get_train_batch(*args, **kwargs)
utils.get_train_batch = counted
def report():
    print("grown by", [sizes[i + 200] - sizes[i] for i in range(200, len(sizes) - 200, 200)])
    print("open files", files)
atexit.register(report)
''', *TINY, f'--max_iters={steps}', '--eval_interval=200', '--log_interval=100', '--batch_size=64',
        '--n_embd=8', **OPTIMIZED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('saving checkpoint') == steps // 200 + 1  # at the end
    grown, files = ([int(n) for n in re.search(rf'{name} \[(.*)\]', result.stdout)[1].split(',')]
                    for name in ('grown by', 'open files'))
    each = ', '.join(f'{n / 1e6:.1f} MB' for n in grown)
    print(f'memory grown in each 200 iterations: {each}; open files: {files}')
    # the first saves keep up to 25 MB; a leak of one 16 kB batch per step would be 3.2 MB
    # in every 200 steps
    assert len(grown) >= 8 and sorted(grown)[len(grown) // 2] < 1.6e6
    # minima, since a save in the background has files open
    assert min(files[len(files) // 2:]) <= min(files[:len(files) // 2])
