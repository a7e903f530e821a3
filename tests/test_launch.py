"""How the processes of a run find each other: by a launcher's variables, or on a Cloud TPU."""

import glob
import importlib.util
import os
import socket

import jax
import pytest
from helpers import TINY, one_line_error, run_inside

from nanogpt_jax import errors, launch


@pytest.fixture
def initialized(monkeypatch):
    """The arguments of the calls of jax.distributed.initialize, which does nothing else here."""
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(launch, 'silence_other_processes', lambda rank: None)
    monkeypatch.setattr(errors, 'process_label', '')
    return calls


def use(monkeypatch, env):
    """Set these environment variables, and none else that says something about processes."""
    for name in os.environ:
        if name.startswith(('JAX_COORD', 'JAX_NUM', 'JAX_PROC', 'SLURM', 'OMPI', 'TPU_',
                            'MEGASCALE', 'RANK', 'WORLD_SIZE', 'LOCAL_', 'MASTER_')):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


# -----------------------------------------------------------------------------
# launchers

@pytest.mark.parametrize('env, words', [
    ({'JAX_NUM_PROCESSES': 'two', 'JAX_PROCESS_ID': '0'}, ["'two'"]),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, ["'2'", 'index of this one, from 0']),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}, ['JAX_COORDINATOR_ADDRESS', "''"]),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0', 'JAX_COORDINATOR_ADDRESS': 'node1'},
     ["'node1'", 'node1:1234']),
    ({'WORLD_SIZE': '2', 'RANK': '2'}, ["WORLD_SIZE is '2'", "RANK is '2'"]),
    ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'node1'},
     ['MASTER_PORT', "''", 'torchrun', 'JAX_README.md'])])
def test_wrong_process_variables_are_refused(folder, env, words):
    one_line_error(run_inside(folder, 'train_jax.py', *TINY, **env), *words)


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
        local_device_ids=local_device_ids, cluster_detection_method='deactivate',
        heartbeat_timeout_seconds=100)]
    assert errors.process_label == ' in process 9'


def test_a_single_process_of_torchrun_is_a_run_alone(monkeypatch, initialized):
    use(monkeypatch, {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1'})
    assert launch.start_processes('auto', 100) == 0 and not initialized


def test_a_port_at_which_something_listens_is_refused(monkeypatch, initialized):
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
        use(monkeypatch, TORCHRUN | {'RANK': '0', 'JAX_COORDINATOR_PORT': str(port)})
        with pytest.raises(errors.UserError, match=f'port {port}.*JAX_COORDINATOR_PORT'):
            launch.start_processes('auto', 100)
    assert not initialized


def test_processes_cannot_be_connected_once_jax_is_in_use(folder):
    jax.devices()
    env = TORCHRUN | {'RANK': '0', 'MASTER_ADDR': 'localhost'}
    one_line_error(run_inside(folder, 'train_jax.py', *TINY, **env),
                   'before JAX is used', 'not inside a notebook')
    assert not (folder / 'out_jax').exists()


# -----------------------------------------------------------------------------
# Cloud TPU

POD = 't1v-n-0-w-0:0:10.0.0.1,t1v-n-0-w-1:1:10.0.0.2'  # worker-network-endpoints of two workers


@pytest.mark.parametrize('env, metadata, several', [
    # Colab: no variables, no metadata server
    ({}, {}, False), ({'TPU_SKIP_MDS_QUERY': '1'}, {'worker-network-endpoints': POD}, False),
    ({'TPU_PROCESS_ADDRESSES': 'local'}, {'worker-network-endpoints': POD}, False),  # Kaggle
    # Google Compute Engine: one host, four hosts in either form, two slices of one host
    ({}, {'worker-network-endpoints': '10.0.0.1', 'tpu-env': "ZONE: 'us-central2-b'"}, False),
    ({}, {'worker-network-endpoints': POD}, True),
    ({}, {'worker-network-endpoints': 'host-0,host-1'}, True),
    ({}, {'worker-network-endpoints': '10.0.0.1',
          'tpu-env': "ZONE: 'us-east5-a'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
    ({}, {'tpu-env': "MEGASCALE_NUM_SLICES: '1'"}, False),
    # Kubernetes Engine: one host, a slice of several, two slices of one host
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, {}, False),
    ({'TPU_WORKER_HOSTNAMES': 'tpu-0.svc,tpu-1.svc', 'TPU_WORKER_ID': '1'}, {}, True),
    ({'TPU_PROCESS_ADDRESSES': 'a:8476,b:8476', 'TPU_WORKER_HOSTNAMES': 'a'}, {}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '0',
      'MEGASCALE_COORDINATOR_ADDRESS': 'job-0.svc'}, {}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '1'}, {}, False)])
def test_a_tpu_is_initialized_as_several_only_with_several_workers(
        monkeypatch, initialized, env, metadata, several):
    use(monkeypatch, env)
    monkeypatch.setattr(launch, 'has_tpu', lambda device: True)
    monkeypatch.setattr(launch, 'gce_metadata', lambda key: metadata.get(key, ''))
    assert launch.start_processes('auto', 100) == 0
    assert initialized == [dict(heartbeat_timeout_seconds=100)] * several


def test_the_workers_of_a_tpu_are_read_from_a_file(monkeypatch, tmp_path):
    path = tmp_path / 'addresses'
    use(monkeypatch, {'TPU_PROCESS_ADDRESSES_PATH': str(path), 'TPU_PROCESS_ADDRESSES': 'a,b'})
    with pytest.raises(errors.UserError, match='TPU_PROCESS_ADDRESSES_PATH'):
        launch.has_tpu_workers()
    path.write_text('a:8476\n')
    assert not launch.has_tpu_workers()


def test_without_a_metadata_server_there_is_no_metadata(monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as server:
        address = f'127.0.0.1:{server.getsockname()[1]}'
    monkeypatch.setenv('GCE_METADATA_IP', address)  # where nobody listens any more
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
