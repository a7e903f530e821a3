"""Runs that are stopped, killed, run out of disk space, diverge, or lose files of a checkpoint."""

import errno
import fcntl
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import (
    ENV, ITER, OPTIMIZED, RESUME, ROOT, STEP, TINY, abstract_state, finish, one_line_error, resume,
    run, saved, start_processes, train,
)

import jax_train_utils as utils
from nanogpt_jax import checkpoint
from nanogpt_jax.checkpoint import Checkpoints, steps_on_disk
from nanogpt_jax.errors import UserError
from nanogpt_jax.launch import RobustStream, open_closed_streams
from nanogpt_jax.run_dir import LOCK, hold_out_dir, release_out_dir
from nanogpt_jax.sharding import make_mesh
from nanogpt_jax.signals import StopRequest

# orbax's other reads, when one has failed
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

KILLS = int(os.environ.get('KILLS', 3))  # 50 by hand, see BENCHMARKS.md

TRAIN = [sys.executable, os.path.join(ROOT, 'train_jax.py')]


def start(folder, *args):
    """A running process of train_jax.py that has made its first step."""
    process = helpers.start(folder, 'train_jax.py', *args)
    for line in process.stdout:
        if line.startswith('iter '):
            return process
    raise AssertionError(process.stderr.read())


def patched(patch):
    """The code of train_jax.py after the Python code `patch`, to be run with -c."""
    return (f'{textwrap.dedent(patch)}\nimport runpy, sys\nsys.argv[0] = "train_jax.py"\n'
            f'runpy.run_path({ROOT!r} + "/train_jax.py", run_name="__main__")')


# -----------------------------------------------------------------------------
# signals; more in test_launch.py

@pytest.mark.slow
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


@pytest.mark.slow
def test_processes_agree_on_the_batch_of_an_evaluation_to_stop_at(folder):
    code = patched('''
        import os, signal, sys, time
        import jax_train_utils as utils
        load, batches = utils.Batches._load, []
        def stopped(self, split, offsets):
            batches.append(split)
            print(split, file=sys.stderr)
            # in the second evaluation
            if batches.count('val') == 25 and os.environ['JAX_PROCESS_ID'] == '1':
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)  # until the other has heard of it
            return load(self, split, offsets)
        utils.Batches._load = stopped
    ''')
    started = start_processes(folder, 2, code, *TINY, '--eval_interval=4', '--eval_iters=40',
                              script='-c')
    (out, err), (_, other) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], err + other
    assert 'stopped by SIGTERM before iteration 4;' in out
    assert err.count('val\n') == other.count('val\n') < 40
    assert [step for step, *_ in STEP.findall(out)] == ['0']
    assert steps_on_disk(folder / 'out_jax') == [4]


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


@pytest.mark.slow
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
    with open('/dev/full', 'w', buffering=1) as stream:  # the disk of a log
        RobustStream(stream).write('lost\n')


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

@pytest.mark.slow
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


@pytest.mark.parametrize('out_dir, words', [
    ('', 'out_dir is empty.*--out_dir=out_jax'), ('file', 'file .*not a folder'),
    ('file/x', 'file/x.*--out_dir'), ('dangling', 'dangling .*not a folder'),
    ('back\\slash', 'is not UTF-8'), ('caf\udcea', 'is not UTF-8'), ('x' * 5000, '--out_dir')])
def test_an_impossible_out_dir_is_refused(tmp_path, monkeypatch, out_dir, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'dangling').symlink_to('absent')
    for open_it in (hold_out_dir, Checkpoints, lambda path: Checkpoints(path, read_only=True),
                    lambda path: hold_out_dir(path, resume=True)):
        with pytest.raises(UserError, match=words):
            open_it(out_dir)
    assert {*os.listdir()} == {'dangling', 'file'}


def test_a_current_folder_that_is_gone_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'gone').mkdir()
    monkeypatch.chdir(tmp_path / 'gone')
    (tmp_path / 'gone').rmdir()
    with pytest.raises(UserError, match='current folder has been deleted'):
        hold_out_dir('out')


# -----------------------------------------------------------------------------
# kills

@pytest.mark.slow
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


@pytest.mark.slow
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
            assert 'damaged' not in out and 'Traceback' not in err, out + err
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

CONFIG = dict(dataset='tiny', block_size=8, batch_size=4, eval_iters=2,
              always_save_checkpoint=False)


def toy_state(seed):
    rng = np.random.default_rng(seed)
    w, mu = (jnp.asarray(rng.standard_normal((600, 9)), jnp.float32) for _ in range(2))
    return {'params': {'w': w, 'b': w[0]}, 'opt_state': {'mu': mu}, 'loss_scale': jnp.ones(1)}


def abstract(meta):
    place = jax.sharding.NamedSharding(make_mesh(jax.devices()), jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), toy_state(0))


def save(checkpoints, step, val_loss=None, **config):
    checkpoints.save(toy_state(step), dict(
        iter_num=step, best_val_loss=val_loss or 9.0, model_args={}, config=CONFIG | config,
        chars=None), val_loss)


def load(out_dir, checkpoint='latest'):
    """The iteration that is loaded; its arrays must be what was saved."""
    step, _, state = Checkpoints(out_dir, read_only=True).load(checkpoint, abstract)
    jax.tree.map(np.testing.assert_array_equal, state, toy_state(step))
    return step


@pytest.fixture
def out_dir(tmp_path):
    """Has the checkpoints 4 (the best) and 6 (the latest)."""
    with Checkpoints(tmp_path / 'out_jax') as checkpoints:
        save(checkpoints, 4, 1.0)
        save(checkpoints, 6)
    assert {*os.listdir(tmp_path / 'out_jax')} == {'4', '6'}
    return tmp_path / 'out_jax'


def files_of(folder):
    """Every file in a folder, Orbax's own among them."""
    return sorted(path for path in folder.rglob('*') if path.is_file())


def damage(path, rng, kinds=('flip', 'truncate', 'remove')):
    """Change a byte of a file, truncate or remove it; returns what was done."""
    kind, content = rng.choice(kinds), bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if kind == 'flip':
        content[at] ^= rng.randrange(1, 256)
    if kind == 'truncate':
        del content[at:]
    path.unlink()
    if kind != 'remove':
        path.write_bytes(content)
    return f'{kind} {path} at {at}'


@pytest.mark.parametrize('times', [1, pytest.param(20, marks=pytest.mark.slow)])
def test_damage_to_any_file_is_found_or_harmless(out_dir, tmp_path, times):
    rng, found, paths = random.Random(0), 0, files_of(out_dir / '6') * times
    for path in paths:
        whole = shutil.copytree(out_dir, tmp_path / 'whole')
        done = damage(path, rng)
        step = load(out_dir)
        assert step in (4, 6), done
        found += step == 4
        shutil.rmtree(out_dir)
        whole.rename(out_dir)
    print(f'{found} of {len(paths)} found, the others harmless')
    assert found >= 5 * times  # at least in meta, and in names and data of both items
    damage(max(files_of(out_dir / '6' / 'params'), key=os.path.getsize), rng, ['flip'])
    assert load(out_dir) == 4  # only the checksum tells


def test_damage_to_the_best_checkpoint_leaves_the_latest(out_dir):
    damage(max(files_of(out_dir / '4' / 'optimizer'), key=os.path.getsize), random.Random(0))
    assert load(out_dir, 'auto') == 6
    with pytest.raises(UserError, match='4 is damaged: .*; try --checkpoint=latest'):
        load(out_dir, 'best')
    checkpoints = Checkpoints(out_dir, read_only=True)
    weights = checkpoints.load('best', lambda meta: {'params': abstract(meta)['params']})
    assert weights.step == 4  # they are intact


def test_a_run_falls_back_to_the_latest_valid_checkpoint(folder):
    train(folder, '--max_iters=5', '--always_save_checkpoint=False')
    meta = folder / 'out_jax' / '6' / 'meta' / 'metadata'
    text = meta.read_text()
    meta.write_text(text.replace('"iter_num": 6', '"iter_num": 5'))
    assert Checkpoints(folder / 'out_jax', read_only=True).load('latest', abstract_state).step == 4
    meta.write_text(text)
    # its meta is intact: only reading the arrays shows it
    data = max(files_of(folder / 'out_jax' / '6' / 'params'), key=os.path.getsize)
    done = damage(data, random.Random(1), ['flip'])
    out = resume(folder, '--max_iters=7', '--eval_interval=3', '--always_save_checkpoint=True')
    assert f'{os.sep}6 is damaged' in out and 'from iteration 4' in out, done
    assert [i[0] for i in ITER.findall(out)] == ['4', '5', '6', '7']
    names = os.listdir(folder / 'out_jax')
    # renamed, not deleted; what is saved under its number is intact
    assert {'6', '8'} < {*names} and sum(name.startswith('damaged-6') for name in names) == 1


def test_without_a_valid_checkpoint_nothing_is_renamed(out_dir, capsys):
    for step in ('4', '6'):
        (out_dir / step / 'meta' / 'metadata').write_text('')  # as after a power failure
    for checkpoints in (Checkpoints(out_dir), Checkpoints(out_dir, read_only=True)):
        for read in (checkpoints.latest_meta, lambda c=checkpoints: c.load('auto', abstract)):
            with pytest.raises(UserError, match='no checkpoint in .* is valid'):
                read()
        checkpoints.close()
        assert capsys.readouterr().out.count('is damaged') == 2
    assert {*os.listdir(out_dir)} == {'4', '6'}


def test_what_a_killed_save_has_left_is_removed_and_nothing_else(out_dir):
    for name in ('8.orbax-checkpoint-tmp', '9'):
        shutil.copytree(out_dir / '4', out_dir / name)
        (out_dir / name / 'meta' / 'metadata').unlink()
    (out_dir.parent / 'other').mkdir()
    names = ['6', '8', '9', '../other', 'other.txt', None]
    (out_dir / 'other.txt').touch()
    (out_dir / 'unfinished.json').write_text(json.dumps(checkpoint.seal({'names': names})))
    Checkpoints(out_dir).close()
    assert {*os.listdir(out_dir)} == {'4', '6', 'other.txt'} and (out_dir.parent / 'other').exists()
    (out_dir / 'unfinished.json').write_text('["')  # cut off
    shutil.copytree(out_dir / '4', out_dir / 'save-test')
    Checkpoints(out_dir).close()
    assert {*os.listdir(out_dir)} == {'4', '6', 'other.txt'}


def refusing(path, error):
    """Raise an error whenever this process opens a file that ends in path; it cannot be undone."""
    def hook(event, args):
        if event == 'open' and str(args[0]).endswith(path):
            raise error(args[0])
    sys.addaudithook(hook)


def io_error(path):
    return OSError(errno.EIO, 'I/O error', path)


@pytest.mark.parametrize('path', ['6/meta/metadata', '6/params/_METADATA', '6/val_loss.json'])
def test_an_error_that_says_nothing_about_a_checkpoint_stops_the_run(out_dir, capsys, path):
    (out_dir / path).touch()
    refusing(f'{out_dir}/{path}', io_error)
    for read_only in (True, False):
        with pytest.raises(UserError, match='cannot read .*6.*I/O error'):
            Checkpoints(out_dir, read_only).load('latest', abstract)
    assert 'damaged' not in capsys.readouterr().out and {'4', '6'} <= {*os.listdir(out_dir)}


def test_what_tensorstore_says_of_an_unreadable_file_is_not_damage(out_dir):
    data = max(files_of(out_dir / '6' / 'params'), key=os.path.getsize)
    data.unlink()
    data.symlink_to(data)  # an error of the file system for the owner of all files, too
    with pytest.raises(UserError, match='cannot read .*6: '):
        load(out_dir)


def test_a_folder_that_cannot_be_reached_is_not_damage(out_dir):
    params = out_dir / '6' / 'params'
    params.rename(out_dir / 'params')
    params.symlink_to(params)  # for orbax not there, as without permission
    with pytest.raises(UserError, match='cannot read .*6: '):
        load(out_dir)


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_a_run(out_dir, monkeypatch, capsys):
    def refuse(path):
        raise OSError(errno.ENOTEMPTY, 'Directory not empty', path)
    with Checkpoints(out_dir) as checkpoints:
        monkeypatch.setattr(epath.gpath.PosixGPath, 'rmtree', refuse)
        save(checkpoints, 8)
    assert 'WARNING: cannot delete' in capsys.readouterr().out and load(out_dir) == 8


def test_a_checkpoint_of_a_changed_model_is_not_called_damaged(out_dir):
    def without_b(meta):
        state = abstract(meta)
        del state['params']['b']
        return state
    def more_moments(meta):
        return abstract(meta) | {'nu': abstract(meta)['params']['b']}
    for changed, words in ((without_b, r'another model: the shape of b is \[9\] there and None'),
                           (more_moments, r'another optimizer: the shape of nu is None there')):
        with pytest.raises(UserError, match=words):
            Checkpoints(out_dir, read_only=True).load('latest', changed)


# -----------------------------------------------------------------------------
# what is saved, and where

def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_valid(out_dir):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(out_dir) as checkpoints:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            with pytest.raises(UserError, match='saving to .* failed.*checkpoint 6 is complete'):
                save(checkpoints, 8)
                checkpoints.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(out_dir) == 6
    with Checkpoints(out_dir) as checkpoints:
        save(checkpoints, 8)
    assert {*os.listdir(out_dir)} == {'4', '8'} and load(out_dir) == 8


NAME = '[x] %#?*{}:$\'"\t\n\N{LATIN SMALL LETTER E WITH ACUTE}'


def test_checkpoints_are_written_and_read_whatever_their_folder_is_called(out_dir, tmp_path):
    with Checkpoints(tmp_path / NAME / 'run') as checkpoints:
        save(checkpoints, 3)
        save(checkpoints, 5)
    assert load(tmp_path / NAME / 'run') == 5
    # a checkpoint of another folder is read here, and the other way round
    out_dir.rename(tmp_path / NAME / 'moved')
    (tmp_path / NAME / 'run').rename(out_dir)
    assert load(tmp_path / NAME / 'moved') == 6 and load(out_dir) == 5


def test_a_save_that_cannot_be_read_back_is_an_error_and_deletes_nothing(out_dir, monkeypatch):
    checkpoints = Checkpoints(out_dir)
    # orbax merges what its glob finds
    monkeypatch.setattr(epath.gpath.PosixGPath, 'glob', lambda self, pattern: iter([]))
    with pytest.raises(UserError, match='saving to .* failed.*checkpoint 6 is complete'):
        save(checkpoints, 8)
        checkpoints.close()
    assert {'4', '6'} < {*os.listdir(out_dir)}
    with pytest.raises(UserError, match='cannot save to .*other.*--out_dir'):
        Checkpoints(out_dir / 'other')


def test_what_others_wrote_is_never_renamed_deleted_or_counted(out_dir):
    (out_dir / '2024' / 'raw').mkdir(parents=True)
    (out_dir / '2024' / 'raw' / 'data.csv').write_text('1,2')
    shutil.copytree(out_dir, out_dir / '7')  # a run in this one
    shutil.copytree(out_dir / '4', out_dir / '3')  # of another project that uses Orbax
    (out_dir / '3' / 'meta' / 'metadata').write_text('{"step": 3}')
    shutil.copytree(out_dir / '3', out_dir / '5.orbax-checkpoint-tmp')
    others = [path for name in ('2024', '7', '3', '5.orbax-checkpoint-tmp')
              for path in files_of(out_dir / name)]
    (out_dir / '6' / 'meta' / 'metadata').write_text('{')
    with Checkpoints(out_dir) as checkpoints:
        assert checkpoints.steps() == [4, 6] and checkpoints.latest_meta()[0] == 4
        checkpoints.check_free(range(4))  # those before the latest do not matter
        checkpoints.check_free([4, 5, 6, 8])
        with pytest.raises(UserError, match='cannot save iteration 7: .*7 exists and was'):
            checkpoints.check_free(range(5, 9))
        with pytest.raises(UserError, match='7 already exists.*--out_dir'):
            save(checkpoints, 7)
        (out_dir / '8.orbax-checkpoint-tmp').mkdir()
        with pytest.raises(UserError, match='8.orbax-checkpoint-tmp already exists'):
            save(checkpoints, 8)
        (out_dir / '8.orbax-checkpoint-tmp').rmdir()
        for step in (8, 10):
            save(checkpoints, step)
    assert steps_on_disk(out_dir) == [4, 10] and all(path.exists() for path in others)
    with Checkpoints(out_dir / '2024') as checkpoints:
        save(checkpoints, 1)
    for other in ('2024/raw', '2024/1/params'):
        with pytest.raises(UserError, match='has no checkpoint of this project'):
            Checkpoints(out_dir / other, read_only=True)


def test_a_reader_beside_a_run_goes_on_with_what_replaced_its_checkpoint(out_dir, capsys):
    def replaced_meanwhile(meta):
        if (out_dir / '6').exists():
            shutil.copytree(out_dir / '6', out_dir / '8')
            shutil.rmtree(out_dir / '6')
            shutil.rmtree(out_dir / '4')
        return abstract(meta)
    assert Checkpoints(out_dir, read_only=True).load('latest', replaced_meanwhile).step == 8
    assert not capsys.readouterr().out


def test_validation_losses_are_compared_with_those_measured_alike(out_dir, capsys):
    easy = CONFIG | {'dataset': 'easy'}
    with Checkpoints(out_dir) as checkpoints:
        assert checkpoints.best_val_loss(CONFIG) == 1.0
        assert checkpoints.best_val_loss(easy) == 1e9
        assert 'another dataset; the best validation loss starts anew' in capsys.readouterr().out
        save(checkpoints, 8, 0.25, dataset='easy')
        assert 'checkpoint 8 is complete' in checkpoints.describe_valid()
        checkpoints.record_val_loss(8, 0.5, CONFIG)
        assert checkpoints.load('best', abstract).step == 8
        save(checkpoints, 10, 0.75)
        assert 'checkpoint 10 is complete' in checkpoints.describe_valid()
        assert checkpoints.best_val_loss(easy) == 0.25
        assert 'is from an earlier checkpoint with this one' in capsys.readouterr().out
        save(checkpoints, 12)
        assert checkpoints.load('best', abstract).step == 8
        assert checkpoints.best_val_loss(CONFIG) == 0.5
    assert steps_on_disk(out_dir) == [8, 12]


def test_processes_choose_the_same_checkpoint(out_dir):
    code = textwrap.dedent(f'''
        import os, sys
        sys.path[:0] = [{os.path.dirname(__file__)!r}]
        from nanogpt_jax.errors import report_user_error
        from nanogpt_jax.launch import start_processes
        sys.excepthook = report_user_error
        rank = start_processes('cpu', 20)
        import test_survival as t
        def load():
            with t.Checkpoints({str(out_dir)!r}) as checkpoints:
                print(checkpoints.load('latest', t.abstract).step, file=sys.stderr)
        if rank == 1:
            t.refusing('6/meta/metadata', t.io_error)
        load()
        if rank == 1:
            t.refusing('6/params/_METADATA', lambda path: ValueError('DATA_LOSS: changed'))
        load()
        if rank == 1:
            t.refusing('4/params/_METADATA', t.io_error)
        load()
    ''')
    results = [finish(process) for process in start_processes(out_dir.parent, 2, code, script='-c')]
    steps = [re.findall('^[0-9]+$', result.stderr, re.M) for result in results]
    assert steps == [['6', '4']] * 2, results
    assert 'is damaged: ValueError: DATA_LOSS: changed' in results[0].stdout
    assert 'I/O error' in results[1].stderr and all(result.returncode for result in results)
    assert {*os.listdir(out_dir)} == {'4', '6'}


# -----------------------------------------------------------------------------
# a loss that is not finite

def test_processes_without_a_common_out_dir_are_refused(out_dir, monkeypatch):
    monkeypatch.setattr(checkpoint, 'gather', lambda value: [value, value and False])
    with pytest.raises(UserError, match='process 1 does not see .* process 0 .*out_jax: give all'):
        Checkpoints(out_dir)


def test_a_loss_that_is_not_finite_is_one_line_with_the_checkpoint_to_resume_from(out_dir):
    with Checkpoints(out_dir) as checkpoints:
        save(checkpoints, 8)
        utils.check_finite(9, {'loss': 1.0}, checkpoints)
        with pytest.raises(UserError, match='not a finite number.*checkpoint 8.*--learning_rate'):
            utils.check_finite(9, {'loss': float('nan')}, checkpoints)


# -----------------------------------------------------------------------------
# host memory and open files

@pytest.mark.slow
def test_host_memory_and_open_files_do_not_grow(folder):
    if not os.path.exists('/proc/self/statm'):
        pytest.skip('resident memory is read from /proc')
    steps = int(os.environ.get('MEMORY_STEPS', 2000))  # 20000 by hand
    result = run(folder, '-c', patched('''
        import atexit, os
        import jax_train_utils as utils
        train, sizes, files = utils.Batches.train, [], []
        def counted(self, iter_num):
            with open("/proc/self/statm") as f:
                sizes.append(int(f.read().split()[1]) * 4096)
            if len(sizes) % 200 == 150:
                files.append(len(os.listdir("/proc/self/fd")))
            return train(self, iter_num)
        utils.Batches.train = counted
        def report():
            print("grown by", [sizes[i + 200] - sizes[i]
                               for i in range(200, len(sizes) - 200, 200)])
            print("open files", files)
        atexit.register(report)
    '''), *TINY, f'--max_iters={steps}', '--eval_interval=200', '--log_interval=100',
        '--batch_size=64', '--n_embd=8', **OPTIMIZED)
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
