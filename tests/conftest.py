"""Fixtures of all tests; functions that tests share are in helpers.py."""

import os
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from helpers import with_data


def pytest_configure(config):
    # tests of one xdist_group run in one worker: those that need much memory not at the same time,
    # those that share a run without computing it twice
    if getattr(config.option, 'dist', None) == 'load':
        config.option.dist = 'loadgroup'


@pytest.fixture
def folder(tmp_path):
    """A working directory with data/tiny."""
    return with_data(tmp_path)
