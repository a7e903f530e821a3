"""
The processes of a run: which launcher started them, how they connect, and which of them prints.
"""

import atexit
import builtins
import contextlib
import glob
import http.client
import importlib.util
import io
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request

import jax
from jax._src.distributed import global_state  # no public name; Orbax uses it too

from nanogpt_jax import errors
from nanogpt_jax.errors import UserError

# -----------------------------------------------------------------------------
# launchers

# variables with the index of a process and the number of processes; torchrun comes before SLURM,
# which may have started it
BY_HAND = ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES')
TORCHRUN = ('RANK', 'WORLD_SIZE')
LAUNCHERS = (BY_HAND, TORCHRUN, ('SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'),
             ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'))


def find_launcher():
    """The one of LAUNCHERS that started this process, or None."""
    for index, count in LAUNCHERS:
        # job scripts export WORLD_SIZE alone for other programs
        if count in os.environ and (index in os.environ or (index, count) != TORCHRUN):
            return index, count
    return None


def process_rank():
    """(index of this process, number of processes) from the launcher's variables; (0, 1) without a
    launcher. Raises UserError if they are not such numbers."""
    launcher = find_launcher()
    if launcher is None:
        return 0, 1
    index, count = (os.environ.get(name, '') for name in launcher)
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f'{launcher[1]} is {count!r} and {launcher[0]} is {index!r}; they must '
                        'be the number of processes and the index of this one, from 0')
    return int(index), int(count)


def launcher_arguments(launcher, rank, count):
    """The arguments of jax.distributed.initialize that JAX does not find itself."""
    if launcher == BY_HAND:
        address = os.environ.get('JAX_COORDINATOR_ADDRESS', '')
        if not address.rpartition(':')[2].isdecimal():
            raise UserError('with JAX_NUM_PROCESSES, JAX_COORDINATOR_ADDRESS must be the host of '
                            'the process with JAX_PROCESS_ID=0 and a free port on it, such as '
                            f'node1:1234, not {address!r}')
        arguments = dict(coordinator_address=address)
    elif launcher == TORCHRUN:
        arguments = torchrun_arguments()
    else:
        return {}
    return arguments | dict(num_processes=count, process_id=rank)


def torchrun_arguments():
    names = ('MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
    host, port, local_rank, local_size = (os.environ.get(name, '') for name in names)
    if not (host and port.isdecimal()):
        raise UserError(f'with RANK and WORLD_SIZE, MASTER_ADDR (here {host!r}) and MASTER_PORT '
                        f'(here {port!r}) must name the host of the process with RANK=0 and a '
                        'port: start with torchrun, or see "Several processes" in '
                        'docs/distributed.md')
    # torchrun itself listens on MASTER_PORT, so every process derives the same other port from it,
    # below the range that Linux uses for outgoing connections
    other = os.environ.get('JAX_COORDINATOR_PORT') or 20000 + (int(port) + 5000) % 10000
    # as in PyTorch, one GPU per process; a process alone on its machine takes all
    one_each = local_rank.isdecimal() and local_size != '1'
    return dict(coordinator_address=f'{host}:{other}', cluster_detection_method='deactivate',
                local_device_ids=[int(local_rank)] if one_each else None)


def check_port(address):
    """Raise UserError if another program listens on this port of process 0."""
    # JAX can share the port with another run's coordinator, and would then mix the two runs
    port = int(address.rpartition(':')[2])
    try:
        socket.create_server(('', port)).close()
    except (OSError, OverflowError) as e:
        raise UserError(f'process 0 cannot listen on port {port} ({e}): give all processes another '
                        'one, in JAX_COORDINATOR_ADDRESS or, with torchrun, in '
                        'JAX_COORDINATOR_PORT') from e


# -----------------------------------------------------------------------------
# Cloud TPU

def has_tpu(device):
    """Whether --device=`device` lets JAX use a TPU that this machine has."""
    # machines without a TPU may have /dev/vfio/vfio and /dev/accel too
    chips = glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*')
    return bool(device in ('auto', 'tpu') and chips and importlib.util.find_spec('libtpu'))


def has_tpu_workers():
    """Whether this machine's TPU has other workers (hosts) too.

    Reads what jax.distributed.initialize reads in JAX's cloud_tpu_cluster.py. That function fails
    on a TPU with one worker, or waits for a host that does not exist (Colab, Kaggle).
    """
    if os.environ.get('MEGASCALE_NUM_SLICES', '1') not in ('', '1'):
        return True
    workers = os.environ.get('TPU_PROCESS_ADDRESSES', os.environ.get('TPU_WORKER_HOSTNAMES'))
    if path := os.environ.get('TPU_PROCESS_ADDRESSES_PATH'):
        with open(path, encoding='utf-8') as f:
            workers = f.read()
    if workers is not None:
        return ',' in workers
    if 'TPU_SKIP_MDS_QUERY' in os.environ:
        return False
    slices = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", gce_metadata('tpu-env'), re.M)
    return bool(slices and slices[1] != '1') or ',' in gce_metadata('worker-network-endpoints')


def gce_metadata(key):
    """An attribute of this machine from Google's metadata server; '' without a server."""
    # an address, since looking up a name may take long outside Google's cloud
    host = os.environ.get('GCE_METADATA_IP', '169.254.169.254')
    request = urllib.request.Request(
        f'http://{host}/computeMetadata/v1/instance/attributes/{key}',
        headers={'Metadata-Flavor': 'Google'})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=2) as response:
            return response.read().decode(errors='replace')
    except (OSError, http.client.HTTPException):
        return ''


# -----------------------------------------------------------------------------
# connecting

def start_processes(device, heartbeat_timeout):
    """Connect the processes that a launcher has started by jax.distributed; for one do nothing.

    JAX itself finds SLURM, Open MPI and Cloud TPU. heartbeat_timeout: declare a process dead after
    this many seconds without a heartbeat, and end the others. Returns the index of this process.
    Raises UserError if a launcher's variable is missing, if JAX is in use already, and for a
    timeout below one second. Ends the process if some do not connect in that time.
    """
    if heartbeat_timeout < 1:
        raise UserError(f'heartbeat_timeout is {heartbeat_timeout}; it must be at least 1 second')
    launcher, (rank, count) = find_launcher(), process_rank()
    if not (count > 1 if launcher else has_tpu(device) and has_tpu_workers()):
        return rank
    arguments = launcher_arguments(launcher, rank, count)
    processes = f'{count} processes' if launcher else "the TPU's processes"
    if address := arguments.get('coordinator_address'):
        processes += f' at {address}'
        if rank == 0:
            check_port(address)
    print(f'waiting for {processes}', flush=True)
    # its handler of SIGTERM would ignore the signal until training begins
    jax.config.update('jax_enable_preemption_service', False)
    try:
        with one_line_timeout(heartbeat_timeout, rank, processes):
            # a longer timeout, since JAX's own ends with SIGABRT and a stack of C++ calls
            jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=heartbeat_timeout,
                                       initialization_timeout=heartbeat_timeout + 60)
    except RuntimeError as e:
        if 'must be called before' not in str(e):
            raise
        raise UserError('several processes must be connected before JAX is used, and here it is '
                        'in use: start the script as a process of its own, not inside a notebook'
                        ) from e
    rank = rank if launcher else jax.process_index()
    errors.process_label = f' in process {rank}'
    silence_other_processes(rank)
    errors.client = global_state.client
    thread = threading.Thread(target=end_with_others, args=[rank], daemon=True)
    thread.start()
    atexit.register(stop_watching, thread)
    return rank


def end_with_others(rank):
    """End this process with one line once another one has ended with a UserError.

    Otherwise the end of process 0 would end it by SIGABRT, with a stack of C++ calls.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the connection is lost
        failed = errors.client.blocking_key_value_get('failed', 10 ** 11)  # ms, three years
        if failed not in ('', errors.process_label):
            # it may be about to print the same error; process 0, which has the key, ends last
            time.sleep(1 if rank else 3)
            errors.report(f'stopped, because of the error{failed}')
            os._exit(1)


def stop_watching(thread):
    """End the threads of all processes: one that waits in C++ when Python ends causes a SIGABRT."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has done it
        errors.client.key_value_set('failed', '')
    thread.join()


@contextlib.contextmanager
def one_line_timeout(seconds, rank, processes):
    """A context that ends the process with one line after this many seconds. Ctrl-C ends it at
    once."""
    def give_up():
        print(f'error in process {rank}: waited {seconds} s (--heartbeat_timeout) for {processes}, '
              'and some did not connect: see what they print, and whether all reach that address',
              file=sys.stderr, flush=True)
        os._exit(1)
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    # Python's own handler would only run after the call into C++
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        timer.cancel()


# -----------------------------------------------------------------------------
# standard output

def silence_other_processes(rank):
    """Only process 0 prints; errors are printed by each."""
    if rank > 0:
        # the file descriptor, not sys.stdout: libraries print from C++ too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class RobustStream:
    """A text stream that discards all text once writing has failed.

    A tee that dies of the same Ctrl-C must not end a run before its checkpoint is saved. Neither
    must a full disk that has only the log.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call, *args):
        try:
            return call(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def open_closed_streams():
    """Open /dev/null for each standard stream that was closed at the start, and so is None."""
    for name in ('stdin', 'stdout', 'stderr'):
        if getattr(sys, name) is None:
            # this takes the stream's file descriptor, which another file would get otherwise
            stream = open(os.devnull, 'r' if name == 'stdin' else 'w', encoding='utf-8')
            setattr(sys, name, stream)
            setattr(sys, f'__{name}__', stream)


def owns_stdout():
    """Whether a script may change sys.stdout; a notebook's stream outlives the script."""
    return isinstance(sys.stdout, io.TextIOWrapper) and not hasattr(builtins, '__IPYTHON__')


def keep_stdout_open():
    """Make printing survive a closed pipe, and flush each line; only process 0 prints."""
    open_closed_streams()
    silence_other_processes(process_rank()[0])
    if owns_stdout():
        sys.stdout.reconfigure(line_buffering=True)
        sys.stdout = RobustStream(sys.stdout)


def keep_stdout_for_samples():
    """Returns standard output, for the samples. print() then writes to standard error, except in a
    notebook."""
    open_closed_streams()
    samples_out = sys.stdout
    if owns_stdout():
        samples_out.reconfigure(errors='replace')  # ? for a character that a terminal lacks
        sys.stdout = sys.stderr
    return samples_out
