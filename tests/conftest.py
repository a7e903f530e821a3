"""Fixtures of all tests; functions that tests share are in helpers.py."""

import os
import shutil
import signal
import sys

import pytest

# each of pytest-xdist's workers, and the processes that it starts, gets a core of its own: XLA's
# threads of several workers on the same cores would wait for each other
worker = os.environ.get('PYTEST_XDIST_WORKER', '').removeprefix('gw')
if worker and hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    os.environ['TESTS_CORES'] = ','.join(map(str, cores))
    os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})

# a run under nohup ignores SIGHUP, and so would the runs that the tests send it to
if hasattr(signal, 'SIGHUP'):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# without a GPU, JAX's CUDA plugin is used to compile for one; this check needs a driver
os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
# pytest's own process has eight CPU devices to share work between, without processes for it
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                           + ' --xla_force_host_platform_device_count=8')

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def pytest_configure(config):
    """Give all tests, runs and workers one compilation cache: compiling takes most of the time."""
    # in .pytest_cache, until pytest's --cache-clear or a size of 2 GB
    if not worker and config.pluginmanager.has_plugin('cacheprovider'):
        compiled = config.cache.mkdir('compiled')
        if sum(file.stat().st_size for file in compiled.iterdir()) > 2e9:
            shutil.rmtree(compiled)
        # read when JAX is imported, which is later
        os.environ['JAX_COMPILATION_CACHE_DIR'] = str(compiled)
        os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    # the tests of a file share runs, which another worker would repeat
    if getattr(config.option, 'dist', None) == 'load':
        config.option.dist = 'loadfile'
        config.option.loadscopereorder = False  # else files of few but long tests come last


@pytest.fixture
def folder(tmp_path):
    """A working directory with data/tiny."""
    from helpers import with_data
    return with_data(tmp_path)


@pytest.fixture
def unoptimized():
    """Compile in half the time on a CPU, for claims that do not depend on XLA's optimizations."""
    import jax
    jax.config.update('jax_disable_most_optimizations', jax.default_backend() == 'cpu')
    yield
    jax.config.update('jax_disable_most_optimizations', False)
