"""
Compile for devices that you don't have: TPUs by libtpu, NVIDIA GPUs by JAX's CUDA plugin and a
description of the device. Both count memory. libtpu also estimates clock cycles.
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jax_train_utils import (
    abstract_train_state, create_optimizer, make_train_step, split_model,
)
from nanogpt_jax.devices import select_devices
from nanogpt_jax.errors import UserError
from nanogpt_jax.sharding import batch_sharding

# -----------------------------------------------------------------------------
# the devices


class TPU(NamedTuple):
    host: str  # the smallest topology that has a chip
    memory: float  # GiB that a program can use on a device, by libtpu's error when it is too large
    clock: float  # GHz: PEAK_FLOPS divided by the FLOPs of a cycle, 2^17 or a multiple of it


TPUS = {
    'v5e': TPU('1x1', 15.75, 1.5), 'v5p': TPU('2x2x1', 95.73, 1.75),
    'v6e': TPU('1x1', 31.24, 1.75), 'tpu7x': TPU('2x2x1', 94.74, 2.2),
}


class GPU(NamedTuple):
    kind: str  # JAX's device_kind
    capability: str  # CUDA compute capability
    memory: float  # GiB, as CUDA reports it
    n_sm: int  # streaming multiprocessors
    clock: float  # GHz
    bandwidth: int  # of its memory, GB/s
    l2: int  # cache, MiB


# from NVIDIA's data sheets and white papers
GPUS = {
    'v100': GPU('Tesla V100-SXM2-16GB', '7.0', 15.77, 80, 1.53, 900, 6),
    't4': GPU('Tesla T4', '7.5', 14.74, 40, 1.59, 320, 4),
    'a100': GPU('NVIDIA A100-SXM4-40GB', '8.0', 39.42, 108, 1.41, 1555, 40),
    'a100-80gb': GPU('NVIDIA A100-SXM4-80GB', '8.0', 79.25, 108, 1.41, 2039, 40),
    'rtx3090': GPU('NVIDIA GeForce RTX 3090', '8.6', 23.69, 82, 1.70, 936, 6),
    'a10g': GPU('NVIDIA A10G', '8.6', 22.19, 80, 1.71, 600, 6),
    'a6000': GPU('NVIDIA RTX A6000', '8.6', 47.54, 84, 1.80, 768, 6),
    'l4': GPU('NVIDIA L4', '8.9', 22.05, 58, 2.04, 300, 48),
    'l40s': GPU('NVIDIA L40S', '8.9', 44.4, 142, 2.52, 864, 96),
    'rtx4090': GPU('NVIDIA GeForce RTX 4090', '8.9', 23.65, 128, 2.52, 1008, 72),
    'h100': GPU('NVIDIA H100 80GB HBM3', '9.0', 79.11, 132, 1.98, 3352, 50),
    'h200': GPU('NVIDIA H200', '9.0', 141.0, 132, 1.98, 4800, 50),
    'b200': GPU('NVIDIA B200', '10.0', 178.36, 148, 1.965, 7700, 126),
    'rtx5090': GPU('NVIDIA GeForce RTX 5090', '12.0', 31.36, 170, 2.41, 1792, 96),
}
# {compute capability: (KiB of shared memory per multiprocessor and per block, threads and FP32
# units per multiprocessor)}, from the CUDA programming guide
MULTIPROCESSORS = {
    '7.0': (96, 96, 2048, 64), '7.5': (64, 64, 1024, 64), '8.0': (164, 163, 2048, 64),
    '8.6': (100, 99, 1536, 128), '8.9': (100, 99, 1536, 128), '9.0': (228, 227, 2048, 128),
    '10.0': (228, 227, 2048, 128), '12.0': (100, 99, 1536, 128),
}


def gpu_description(gpu):
    """A GPU as the text of XLA's GpuTargetConfigProto."""
    shared, of_block, threads, fpus = MULTIPROCESSORS[gpu.capability]
    major, minor = gpu.capability.split('.')
    # the tensor cores of Hopper and Blackwell need instructions of their own generation only
    feature = 'ACCELERATED_FEATURES' if int(major) in (9, 10) else 'NONE'
    return f'''gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  core_count: {gpu.n_sm} fpus_per_core: {fpus} clock_rate_ghz: {gpu.clock}
  device_memory_size: {int(gpu.memory * 2 ** 30)} memory_bandwidth: {gpu.bandwidth * 10 ** 9}
  l2_cache_size: {gpu.l2 * 2 ** 20} shared_memory_per_core: {shared * 2 ** 10}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {of_block * 2 ** 10}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.kind}"'''


# -----------------------------------------------------------------------------
# their compilers

def target_devices(target):
    """The devices of a target such as v5e (one chip), v5e:2x4, h100, h100:8 or cpu:8.

    Raises UserError for an unknown target, and if its compiler is not installed.
    """
    name, _, size = target.lower().partition(':')
    n = int(size or 1) if re.fullmatch('[0-9]{0,4}', size) else 0
    if name == 'cpu' and n:
        jax.config.update('jax_num_cpu_devices', n)
        return select_devices('cpu')
    # programs for a device that you don't have cannot be read back
    jax.config.update('jax_enable_compilation_cache', False)
    if name in TPUS:
        need('libtpu', 'jax[tpu]')
        select_devices('cpu')  # keeps JAX from looking for a TPU or GPU
        return tpu_devices(name, size)
    if name in GPUS and n:
        need('jax_plugins', 'jax[cuda12]')
        select_devices('cpu')
        return gpu_devices(GPUS[name], n)
    raise UserError(f'target is {target!r}; it must be one of {", ".join(TPUS)}, with a topology '
                    f'as in v5e:2x4, or of {", ".join(GPUS)} and cpu, with a number as in h100:8')


def need(module, package):
    """Raise UserError if a compiler is not installed."""
    if not importlib.util.find_spec(module):
        raise UserError('to compile for this target, install its compiler: pip install -U '
                        f'"{package}" -r requirements_jax.txt (no such device is needed)')


def tpu_devices(name, topology):
    """The devices of a TPU topology; of one chip if topology is ''."""
    # libtpu must not look for a TPU here, nor keep other processes out
    os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    shape = topology or TPUS[name].host
    single = {'chips_per_host_bounds': (1, 1, 1)} if shape == '1x1' else {}
    try:
        devices = topologies.get_topology_desc(f'{name}:{shape}', 'tpu', **single).devices
    except (RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f'libtpu has no topology {name}:{shape} ({reason})') from e
    return [d for d in devices if topology or d.coords == devices[0].coords]


def gpu_devices(gpu, n):
    """n GPUs, in machines of eight."""
    hosts, of_host = (n // 8, 8) if n > 8 else (1, n)
    return topologies.get_topology_desc(
        '', 'cuda', target_config=gpu_description(gpu), topology=f'1x{hosts}x{of_host}').devices


def usable_memory(target):
    """(bytes that a program can use on a device of a target, a note on what sets it)."""
    name = target.lower().partition(':')[0]
    if name == 'cpu':
        return math.inf, ''  # virtual devices share the machine's memory
    if name in TPUS:
        return TPUS[name].memory * 2 ** 30, 'by libtpu'
    # the variables that the CUDA plugin reads
    fraction = float(os.environ.get('XLA_CLIENT_MEM_FRACTION')
                     or os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION') or 0.75)
    memory = GPUS[name].memory
    return memory * fraction * 2 ** 30, f'XLA_CLIENT_MEM_FRACTION {fraction:g} of {memory:g}'


def compile_step(gptconf, mesh, micro_steps, micro_batch_size):
    """The training step compiled for a mesh, with micro_batch_size sequences on each device."""
    tx = create_optimizer(lambda it: 1e-4, weight_decay=1e-1, betas=(0.9, 0.95), grad_clip=1.0)
    batch = jax.ShapeDtypeStruct(
        (micro_steps, micro_batch_size * mesh.size, gptconf.block_size), jnp.int32,
        sharding=batch_sharding(mesh, 3))
    iter_num = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    step = make_train_step(split_model(gptconf).train_graphdef, tx, 0, mesh,
                           scale_loss=gptconf.dtype == 'float16')
    lowered = step.lower(abstract_train_state(gptconf, tx, mesh), batch, batch, iter_num)
    return lowered.compile(compiler_options(mesh.devices.flat[0]))


def compiler_options(device):
    """Compiler options for a device that you don't have: autotuning would time kernels on it."""
    return {'xla_gpu_autotune_level': 0} if device.platform == 'gpu' else None


def largest_fit(measure, memory, n, n_bytes):
    """The largest micro-batch that needs at most `memory` bytes, by bisection; 0 if none does.

    measure: sequences to bytes, by compiling; inf if they do not fit. n_bytes: those of n.
    """
    fits, too_many = (n, math.inf) if n_bytes <= memory else (0, n)
    while fits + 1 < too_many:
        n = 2 * fits if too_many == math.inf else (fits + too_many) // 2
        if measure(n) <= memory:
            fits = n
        else:
            too_many = n
    return fits
