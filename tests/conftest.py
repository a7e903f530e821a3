"""What the tests of whole runs share: a folder with small data, and the scripts run in it as a user runs them."""

import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import jax_train_utils as utils
from jax_checkpoint import Checkpoints
from jax_transformer import GPTConfig

# a model that trains in milliseconds; every run of these tests starts from this
TINY = ['--dataset=tiny', '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4',
        '--gradient_accumulation_steps=2', '--eval_iters=2', '--eval_interval=4', '--warmup_iters=2', '--lr_decay_iters=20',
        '--learning_rate=1e-2', '--min_lr=1e-3']

# the runs share what they compile, which is most of their time
COMPILED = tempfile.TemporaryDirectory()
CACHE = {'JAX_COMPILATION_CACHE_DIR': COMPILED.name, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

TRAIN = [sys.executable, os.path.join(ROOT, 'train_jax.py')]
ITER = re.compile(r'^iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d{2})ms, mfu (-?\d+\.\d{2})%$', re.M)
STEP = re.compile(r'^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$', re.M)


@pytest.fixture
def folder(tmp_path):
    return with_data(tmp_path)


def with_data(folder):
    """A working directory with data/tiny, a character data set of 20 letters that repeat with noise."""
    data = folder / 'data' / 'tiny'
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = (np.arange(4000) + rng.integers(2, size=4000)) % 20
    ids[:3600].astype(np.uint16).tofile(data / 'train.bin')
    ids[3600:].astype(np.uint16).tofile(data / 'val.bin')
    chars = 'abcdefghijklmnopqrs\n'
    meta = {'vocab_size': 20, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


def run(folder, script, *args, stdin=None, **env):
    """The finished process of a script, run in folder, with a text as its standard input."""
    return subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, args)], cwd=folder, capture_output=True,
                          input=stdin, text=True, env=os.environ | CACHE | env, timeout=300)


def train(folder, *args, **env):
    """stdout of a training run that must succeed."""
    result = run(folder, 'train_jax.py', *TINY, *args, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def start_processes(folder, n, *args, devices=1, command=TRAIN):
    """n running processes of one training run, with so many devices each."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    env = os.environ | CACHE | {'PYTHONPATH': ROOT, 'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(n),
                                'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
    return [subprocess.Popen([*command, *args], cwd=folder, env=env | {'JAX_PROCESS_ID': str(i)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(n)]


def run_processes(folder, n, *args, devices=1):
    """stdout of the first of n processes of a training run that must succeed."""
    started = start_processes(folder, n, *args, devices=devices)
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * n, outputs
    return outputs[0][0]


def one_line_error(result, *words):
    """A user's mistake: one line with these words is the last on stderr, no traceback before it, and exit code 1."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:], result.stderr
    assert 'Traceback' not in result.stderr, result.stderr
    for word in words:
        assert word in lines[-1]


def saved(folder, out_dir, step):
    """(training state, meta) of a checkpoint, as numpy arrays."""
    checkpoints = Checkpoints(folder / out_dir, read_only=True)
    meta = checkpoints.meta(step)
    tx = utils.create_optimizer(lambda it: 0.0, 0.1, (0.9, 0.95), 1.0)
    state = checkpoints.state(step, GPTConfig(**meta['model_args']), tx, utils.make_mesh(jax.devices()[:1]))
    return jax.tree.map(np.array, state), meta
