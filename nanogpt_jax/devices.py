"""
The machine that a script runs on: the version of JAX, devices and their peaks, the compilation
cache, memory that malloc keeps, standard output and signals.
"""

import contextlib
import ctypes
import errno
import hashlib
import importlib.util
import os
import platform as machine
import re
import signal
import sys
import threading
import warnings

import jax
import jaxlib
from jax.experimental import multihost_utils

from nanogpt_jax.errors import UserError

# -----------------------------------------------------------------------------
# versions of JAX

# what requirements_jax.txt allows, and what it excludes with which reason; a test compares them,
# since packaging, which could read the file, is not among the packages that training needs
OLDEST_JAX, UNTESTED_JAX = (0, 10, 1), (0, 13)
WRONG_JAX = {
    '0.10.2': 'computes wrong results on CPUs (jax-ml/jax #39103)',
    '0.11.0': 'computes wrong results on some NVIDIA GPUs (jax-ml/jax #40633)',
    '0.11.1': 'computes wrong results on some NVIDIA GPUs (jax-ml/jax #40633)',
    '0.11.2': 'computes wrong gradients on TPUs (openxla/xla #49143)',
}


def version_warning(package, version):
    """One line if requirements_jax.txt excludes this version of jax or jaxlib, else ''."""
    release = re.match(r'\d+(\.\d+)*', version)[0]  # without .dev20260819, rc1, +local
    if release in WRONG_JAX:
        reason = WRONG_JAX[release]
    elif OLDEST_JAX <= tuple(map(int, release.split('.'))) < UNTESTED_JAX:
        return ''
    else:
        reason = 'has not been tested with this code'
    return f'WARNING: {package} {version} {reason}; use a version that requirements_jax.txt allows'


def warn_about_versions():
    """Print one line if jaxlib, which has the compiler, or jax is not a version to use."""
    warning = (version_warning('jaxlib', jaxlib.__version__)
               or version_warning('jax', jax.__version__))
    if warning:
        print(warning)


# -----------------------------------------------------------------------------
# devices

# dense bfloat16 peaks in FLOP/s, from the vendors' data sheets; the first name found in a device's
# kind counts, so specific names come before generic ones
PEAK_FLOPS = {
    'h100 nvl': 835e12, 'h100 pcie': 756.5e12, 'h100': 989.5e12, 'h200 nvl': 836e12,
    'h200': 989.5e12, 'a100': 312e12, 'l40s': 362e12, 'l40': 181e12, 'l4': 121e12,
    'rtx 4090': 165.2e12, 'tpu v4': 275e12, 'tpu v5 lite': 197e12, 'tpu v5e': 197e12,
    'tpu v5p': 459e12, 'tpu v5': 459e12, 'tpu v6 lite': 918e12, 'tpu v6e': 918e12,
}


def peak_flops(device):
    """(bfloat16 peak of a device in FLOP/s, whose peak it is); of an A100 if it is not known."""
    kind = device.device_kind.lower()
    for name, peak in PEAK_FLOPS.items():
        if name in kind:
            return peak, device.device_kind
    return PEAK_FLOPS['a100'], 'an A100'


def select_devices(device='auto'):
    """The devices that --device names: auto, cpu, gpu or cuda, cuda:1 for one of several, tpu.

    Must be called before JAX is used otherwise. Prints a warning for a version of JAX that
    requirements_jax.txt excludes. Raises UserError for absent and unknown devices.
    """
    warn_about_versions()
    platform, _, index = device.partition(':')
    if platform == 'mps':
        raise UserError("device 'mps' is PyTorch's name for Apple's GPU, which JAX does not "
                        'support well; use --device=cpu')
    if platform not in ('auto', 'cpu', 'gpu', 'cuda', 'tpu') or (index and not index.isdecimal()):
        raise UserError(f'device is {device!r}; it must be auto, cpu, gpu, cuda, tpu, or one of '
                        'several such as cuda:1')
    if platform == 'cpu':
        jax.config.update('jax_platforms', 'cpu')  # do not take a GPU's memory
    try:
        devices = jax.devices(None if platform == 'auto' else platform)
    except (RuntimeError, AssertionError) as e:  # an assertion if JAX_PLATFORMS names absent ones
        reason = ' '.join(str(e).split()) or 'see JAX_PLATFORMS'
        raise UserError(f'device {device!r} was requested, but JAX has none ({reason}); use '
                        '--device=cpu, or install JAX for that device (see requirements_jax.txt)'
                        ) from e
    if index:
        if jax.process_count() > 1:
            raise UserError(f'device {device!r} selects one device of one process, but there are '
                            f'{jax.process_count()} processes')
        if int(index) >= len(devices):
            raise UserError(f'device {device!r} was requested, but there are only {len(devices)}, '
                            'counted from 0')
        devices = [devices[int(index)]]
    if platform == 'auto' and devices[0].platform == 'cpu' and os.path.exists('/dev/nvidia0'):
        print('WARNING: this machine has an NVIDIA GPU, but JAX sees only the CPU; '
              'see requirements_jax.txt')
    if devices[0].platform == 'cpu':
        keep_freed_memory()
    own = next(d for d in devices if d.process_index == jax.process_index())
    jax.config.update('jax_default_device', own)
    return devices


def on_host():
    """A context in which new arrays are created in host memory, if JAX_PLATFORMS allows it."""
    try:
        return jax.default_device(jax.local_devices(backend='cpu')[0])
    except RuntimeError:
        return contextlib.nullcontext()


def compute_dtype(dtype, devices):
    """The dtype to compute in on these devices: float32 on a CPU, as in nanoGPT, else `dtype`.

    Raises UserError for an unknown dtype.
    """
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype is {dtype!r}; it must be float32, bfloat16 or float16')
    return 'float32' if devices[0].platform == 'cpu' else dtype


def attention_path(attention, compute_type, head_size, device):
    """Which attention to use, 'cudnn' or 'xla'; 'auto' chooses the faster one that works here.

    cuDNN's kernel needs an NVIDIA GPU of the Ampere generation or newer, 16 bits, and a head size
    that is a multiple of 8 up to 128. Raises UserError if 'cudnn' was requested without these, and
    for an unknown name.
    """
    if attention not in ('auto', 'cudnn', 'xla'):
        raise UserError(f'attention is {attention!r}; it must be auto, cudnn or xla')
    supported = ('nvidia' in device.device_kind.lower() and float(device.compute_capability) >= 8
                 and compute_type != 'float32' and head_size % 8 == 0 and head_size <= 128)
    if attention == 'cudnn' and not supported:
        raise UserError('cuDNN attention needs an NVIDIA GPU of the Ampere generation or newer, '
                        'bfloat16 or float16, and a head size that is a multiple of 8 up to 128; '
                        f'this is {device.device_kind}, {compute_type} and {head_size}: use '
                        '--attention=xla or auto')
    return 'cudnn' if supported and attention != 'xla' else 'xla'


# -----------------------------------------------------------------------------
# memory and compiled programs

def keep_freed_memory():
    """Make glibc keep freed memory for the next step instead of returning it to the kernel."""
    # XLA's CPU backend takes a step's temporary memory from malloc, which maps, zeroes and unmaps
    # blocks above 32 MB at every step otherwise
    if machine.libc_ver()[0] == 'glibc':
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: never map single blocks
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-2, 2 ** 28)  # M_TOP_PAD: grow it by 256 MB at a time


def enable_compilation_cache():
    """Cache compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR."""
    # a damaged entry, or a full disk, costs a compilation and nothing else
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')
    if jax.__version__ == '0.10.1' and jax.default_backend() == 'cpu':
        # reports each program that it reads as one for another machine (openxla/xla #44565)
        jax.config.update('jax_logging_level', 'CRITICAL')
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(home):  # the XDG standard says to ignore relative paths
        home = os.path.join(os.path.expanduser('~'), '.cache')
    folder = os.path.join(home, 'nanogpt-jax', cpu_key())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        print(f'compiled programs are not cached for the next start: {e}')
        return
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    if importlib.util.find_spec('filelock'):  # JAX needs it to limit the folder's size
        jax.config.update('jax_compilation_cache_max_size', 2 ** 31)


def cpu_key():
    """A name for this kind of CPU: programs compiled for one CPU may crash on another, and home
    folders are shared between machines."""
    features = machine.machine() + machine.processor()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            features += next(s for s in f if s.lower().startswith(('flags', 'features')))
    except (OSError, StopIteration):
        pass  # not Linux, or a CPU of another kind
    return hashlib.sha256(features.encode()).hexdigest()[:16]


# -----------------------------------------------------------------------------
# standard output and signals

class RobustStream:
    """A text stream that discards what is written after its reader has closed the pipe, or its
    terminal is gone.

    A tee that dies of the same Ctrl-C must not end a run before its checkpoint is saved.
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
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def open_closed_streams():
    """Open /dev/null for each standard stream that was closed at the start, which Python sets to
    None."""
    for name in ('stdin', 'stdout', 'stderr'):
        if getattr(sys, name) is None:
            # gets the lowest free file descriptor, the stream's own, so that no other file can
            stream = open(os.devnull, 'r' if name == 'stdin' else 'w', encoding='utf-8')
            setattr(sys, name, stream)
            setattr(sys, f'__{name}__', stream)


def keep_stdout_open():
    """Make printing survive a closed pipe, and print each line at once, to a pipe or a file too."""
    open_closed_streams()
    sys.stdout.reconfigure(line_buffering=True)
    sys.stdout = RobustStream(sys.stdout)


class StopRequest:
    """Remembers the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (the terminal was closed), so that a
    run can end at the next step; a line says so at once.

    A second SIGINT or SIGTERM ends the process at once. SIGHUP never does, since a shell that ends
    sends it twice, and is left alone if the process was started to ignore it, as by nohup. Under
    jax.distributed, SIGTERM is left to JAX's own handler, by which all processes agree where to
    stop, and the others are forwarded as SIGTERM. A context manager: it restores the handlers.
    """

    def __init__(self):
        self.signum, self.times_asked = None, 0
        self.distributed = jax.distributed.is_initialized()
        self.hangup = getattr(signal, 'SIGHUP', None)  # Windows has none
        signals = [signal.SIGINT] + [signal.SIGTERM] * (not self.distributed)
        if self.hangup and signal.getsignal(self.hangup) != signal.SIG_IGN:
            signals.append(self.hangup)
        # Python runs its handlers between instructions of the main thread, which may be waiting for
        # a device. The numbers of the signals are written to this pipe at once
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.handlers = {signum: signal.signal(signum, self._remember) for signum in signals}
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._announce, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.write_end)
        self.thread.join()  # it reads the pipe to its end

    def _remember(self, signum, frame):
        if not self.distributed:
            self.signum = self.signum or signal.Signals(signum)

    def _announce(self):
        first, pressed = True, 0
        while number := os.read(self.read_end, 1):
            signum = number[0]
            if signum not in self.handlers:
                continue
            pressed += signum != self.hangup
            if pressed > 1:
                os._exit(128 + signum)
            if first:
                print(f'{signal.Signals(signum).name}: stopping after this step'
                      + '; press again to stop now, without saving' * pressed, flush=True)
                if self.distributed:
                    os.kill(os.getpid(), signal.SIGTERM)
            first = False
        os.close(self.read_end)

    def reached(self):
        """Whether to stop here. Several processes must ask equally often: they agree on a call."""
        self.times_asked += 1
        if multihost_utils.reached_preemption_sync_point(self.times_asked):
            self.signum = signal.SIGTERM
        return self.signum is not None

    @property
    def exit_code(self):
        """130 after Ctrl-C, as in a shell, else 0: SIGTERM is how schedulers end a job."""
        return 130 if self.signum == signal.SIGINT else 0
