"""Launchers and Cloud TPUs, signals to several processes, and what scripts print."""

import builtins
import glob
import importlib.util
import io
import os
import signal
import socket
import sys
import textwrap
import threading

import jax
import pytest
from helpers import ROOT, TINY, finish, run, start_processes

from nanogpt_jax import errors, launch


@pytest.fixture
def initialized(monkeypatch):
    """A list that gets the arguments of each call of jax.distributed.initialize, now a stub."""
    calls = []

    def initialize(**kwargs):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # Ctrl-C ends the wait
        calls.append({name: value for name, value in kwargs.items() if 'timeout' not in name})
    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    for function in ('silence_other_processes', 'end_with_others', 'stop_watching'):
        monkeypatch.setattr(launch, function, lambda rank: None)
    monkeypatch.setattr(errors, 'process_label', '')
    return calls


def use(monkeypatch, env):
    """Set these environment variables, and remove all others about processes."""
    for name in os.environ:
        if name.startswith(('JAX_COORD', 'JAX_NUM', 'JAX_PROC', 'SLURM', 'OMPI', 'TPU_',
                            'MEGASCALE', 'RANK', 'WORLD_SIZE', 'LOCAL_', 'MASTER_')):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


# -----------------------------------------------------------------------------
# launchers

@pytest.mark.parametrize('env, words', [
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, "'2'.*index of this one, from 0"),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0', 'JAX_COORDINATOR_ADDRESS': 'node1'},
     "node1:1234.*'node1'"),
    ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'node1'}, "MASTER_PORT .here ''.*torchrun")])
def test_wrong_process_variables_are_refused(monkeypatch, initialized, env, words):
    use(monkeypatch, env)
    with pytest.raises(errors.UserError, match=words):
        launch.start_processes('cpu', 100)
    with pytest.raises(errors.UserError, match='heartbeat_timeout is 0; .*at least 1'):
        launch.start_processes('cpu', 0)
    assert not initialized


TORCHRUN = {'RANK': '9', 'LOCAL_RANK': '1', 'WORLD_SIZE': '16', 'LOCAL_WORLD_SIZE': '8',
            'MASTER_ADDR': 'node0', 'MASTER_PORT': '29500'}


@pytest.mark.parametrize('env, address, local_device_ids', [
    ({}, 'node0:24500', [1]),  # MASTER_PORT is torchrun's own
    ({'MASTER_PORT': '60999'}, 'node0:25999', [1]),
    ({'JAX_COORDINATOR_PORT': '1234'}, 'node0:1234', [1]),
    ({'LOCAL_WORLD_SIZE': '1', 'LOCAL_RANK': '0'}, 'node0:24500', None)])  # all GPUs of its machine
def test_torchruns_processes_become_one_run(monkeypatch, initialized, env, address,
                                            local_device_ids):
    use(monkeypatch, TORCHRUN | env)
    assert launch.start_processes('auto', 100) == 9
    assert initialized == [dict(
        coordinator_address=address, num_processes=16, process_id=9,
        local_device_ids=local_device_ids, cluster_detection_method='deactivate')]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert errors.process_label == ' in process 9'
    use(monkeypatch, {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1'})  # a run alone
    assert launch.start_processes('auto', 100) == 0 and len(initialized) == 1


def test_a_port_in_use_is_refused(monkeypatch, initialized):
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
        use(monkeypatch, TORCHRUN | {'RANK': '0', 'JAX_COORDINATOR_PORT': str(port)})
        with pytest.raises(errors.UserError, match=f'port {port}.*JAX_COORDINATOR_PORT'):
            launch.start_processes('auto', 100)
    assert not initialized


def test_processes_cannot_be_connected_once_jax_is_in_use(monkeypatch):
    use(monkeypatch, TORCHRUN)
    jax.devices()
    with pytest.raises(errors.UserError, match='before JAX is used.*not inside a notebook'):
        launch.start_processes('auto', 100)


@pytest.mark.slow
@pytest.mark.parametrize('rank', ['0', '1'])
def test_a_missing_process_costs_the_heartbeat_timeout_and_one_line(folder, rank):
    with socket.create_server(('', 0)) as server:
        processes = f'2 processes at localhost:{server.getsockname()[1]}'
    result = run(folder, 'train_jax.py', *TINY, '--heartbeat_timeout=2', JAX_PROCESS_ID=rank,
                 JAX_NUM_PROCESSES='2', JAX_COORDINATOR_ADDRESS=processes.split()[-1])
    assert result.returncode == 1, result.stderr
    line, = result.stderr.splitlines()
    assert line.startswith(f'error in process {rank}: waited 2 s (--heartbeat_timeout) for '
                           f'{processes}, and some did not connect')
    assert (f'waiting for {processes}\n' in result.stdout) == (rank == '0')


ONE_FAILS = """
import sys, time
from nanogpt_jax.errors import UserError, report_user_error
from nanogpt_jax.launch import start_processes
sys.excepthook = report_user_error
if start_processes('cpu', 100) == FAILS:
    raise UserError('another run is writing to out')
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize('fails', [0, 1])
def test_an_error_of_one_process_ends_each_of_them_in_one_line(fails):
    started = start_processes(ROOT, 2, ONE_FAILS.replace('FAILS', str(fails)), script='-c')
    results = [finish(process, timeout=60) for process in started]
    assert [result.returncode for result in results] == [1, 1], results
    assert results[fails].stderr == f'error in process {fails}: another run is writing to out\n'
    assert results[1 - fails].stderr == (
        f'error in process {1 - fails}: stopped, because of the error in process {fails}\n')


# -----------------------------------------------------------------------------
# Cloud TPU

POD = 't1v-n-0-w-0:0:10.0.0.1,t1v-n-0-w-1:1:10.0.0.2'  # worker-network-endpoints of two workers


@pytest.mark.parametrize('env, metadata, several', [
    # Colab: no variables, no metadata server
    ({}, {}, False), ({'TPU_SKIP_MDS_QUERY': '1'}, {'worker-network-endpoints': POD}, False),
    ({'TPU_PROCESS_ADDRESSES': 'local'}, {'worker-network-endpoints': POD}, False),  # Kaggle
    # Google Compute Engine: one host, two hosts, two slices of one host
    ({}, {'worker-network-endpoints': '10.0.0.1', 'tpu-env': "ZONE: 'us-central2-b'"}, False),
    ({}, {'worker-network-endpoints': POD}, True),
    ({}, {'worker-network-endpoints': '10.0.0.1',
          'tpu-env': "ZONE: 'us-east5-a'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
    # Kubernetes Engine: a slice of several hosts, two slices of one
    ({'TPU_WORKER_HOSTNAMES': 'tpu-0.svc,tpu-1.svc', 'TPU_WORKER_ID': '1'}, {}, True),
    ({'TPU_PROCESS_ADDRESSES': 'a:8476,b:8476', 'TPU_WORKER_HOSTNAMES': 'a'}, {}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '0',
      'MEGASCALE_COORDINATOR_ADDRESS': 'job-0.svc'}, {}, True)])
def test_only_a_tpu_with_several_workers_is_initialized_as_several_processes(
        monkeypatch, initialized, env, metadata, several):
    use(monkeypatch, env)
    monkeypatch.setattr(launch, 'has_tpu', lambda device: True)
    monkeypatch.setattr(launch, 'gce_metadata', lambda key: metadata.get(key, ''))
    assert launch.start_processes('auto', 100) == 0
    assert initialized == [{}] * several


def test_the_workers_of_a_tpu_are_read_from_a_file_and_none_without_a_server(monkeypatch, tmp_path):
    use(monkeypatch, {'TPU_PROCESS_ADDRESSES_PATH': str(tmp_path / 'a'),
                      'TPU_PROCESS_ADDRESSES': 'a,b'})
    (tmp_path / 'a').write_text('a:8476\n')
    assert not launch.has_tpu_workers()
    with socket.create_server(('127.0.0.1', 0)) as server:
        address = f'127.0.0.1:{server.getsockname()[1]}'
    monkeypatch.setenv('GCE_METADATA_IP', address)  # the server is closed
    assert launch.gce_metadata('tpu-env') == ''


@pytest.mark.parametrize('device, nodes, want', [
    ('auto', ['/dev/accel0'], True), ('tpu', ['/dev/vfio/0', '/dev/vfio/vfio'], True),
    ('cpu', ['/dev/accel0'], False),
    ('auto', ['/dev/vfio/vfio'], False), ('auto', ['/dev/accel'], False)])
def test_a_tpu_is_recognized_by_its_chips(monkeypatch, device, nodes, want):
    import fnmatch
    monkeypatch.setattr(glob, 'glob', lambda pattern: fnmatch.filter(nodes, pattern))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'libtpu')
    assert launch.has_tpu(device) is want


# -----------------------------------------------------------------------------
# stopping

COMPUTES_FOR_EVER = """
import sys
import jax
from nanogpt_jax.launch import start_processes
from nanogpt_jax.signals import StopRequest
start_processes('cpu', 100)
stop = StopRequest()
for_ever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: -x, x))
for_ever = for_ever.lower(1).compile()
print('ready', file=sys.stderr, flush=True)
jax.block_until_ready(for_ever(1))
"""


@pytest.mark.slow
def test_the_first_process_announces_a_signal_to_another_and_a_second_one_ends_each_at_once():
    started = start_processes(ROOT, 2, COMPUTES_FOR_EVER, script='-c')
    kill = threading.Timer(60, lambda: [process.kill() for process in started])
    kill.start()
    for process in started:
        while process.stderr.readline() != 'ready\n':
            assert kill.is_alive()
    started[1].send_signal(signal.SIGTERM)
    assert started[0].stdout.readline().startswith('waiting for 2 processes')
    assert started[0].stdout.readline() == (
        'SIGTERM: stopping after this step; press again to stop now, without saving\n')
    started[1].send_signal(signal.SIGTERM)
    assert finish(started[1]).returncode == 128 + signal.SIGTERM
    for signum in (signal.SIGINT, signal.SIGTERM):  # the kernel merges two of a kind
        started[0].send_signal(signum)
    assert finish(started[0]).returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    kill.cancel()


# -----------------------------------------------------------------------------
# what is printed

GLOO = 'UNKNOWN: Gloo AllGather failed: pair.cc:547] Connection closed by peer [10.0.0.1]:5'
CALLBACK = 'INTERNAL: CpuCallback error: Traceback: ZeroDivisionError: division by zero'
OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.'


@pytest.mark.parametrize('kind, text, words', [
    (jax.errors.JaxRuntimeError, GLOO, ['lost the connection', '--init_from=resume']),
    (ValueError, GLOO, ['lost the connection']),  # while it loads
    (jax.errors.JaxRuntimeError, CALLBACK, ['JaxRuntimeError: INTERNAL: CpuCallback']),
    (jax.errors.JaxRuntimeError, OUT_OF_MEMORY, ['allocating 99', 'smaller --batch_size']),
    (MemoryError, 'a tokenizer', ['out of memory (a tokenizer)'])])
def test_an_error_of_one_process_is_reported_by_its_cause(monkeypatch, capsys, kind, text, words):
    ended = []
    monkeypatch.setattr(os, '_exit', ended.append)
    monkeypatch.setattr(errors, 'process_label', ' in process 1')
    errors.report_user_error(kind, kind(text), None)
    err = capsys.readouterr().err
    assert ended == [1] and all(word in err for word in words), err
    for hint in ('lost the connection', 'smaller --batch_size'):
        assert (hint in err) == any(hint in word for word in words), err
    assert not issubclass(errors.UserError, ValueError)


class NotebookStream(io.StringIO):
    """A kernel's stream: it cannot be reconfigured, and has no file."""
    reconfigure = property()


@pytest.mark.slow
def test_scripts_leave_the_streams_of_a_notebook_as_they_are(folder):
    script = textwrap.dedent("""
        import os, runpy, signal, sys
        from test_launch import NotebookStream
        wakeup_fd = os.pipe2(os.O_NONBLOCK)[1]
        signal.set_wakeup_fd(wakeup_fd)  # as the kernel's asyncio does
        stdout, stderr = sys.stdout, sys.stderr = NotebookStream(), NotebookStream()
        def run(script, *args):
            sys.argv = [script, '--device=cpu', *args]
            try:
                runpy.run_path(f'ROOT/{script}', run_name='__main__')
            except SystemExit as e:
                assert not e.code
            assert sys.stdout is stdout and sys.stderr is stderr
            sys.__stdout__.write(stdout.getvalue())
            stdout.truncate(0)
        run('train_jax.py', *sys.argv[1:])
        run('sample_jax.py', '--num_samples=1', '--max_new_tokens=3', '--start=abc')
        assert signal.set_wakeup_fd(-1) == wakeup_fd
    """).replace('ROOT', ROOT)
    path = os.pathsep.join([ROOT, os.path.join(ROOT, 'tests')])
    result = run(folder, '-c', script, *TINY, '--max_iters=2', PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert 'iter 2: loss' in result.stdout and '\nabc' in result.stdout


def test_ipython_in_a_terminal_keeps_its_streams(monkeypatch):
    monkeypatch.setattr(builtins, '__IPYTHON__', True, raising=False)
    monkeypatch.setattr(sys, 'stdout', stdout := io.TextIOWrapper(io.BytesIO()))
    launch.keep_stdout_open()
    assert launch.keep_stdout_for_samples() is stdout is sys.stdout
