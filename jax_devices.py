"""
The machine that a script runs on: its processes and devices, what their memory and compiled programs need,
and how errors reach the user.
"""

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import math
import os
import platform as machine
import re
import sys
import warnings

import jax

from jax_transformer import GPTConfig, UserError


def report_user_error(kind, error, traceback):
    """sys.excepthook of the scripts: a UserError is one line, Ctrl-C and a reader that is gone are none, everything else keeps
    its traceback.

    One of several processes ends at once: its normal exit would wait for others, which cannot go on either.
    """
    several = jax.distributed.is_initialized()
    where = f' in process {launched_as()[0]}' if several else ''
    text = ' '.join(str(error).split())
    if issubclass(kind, UserError):
        print(f'error{where}: {error}', file=sys.stderr)
    elif 'RESOURCE_EXHAUSTED' in text:
        print(f'error{where}: out of memory ({str(error).splitlines()[0]}). To train in less: a smaller --batch_size with a '
              'larger --gradient_accumulation_steps (the same tokens per iteration), or --remat=True', file=sys.stderr)
    elif several and issubclass(kind, jax.errors.JaxRuntimeError):
        print(f'error{where}: the processes cannot go on together, most likely since one has ended (...{text[-150:]}). Start '
              'all of them again with --init_from=resume', file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    if several:
        sys.stderr.flush()
        os._exit(1)


def print_or_go_on(*args):
    """print, but a reader that is gone (tee dies of the same Ctrl-C) does not end the run: it goes on unheard."""
    try:
        print(*args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -----------------------------------------------------------------------------
# processes

def launched_as():
    """(number of this process, how many there are) by the environment of the launcher; (0, 1) for a process alone.

    Raises UserError for variables that say no such numbers.
    """
    for number, count in (('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES'), ('SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'),
                          ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE')):
        if count in os.environ:
            numbers = [os.environ.get(name, '') for name in (number, count)]
            if not all(n.isdecimal() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
                raise UserError(f'{count} is {numbers[1]!r} and {number} is {numbers[0]!r}; the first must be a number of '
                                'processes, the second the number of this one, counted from 0')
            return int(numbers[0]), int(numbers[1])
    return 0, 1


def mute_all_but_first(process_index):
    """Of several processes the first alone prints; errors come from each."""
    if process_index > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for libraries that print from C++ too


def start_processes(device, peer_timeout):
    """Have jax.distributed connect the processes that a launcher has started; nothing for a process alone.

    SLURM, Open MPI and Cloud TPU are found by JAX itself; by hand it takes JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. peer_timeout: seconds of silence after which a process counts as dead, which ends the others.
    Raises UserError where one of the three is missing, and for a timeout below one second.
    """
    if peer_timeout < 1:
        raise UserError(f'peer_timeout is {peer_timeout}; it must be at least 1 second')
    process_id, n_processes = launched_as()
    on_tpu = (device in ('auto', 'tpu') and importlib.util.find_spec('libtpu')
              and glob.glob('/dev/accel*') + glob.glob('/dev/vfio/*'))
    by_hand = {}
    if 'JAX_NUM_PROCESSES' in os.environ:
        by_hand = dict(num_processes=n_processes, process_id=process_id)
        if not os.environ.get('JAX_COORDINATOR_ADDRESS', '').rpartition(':')[2].isdecimal():
            raise UserError('with JAX_NUM_PROCESSES, JAX_COORDINATOR_ADDRESS must be the host and a free port of the process '
                            f'with JAX_PROCESS_ID=0, such as node1:1234, not {os.environ.get("JAX_COORDINATOR_ADDRESS")!r}')
    if n_processes > 1 or on_tpu:
        jax.distributed.initialize(**by_hand, heartbeat_timeout_seconds=peer_timeout)
    if on_tpu:
        mute_all_but_first(jax.process_index())


# -----------------------------------------------------------------------------
# devices

# bf16 dense peaks in FLOP/s, from the makers' data sheets; the first name found in the device's own counts
PEAK_FLOPS = {
    'h100 nvl': 835e12, 'h100 pcie': 756.5e12, 'h100': 989.5e12, 'h200 nvl': 836e12, 'h200': 989.5e12,
    'a100': 312e12, 'l40s': 362e12, 'l40': 181e12, 'l4': 121e12, 'rtx 4090': 165.2e12,
    'tpu v4': 275e12, 'tpu v5 lite': 197e12, 'tpu v5e': 197e12, 'tpu v5p': 459e12, 'tpu v5': 459e12,
    'tpu v6 lite': 918e12, 'tpu v6e': 918e12,
}


def peak_flops(device):
    """(peak FLOP/s of a device in bfloat16, what it is the peak of). nanoGPT's A100 where the device is not known."""
    kind = device.device_kind.lower()
    for name, peak in PEAK_FLOPS.items():
        if name in kind:
            return peak, device.device_kind
    return PEAK_FLOPS['a100'], 'an A100'


def select_devices(device='auto'):
    """The devices that --device names: auto, cpu, gpu or cuda, cuda:1 for one of them, tpu.

    To be called before JAX is used otherwise. Raises UserError for what is absent or unknown.
    """
    platform, _, index = device.partition(':')
    if platform == 'mps':
        raise UserError("device 'mps' is PyTorch's name for Apple's GPU, which JAX does not support well; use --device=cpu")
    if platform not in ('auto', 'cpu', 'gpu', 'cuda', 'tpu') or (index and not index.isdecimal()):
        raise UserError(f'device is {device!r}; it must be auto, cpu, gpu, cuda, tpu, or one of several such as cuda:1')
    if platform == 'cpu':
        jax.config.update('jax_platforms', 'cpu')  # leaves a GPU to others
    try:
        devices = jax.devices(None if platform == 'auto' else platform)
    except (RuntimeError, AssertionError) as e:  # an assertion where JAX_PLATFORMS names what is not there
        raise UserError(f'device {device!r} was asked for, but JAX has none ({" ".join(str(e).split()) or "see JAX_PLATFORMS"}); '
                        'use --device=cpu, or install the JAX for that device (see requirements_jax.txt)') from e
    if index:
        if jax.process_count() > 1:
            raise UserError(f'device {device!r} is one of several of one process; here there are {jax.process_count()} processes')
        if int(index) >= len(devices):
            raise UserError(f'device {device!r} was asked for, but there are only {len(devices)}, counted from 0')
        devices = [devices[int(index)]]
    if platform == 'auto' and devices[0].platform == 'cpu' and os.path.exists('/dev/nvidia0'):
        print('WARNING: this machine has an NVIDIA GPU, but JAX sees only the CPU; see requirements_jax.txt')
    if devices[0].platform == 'cpu':
        keep_freed_memory()
    jax.config.update('jax_default_device', next(d for d in devices if d.process_index == jax.process_index()))
    return devices


def on_host():
    """A context in which new arrays lie in the host's memory, not on the first accelerator, if JAX_PLATFORMS allows it."""
    try:
        return jax.default_device(jax.local_devices(backend='cpu')[0])
    except RuntimeError:
        return contextlib.nullcontext()


def keep_freed_memory():
    """Have glibc keep freed memory for the next step, in place of handing it back to the kernel; nothing elsewhere."""
    # a step's temporary memory comes from malloc, and above 32 MB it would be mapped, zeroed and unmapped at every step
    if machine.libc_ver()[0] == 'glibc':
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        mallopt(-2, 2 ** 28)  # M_TOP_PAD: it grows by 256 MB at a time


def enable_compilation_cache():
    """Keep compiled programs for the next start, in the user's cache folder; JAX_COMPILATION_CACHE_DIR wins."""
    # a damaged entry, or a full disk, costs a compilation and nothing else
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(home):  # the XDG standard has relative ones ignored
        home = os.path.join(os.path.expanduser('~'), '.cache')
    folder = os.path.join(home, 'nanogpt-jax', cpu_key())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        print(f'compiled programs are not kept for the next start: {e}')
        return
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    if importlib.util.find_spec('filelock'):  # which JAX needs to keep the folder small
        jax.config.update('jax_compilation_cache_max_size', 2 ** 31)


def cpu_key():
    """A name for this kind of CPU: a program compiled for one may crash another, and home folders are shared."""
    features = machine.machine() + machine.processor()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            features += next(line for line in f if line.lower().startswith(('flags', 'features')))
    except (OSError, StopIteration):
        pass  # not Linux, or a CPU of another kind
    return hashlib.sha256(features.encode()).hexdigest()[:16]


def attention_path(attention, compute_type, head_size, device):
    """'cudnn' or 'xla': where the attention of a model is computed, 'auto' being the faster one that this device has.

    cuDNN's kernel is there on NVIDIA GPUs from Ampere on, in 16 bits, for head sizes that are multiples of 8 up to 128.
    Raises UserError for what is unknown, and for 'cudnn' elsewhere.
    """
    if attention not in ('auto', 'cudnn', 'xla'):
        raise UserError(f'attention is {attention!r}; it must be auto, cudnn or xla')
    fits = ('nvidia' in device.device_kind.lower() and float(device.compute_capability) >= 8 and compute_type != 'float32'
            and head_size % 8 == 0 and head_size <= 128)
    if attention == 'cudnn' and not fits:
        raise UserError('cuDNN attention needs an NVIDIA GPU from Ampere on, bfloat16 or float16, and a head size that is a '
                        f'multiple of 8 up to 128; here it is {device.device_kind}, {compute_type} and {head_size}: use '
                        '--attention=xla or auto')
    return 'cudnn' if fits and attention != 'xla' else 'xla'


def compute_dtype(dtype, devices):
    """The compute type that `dtype` comes to on these devices: float32 on a CPU, as in nanoGPT."""
    GPTConfig(dtype=dtype)  # refuses a type that there is not
    return 'float32' if devices[0].platform == 'cpu' else dtype


# -----------------------------------------------------------------------------
# what a compiled program moves between devices

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}


def collectives(hlo, n_devices):
    """[(operation, bytes, devices, times, in a loop)] for the collective operations of a compiled program's HLO text:
    all-reduce, all-gather, reduce-scatter and so on; the bytes of the whole array, how many devices exchange it, and how
    often it runs, a loop of unknown length counting once."""
    bodies, name = {}, None
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.endswith('{'):
            name = re.match(r'(?:ENTRY )?%?([\w.-]+)', line)[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def group_size(line):
        listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)  # the first group of several alike
        counted = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
        named = re.search(r'replica_groups=mesh\[(.*?)\] *\{(.*?)\}', line)  # the axes of a mesh, and those exchanged over
        if named:
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))
        return len(listed[1].split(',')) if listed else int(counted[1]) if counted else n_devices

    def visit(name, times, in_loop):
        for line in bodies.get(name, ()):
            op = re.match(r'\s+(?:ROOT )?%?[\w.-]+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
                          r'collective-permute|collective-broadcast)(-start)?\(', line)
            if op:
                devices = group_size(line)
                n_bytes = sum(BYTES[kind] * math.prod(int(n) for n in shape.split(',') if n)
                              for kind, shape in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', op[1]))
                if op[3] and op[2] in ('all-gather', 'reduce-scatter'):  # the shard and the whole stand in its type
                    n_bytes = n_bytes * devices // (devices + 1)
                elif op[2] == 'reduce-scatter':
                    n_bytes *= devices
                found.append((op[2], n_bytes, devices, times, in_loop))
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            loop = re.search(r'\bbody=%?([\w.-]+)', line)
            if loop:
                visit(loop[1], times * int(trips[1]) if trips else times, True)
            for called in re.findall(r'\b(?:calls|to_apply)=%?([\w.-]+)', line):
                visit(called, times, in_loop)

    found = []
    visit(re.search(r'^ENTRY %?([\w.-]+)', hlo, re.M)[1], 1, False)
    return found
