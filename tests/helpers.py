"""What the tests share: a folder with a small data set, and ways to run the scripts in it."""

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import jax_train_utils as utils
from jax_transformer import GPTConfig
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.run_dir import release_out_dir
from nanogpt_jax.sharding import make_mesh

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# a model that trains in milliseconds; every run of these tests starts from these flags, and so ends
# soon where it should have been refused
TINY = ['--dataset=tiny', '--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=32',
        '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=2',
        '--eval_interval=4', '--max_iters=20', '--warmup_iters=2', '--lr_decay_iters=20',
        '--learning_rate=1e-2', '--min_lr=1e-3']

# runs compile without most of XLA's optimizations, in half the time, unless OPTIMIZED is given:
# what they claim does not depend on them
ENV = {'JAX_COMPILATION_CACHE_DIR': os.environ.get('JAX_COMPILATION_CACHE_DIR', ''),
       'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
       'JAX_DISABLE_MOST_OPTIMIZATIONS': 'True'}
OPTIMIZED = {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'False'}

TRAIN = [sys.executable, os.path.join(ROOT, 'train_jax.py')]
# conftest.py restricts each of pytest-xdist's workers to one; processes that wait for each other
# get all of them, as those that wait would keep the others from it
ALL_CORES = [int(core) for core in os.environ.get('TESTS_CORES', '').split(',') if core]
ITER = re.compile(
    r'^iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d{2})ms, mfu (-?\d+\.\d{2}|nan)%$', re.M)
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
# runs as processes

def run(folder, script, *args, stdin=None, **env):
    """The finished process of a script, or of a module such as tools.plot, started in folder."""
    if is_module(script):
        command = ['-m', script]
        env['PYTHONPATH'] = os.pathsep.join([ROOT, env.get('PYTHONPATH', '')]).strip(os.pathsep)
    else:
        command = [os.path.join(ROOT, script)]
    return finish(start(folder, *command, *args, stdin=stdin, **env))


def start(folder, *command, stdin=None, cores=None, **env):
    """A started Python process, used like subprocess.Popen.

    command: a script, -m and a module, or -c and code, with arguments, as python takes them; the
    variables of ENV and env are added to the environment. On Linux it is a fork of a process that
    has imported JAX already. For an interpreter that starts from nothing use subprocess.
    """
    with tempfile.TemporaryFile() as file:
        file.write((stdin or '').encode())
        file.seek(0)
        process = Forked if sys.platform == 'linux' else Started
        return process([*map(str, command)], str(folder), file, os.environ | ENV | env, cores)


def finish(process, timeout=300):
    """The subprocess.CompletedProcess of a started process, which is killed after the timeout."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Started(subprocess.Popen):
    """A new interpreter."""

    def __init__(self, command, folder, stdin, env, cores):
        super().__init__([sys.executable, *command], cwd=folder, stdin=stdin, env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@functools.cache
def fork_server():
    """The socket of forkserver.py; each process of pytest starts its own when it needs one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, 'tests', 'forkserver.py'), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            env=os.environ | ENV | {'OPENBLAS_NUM_THREADS': '1'})  # threads do not survive a fork
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


class Forked:
    """A fork of forkserver.py, with what the tests use of subprocess.Popen."""

    def __init__(self, command, folder, stdin, env, cores):
        self.args, self.returncode = command, None
        request = dict(command=command, folder=folder, env=env,
                       cores=sorted(cores or os.sched_getaffinity(0)))
        out, out_end = os.pipe()
        report, report_end = os.pipe()
        with tempfile.NamedTemporaryFile('a') as err:  # a file: nobody need read it meanwhile
            socket.send_fds(fork_server(), [json.dumps(request).encode()],
                            [stdin.fileno(), out_end, err.fileno(), report_end])
            self.stderr = open(err.name)
        os.close(out_end)
        os.close(report_end)
        self.stdout, self.report = open(out), open(report)
        self.pid = int(self.report.readline())

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)

    def wait(self):
        if self.returncode is None:
            self.returncode = int(self.report.readline())
        return self.returncode

    def communicate(self, timeout=300):
        """(stdout, stderr) that were not read yet, of a process that is killed after the timeout,
        so that its exit code is not the expected one and what it printed is shown."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout, self.stderr, self.report:
            out, _ = self.stdout.read(), self.wait()
            timer.cancel()
            return out, self.stderr.read()


def is_module(script):
    return not str(script).endswith('.py')


def train(folder, *args, devices=1, **env):
    """stdout of a training run that must succeed, on 1 or more CPU devices; inside this process if
    nothing differs from it."""
    if devices > 1:
        env['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
    result = (run if env else run_inside)(folder, 'train_jax.py', *TINY, *args, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def start_processes(folder, n, *args, devices=1, command=TRAIN, launcher='by hand', **env):
    """Start the n processes of one training run, with `devices` devices each.

    launcher: with the variables to set 'by hand', or with those that 'torchrun' sets.
    """
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = str(s.getsockname()[1])
    env |= {'PYTHONPATH': ROOT, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
    if launcher == 'torchrun':
        env |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': port, 'LOCAL_WORLD_SIZE': str(n)}
        index, count = ('RANK', 'LOCAL_RANK'), 'WORLD_SIZE'
    else:
        env |= {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}'}
        index, count = ('JAX_PROCESS_ID',), 'JAX_NUM_PROCESSES'
    env[count] = str(n)
    return [start(folder, *command[1:], *args, cores=ALL_CORES, **env,
                  **{name: str(i) for name in index})
            for i in range(n)]


def run_processes(folder, n, *args, devices=1, **kwargs):
    """stdout of the first of n processes of a training run that must succeed."""
    started = start_processes(folder, n, *args, devices=devices, **kwargs)
    results = [finish(process) for process in started]
    assert [result.returncode for result in results] == [0] * n, results
    return results[0].stdout


# -----------------------------------------------------------------------------
# runs inside this process

def run_inside(folder, script, *args, stdin=None, **env):
    """Like run, without starting a process and importing JAX again: for mistakes and short runs.

    Not for runs that depend on what is read once per process (XLA_FLAGS, JAX_PLATFORMS,
    PYTHONPATH) or that send output from C++. Returns a subprocess.CompletedProcess.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
    err = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', errors='backslashreplace')
    with process_state_restored():
        os.chdir(folder)
        os.environ.update(ENV | env)
        sys.argv = [str(script), *map(str, args)]
        sys.stdin = io.TextIOWrapper(io.BytesIO((stdin or '').encode()), encoding='utf-8')
        sys.stdout = sys.__stdout__ = out  # configurator.py prints --help to __stdout__
        sys.stderr = err
        jax.config.update('jax_compilation_cache_dir', ENV['JAX_COMPILATION_CACHE_DIR'])
        jax.config.update('jax_disable_most_optimizations', True)
        reset_cache()
        code = run_main(script)
        out.flush()
        err.flush()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess([script, *args], code, *texts)


def run_main(script):
    """Run a script as __main__; returns the exit code that its process would have."""
    try:
        if is_module(script):
            runpy.run_module(script, run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return 1 if isinstance(e.code, str) else int(e.code or 0)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        return 130 if isinstance(e, KeyboardInterrupt) else 1
    return 0


@contextlib.contextmanager
def process_state_restored():
    """A context that undoes what a script changes in its process."""
    folder, environ, path = os.getcwd(), dict(os.environ), list(sys.path)
    names = ('argv', 'stdin', 'stdout', 'stderr', '__stdout__', 'excepthook', 'unraisablehook')
    attributes = {name: getattr(sys, name) for name in names}
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    absl_level = logging.getLogger('absl').level
    jax_settings = dict(jax.config.values)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        release_out_dir()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:] = path
        for name, value in attributes.items():
            setattr(sys, name, value)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        logging.getLogger('absl').setLevel(absl_level)
        for name, value in jax.config.values.items():
            if value != jax_settings[name]:
                jax.config.update(name, jax_settings[name])
        reset_cache()


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


def saved(folder, out_dir, step):
    """(training state, meta) of a checkpoint, as numpy arrays."""
    _, meta, state = Checkpoints(folder / out_dir, read_only=True).load(str(step), abstract_state)
    return jax.tree.map(np.array, state), meta


def abstract_state(meta):
    """The training state that a checkpoint with this meta holds, on one device."""
    tx = utils.create_optimizer(lambda it: 0.0, 0.1, (0.9, 0.95), 1.0)
    mesh = make_mesh(jax.devices()[:1])
    return utils.abstract_train_state(GPTConfig.from_model_args(meta['model_args']), tx, mesh)
