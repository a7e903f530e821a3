"""What the tests share: a folder with a small data set, and ways to run the scripts in it."""

import os
import pickle
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import optax

import jax_train_utils as utils
from jax_transformer import GPTConfig, model_args
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.sharding import make_mesh
from test_jax_transformer import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# a model that trains in milliseconds; every run of these tests starts from these flags, and so ends
# soon where it should have been refused
TINY = ['--dataset=tiny', '--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=32',
        '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=2',
        '--eval_interval=4', '--max_iters=20', '--warmup_iters=2', '--lr_decay_iters=20',
        '--learning_rate=1e-2', '--min_lr=1e-3']
RESUME = ['--init_from=resume', '--device=cpu']

# runs compile without most of XLA's optimizations, in half the time, unless OPTIMIZED is given:
# what they claim does not depend on them
# and on one device, while pytest's own process has eight (conftest.py)
ENV = {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'True', 'PYTHONPATH': ROOT, 'XLA_FLAGS': ''}
OPTIMIZED = {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'False'}

# conftest.py restricts each of pytest-xdist's workers to one; processes that wait for each other
# get all of them, as those that wait would keep the others from it
ALL_CORES = [int(core) for core in os.environ.get('TESTS_CORES', '').split(',') if core]
ITER = re.compile(
    r'^iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d{2})ms, mfu (-?\d+\.\d{2})%$', re.M)
STEP = re.compile(r'^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$', re.M)


def with_data(folder):
    """Write data/tiny into folder, a data set of 20 characters in a noisy cycle; returns folder."""
    data = folder / 'data' / 'tiny'
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = (np.arange(4000) + rng.integers(2, size=4000)) % 20
    ids[:3600].astype(np.uint16).tofile(data / 'train.bin')
    ids[3600:].astype(np.uint16).tofile(data / 'val.bin')
    chars = 'abcdefghijklmnopqrs\n'
    meta = {'vocab_size': 20, 'itos': dict(enumerate(chars)),
            'stoi': {c: i for i, c in enumerate(chars)}}
    (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


# -----------------------------------------------------------------------------
# runs

def start(folder, script, *args, devices=1, **env):
    """A started script, or a module such as tools.plot, or code after -c: a subprocess.Popen.

    devices: of the CPU, for JAX.
    """
    if devices > 1:
        env['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
    what = ([os.path.join(ROOT, script)] if script.endswith('.py') else
            [script] if script == '-c' else ['-m', script])
    return subprocess.Popen(
        [sys.executable, *what, *map(str, args)], cwd=folder, env=os.environ | ENV | env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, stdin=None, timeout=300):
    """The subprocess.CompletedProcess of a started script, killed after so many seconds."""
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(folder, script, *args, stdin=None, **kwargs):
    return finish(start(folder, script, *args, **kwargs), stdin)


def train(folder, *args, **kwargs):
    """stdout of a training run that must succeed."""
    result = run(folder, 'train_jax.py', *TINY, *args, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def resume(folder, *args, **kwargs):
    """stdout of a resumed run that must succeed."""
    result = run(folder, 'train_jax.py', *RESUME, *args, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# for code after -c: run(script, flag, ...) several times in one process, which imports JAX once
RUN = f'''
import runpy, sys
stdout = sys.stdout
def run(script, *args):
    sys.argv, sys.stdout = [script, *args], stdout
    try:
        runpy.run_path({ROOT!r} + '/' + script, run_name='__main__')
    except SystemExit as e:
        assert not e.code, e.code
'''


def start_processes(folder, n, *args, launcher='by hand', script='train_jax.py', **kwargs):
    """Start the n processes of one training run; kwargs as of start.

    launcher: with the variables to set 'by hand', or with those that 'torchrun' sets. script: or
    '-c', with the code as the first of args.
    """
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = str(s.getsockname()[1])
    if launcher == 'torchrun':
        env = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': port, 'LOCAL_WORLD_SIZE': str(n)}
        index, count = ('RANK', 'LOCAL_RANK'), 'WORLD_SIZE'
    else:
        env = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}'}
        index, count = ('JAX_PROCESS_ID',), 'JAX_NUM_PROCESSES'
    started = [start(folder, script, *args, **{count: str(n)}, **env, **kwargs,
                     **{name: str(i) for name in index}) for i in range(n)]
    for process in started if ALL_CORES else ():
        os.sched_setaffinity(process.pid, ALL_CORES)
    return started


def run_processes(folder, n, *args, **kwargs):
    """stdout of the first of n processes of a training run that must succeed."""
    results = [finish(process) for process in start_processes(folder, n, *args, **kwargs)]
    assert [result.returncode for result in results] == [0] * n, results
    return results[0].stdout


# -----------------------------------------------------------------------------
# what runs leave

def one_line_error(result, *words, alone=False):
    """Assert that a run ended by a user's mistake: exit code 1, and as the last line on stderr the
    only one that starts with 'error: ', with these words and without a traceback before it.

    alone: nothing else is on stderr.
    """
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:], result.stderr
    assert 'Traceback' not in result.stderr, result.stderr
    assert not alone or len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[-1], result.stderr


def save_model(folder, config, chars):
    """Write a checkpoint with the random weights of test_jax_transformer.tiny into out_jax."""
    state = utils.create_train_state(tiny(**model_args(config)), optax.identity())
    with Checkpoints(folder / 'out_jax') as checkpoints:
        checkpoints.save(state, dict(iter_num=1, best_val_loss=1.0, model_args=model_args(config),
                                     config={'always_save_checkpoint': True}, chars=chars))


def saved(folder, out_dir, step):
    """(training state, meta) of a checkpoint, as numpy arrays."""
    _, meta, state = Checkpoints(folder / out_dir, read_only=True).load(str(step), abstract_state)
    return jax.tree.map(np.array, state), meta


def abstract_state(meta):
    """The training state that a checkpoint with this meta holds, on one device."""
    tx = utils.create_optimizer(lambda it: 0.0, 0.1, (0.9, 0.95), 1.0)
    mesh = make_mesh(jax.devices()[:1])
    return utils.abstract_train_state(GPTConfig.from_model_args(meta['model_args']), tx, mesh)
