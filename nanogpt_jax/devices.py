"""
The machine that a script runs on: versions of JAX, devices and their peaks, memory, and the
compilation cache.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform as machine
import re
import time
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import jaxlib
from jax.extend.backend import backends

from nanogpt_jax.errors import UserError

# -----------------------------------------------------------------------------
# versions of JAX

# as in requirements_jax.txt; a test compares them
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
    """Print one line if requirements_jax.txt excludes this jaxlib (the compiler) or this jax."""
    warning = (version_warning('jaxlib', jaxlib.__version__)
               or version_warning('jax', jax.__version__))
    if warning:
        print(warning)


# -----------------------------------------------------------------------------
# devices

# the makers' dense bfloat16 peaks with float32 sums, in FLOP/s; float16 for devices without
# bfloat16 (V100, T4, RTX 20). Names match whole words of a device's kind; the longest match counts
PEAK_FLOPS = {
    # NVIDIA's data sheets; most of them print twice this, with sparsity
    'v100': 125e12, 't4': 65e12, 'a100': 312e12, 'a800': 312e12, 'a30': 165e12, 'a40': 149.7e12,
    'a10': 125e12, 'a10g': 70e12, 'a2': 18e12, 'l4': 121e12, 'l40': 181e12, 'l40s': 362e12,
    'l20': 119.5e12, 'h100': 989.5e12, 'h100 pcie': 756.5e12, 'h100 nvl': 835e12, 'h800': 989.5e12,
    'h20': 148e12, 'h200': 989.5e12, 'h200 nvl': 836e12, 'gh200': 989.5e12, 'b100': 1750e12,
    'b200': 2250e12, 'gb200': 2500e12, 'b300': 2250e12, 'gb300': 2500e12,
    'rtx a4000': 76.7e12, 'rtx a5000': 111.1e12, 'rtx a6000': 154.8e12,
    'rtx 5000 ada generation': 261.1e12, 'rtx 6000 ada generation': 364.2e12,
    # NVIDIA's white papers on Turing, GA102, Ada and RTX Blackwell
    'rtx 2080 ti': 53.8e12, 'titan rtx': 130.5e12, 'rtx 3070': 40.6e12, 'rtx 3080': 59.5e12,
    'rtx 3090': 71e12, 'rtx 4070 ti': 80.2e12, 'rtx 4080': 97.5e12, 'rtx 4090': 165.2e12,
    'rtx 5070': 61.7e12, 'rtx 5070 ti': 87.9e12, 'rtx 5080': 112.6e12, 'rtx 5090': 209.5e12,
    'rtx pro 6000 blackwell workstation edition': 503.8e12,
    # from NVIDIA's cores and boost clocks: four FLOPs per core and cycle, as above
    'rtx 3060': 25.5e12, 'rtx 3060 ti': 32.4e12, 'rtx 3070 ti': 43.5e12, 'rtx 3080 ti': 68.2e12,
    'rtx 3090 ti': 80e12, 'rtx 4060': 30.2e12, 'rtx 4060 ti': 44.1e12, 'rtx 4070': 58.3e12,
    'rtx 4070 super': 71e12, 'rtx 4070 ti super': 88.2e12, 'rtx 4080 super': 104.4e12,
    'rtx 5060': 38.4e12, 'rtx 5060 ti': 47.4e12,
    # AMD's data sheets; JAX sees the two halves of an MI250 or MI250X as two devices
    'mi100': 92.3e12, 'mi210': 181e12, 'mi250': 181e12, 'mi250x': 191.5e12, 'mi300a': 980.6e12,
    'mi300x': 1307.4e12, 'mi325x': 1307.4e12, 'mi350x': 2306.9e12, 'mi355x': 2516.6e12,
    # Google's documentation; JAX sees the two cores of a v2, v3 or v7x as two devices
    'tpu v2': 45e12 / 2, 'tpu v3': 123e12 / 2, 'tpu v4': 275e12, 'tpu v4 lite': 138e12,
    'tpu v5 lite': 197e12, 'tpu v5e': 197e12, 'tpu v5': 459e12, 'tpu v5p': 459e12,
    'tpu v6 lite': 918e12, 'tpu v6e': 918e12, 'tpu7x': 2307e12 / 2,
}


def table_peak(device):
    """The 16-bit peak of a device in FLOP/s from PEAK_FLOPS, or None."""
    kind = device.device_kind.lower()
    if re.search(r'\b(laptop|max-q|d|mig)\b', kind):  # laptop variants and MIG slices
        return None
    names = [name for name in PEAK_FLOPS if re.search(rf'\b{name}\b', kind)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def peak_flops(device):
    """The FLOP/s that a device's mfu is counted against: its 16-bit peak; for a CPU the measured
    float32 matmul rate; for an unknown device an A100's peak, as in nanoGPT."""
    if device.device_kind == 'cpu':
        return matmul_flops() / jax.local_device_count('cpu')  # they share the cores
    return table_peak(device) or PEAK_FLOPS['a100']


def describe_peak(device, n_devices=1):
    """A line with the peak that mfu is counted against."""
    peak = peak_flops(device) / 1e12
    if device.device_kind == 'cpu':
        return (f'mfu is counted against {n_devices * peak:.3g} TFLOP/s, the float32 matmul rate '
                'measured on this CPU')
    several = f'{n_devices} x ' if n_devices > 1 else ''
    whose = (f'the 16-bit peak of {device.device_kind}' if table_peak(device)
             else f'an A100: no peak of {device.device_kind} is known')
    return f'mfu is counted against {several}{peak:g} TFLOP/s, {whose}'


@functools.cache
def matmul_flops(n=1024):
    """FLOP/s of a float32 matmul (n, n) @ (n, n) on this CPU."""
    a, dot, times = jnp.ones((n, n)), jax.jit(jnp.dot), []
    for _ in range(6):  # the first one compiles
        t0 = time.perf_counter()
        dot(a, a).block_until_ready()
        times.append(time.perf_counter() - t0)
    return 2 * n ** 3 / min(times)


def compute_capability(device):
    """The CUDA compute capability of an NVIDIA GPU, such as 8.9; None for any other device."""
    number = re.match(r'\d+\.\d+', str(getattr(device, 'compute_capability', None)))
    return float(number[0]) if number else None


def select_devices(device='auto'):
    """The devices that --device names: auto, cpu, gpu or cuda, tpu, another platform that JAX has
    here (rocm, METAL, ...), or one of several as in cuda:1.

    Call it before anything else uses JAX. Raises UserError for absent and unknown devices.
    """
    warn_about_versions()
    platform, _, index = device.partition(':')
    if index and not index.isdecimal():
        raise UserError(f'device is {device!r}; choose one of several by its number, as in '
                        f'{platform}:1')
    if platform == 'cpu':
        jax.config.update('jax_platforms', 'cpu')  # do not take a GPU's memory
    try:
        devices = jax.devices(None if platform == 'auto' else platform)
    except (RuntimeError, AssertionError) as e:  # an assertion if JAX_PLATFORMS names absent ones
        reason = ' '.join(str(e).split()) or 'see JAX_PLATFORMS'
        raise UserError(f'device {device!r} was requested, but JAX has none ({reason}); use '
                        f'{usable_platforms()} (on a Mac --device=cpu), or install JAX for that '
                        'device (see requirements_jax.txt)') from e
    if index:
        if jax.process_count() > 1:
            raise UserError(f'device {device!r} selects one device of one process, but there are '
                            f'{jax.process_count()} processes')
        if int(index) >= len(devices):
            raise UserError(f'device {device!r} was requested, but there are only {len(devices)}, '
                            'counted from 0')
        devices = [devices[int(index)]]
    counts = Counter(d.process_index for d in devices)
    if len({*counts.values()}) > 1:  # they could not even exchange a number
        raise UserError(f'the processes have {dict(counts)} devices, by their index: start each '
                        'with the same number')
    if platform == 'auto' and devices[0].platform == 'cpu' and os.path.exists('/dev/nvidia0'):
        print('WARNING: this machine has an NVIDIA GPU, but JAX sees only the CPU; '
              'see requirements_jax.txt')
    if devices[0].platform == 'cpu':
        keep_freed_memory()
    own = next(d for d in devices if d.process_index == jax.process_index())
    jax.config.update('jax_default_device', own)
    return devices


def usable_platforms():
    """The values of --device that work here, as text."""
    try:
        return ' or '.join(f'--device={name}' for name in ('auto', *backends()))
    except (RuntimeError, AssertionError):  # JAX_PLATFORMS names absent ones
        return '--device=cpu'


def on_host():
    """A context that creates arrays in host memory, if JAX_PLATFORMS allows it."""
    try:
        return jax.default_device(jax.local_devices(backend='cpu')[0])
    except RuntimeError:
        return contextlib.nullcontext()


def compute_dtype(dtype, devices, given=False):
    """The dtype to compute in on these devices: `dtype`, but float32 on a CPU. An NVIDIA GPU
    without bfloat16 gets float16 instead, as in nanoGPT, unless the user has `given` bfloat16.

    Raises UserError for an unknown dtype.
    """
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype is {dtype!r}; it must be float32, bfloat16 or float16')
    if devices[0].platform == 'cpu':
        return 'float32'
    if dtype == 'bfloat16' and (compute_capability(devices[0]) or 8) < 8:  # older than Ampere
        if not given:
            return 'float16'
        print(f'WARNING: a {devices[0].device_kind} has no bfloat16: XLA computes in float32, '
              'slower and with more memory; use --dtype=float16')
    return dtype


def attention_path(attention, compute_type, head_size, device):
    """The attention to use: 'cudnn', 'splash' or 'xla'. 'auto' chooses the fastest that works here.

    cuDNN's kernel needs 16 bits and an NVIDIA GPU of the Ampere generation or newer. The head size
    must be a multiple of 8 up to 128, or up to 256 from the Hopper generation on. Splash attention
    needs a TPU v4 or newer, and not float16. Raises UserError if the requested one does not work,
    and for an unknown name.
    """
    if attention not in ('auto', 'cudnn', 'splash', 'xla'):
        raise UserError(f'attention is {attention!r}; it must be auto, cudnn, splash or xla')
    has_splash = (re.match(r'TPU(?! v[23]\b)', device.device_kind) is not None
                  and compute_type != 'float16')
    if attention == 'splash' and not has_splash:
        raise UserError('splash attention needs a TPU v4 or newer, and bfloat16 or float32; this '
                        f'is {device.device_kind} and {compute_type}: use --attention=xla or auto')
    if has_splash and attention in ('auto', 'splash'):
        return 'splash'
    capability = compute_capability(device) or 0
    largest = 256 if capability >= 9 else 128
    supported = (capability >= 8 and compute_type != 'float32' and head_size % 8 == 0
                 and head_size <= largest)
    if attention == 'cudnn' and not supported:
        raise UserError('cuDNN attention needs an NVIDIA GPU of the Ampere generation or newer, '
                        'bfloat16 or float16, and a head size that is a multiple of 8 up to '
                        f'{largest}; this is {device.device_kind}, {compute_type} and {head_size}: '
                        'use --attention=xla or auto')
    return 'cudnn' if supported and attention != 'xla' else 'xla'


# -----------------------------------------------------------------------------
# memory and compiled programs

def keep_freed_memory():
    """Make glibc keep freed memory for the next step instead of returning it to the kernel."""
    # XLA's CPU backend allocates a step's temporary memory by malloc, which otherwise maps, zeroes
    # and unmaps blocks above 32 MB at every step
    if machine.libc_ver()[0] == 'glibc':
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: never map single blocks
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-2, 2 ** 28)  # M_TOP_PAD: grow it by 256 MB at a time


def program_memory(program, platform):
    """(bytes of a compiled program's arguments, other bytes that it needs on a device)."""
    m = program.memory_analysis()
    arguments = m.argument_size_in_bytes
    if platform == 'tpu':
        # the memory that libtpu allocates and limits; temp_size_in_bytes is larger
        return arguments, m.peak_memory_in_bytes - arguments
    return arguments, m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def enable_compilation_cache():
    """Cache compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR."""
    # a damaged entry or a full disk only costs a compilation
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')
    if jax.__version__ == '0.10.1' and jax.default_backend() == 'cpu':
        # warns about every program that it reads (openxla/xla #44565)
        jax.config.update('jax_logging_level', 'CRITICAL')
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
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
    """A name for this kind of CPU: programs compiled for one CPU may crash on another, and machines
    may share a home folder."""
    features = machine.machine() + machine.processor()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            features += next(s for s in f if s.lower().startswith(('flags', 'features')))
    except (OSError, StopIteration):
        pass  # not Linux, or a CPU of another kind
    return hashlib.sha256(features.encode()).hexdigest()[:16]
