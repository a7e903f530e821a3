"""
The machine that a script runs on: the version of JAX, devices and their peaks, the compilation
cache, and memory that malloc keeps.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform as machine
import re
import warnings

import jax
import jaxlib

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
