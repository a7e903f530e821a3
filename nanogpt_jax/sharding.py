"""
How a training step is spread over devices: the mesh, the shardings of arrays, gathering sharded
parameters, and placing batches. The forward and backward passes communicate only in this file,
make_grad_fn and make_eval_step. Elsewhere, XLA's partitioner adds the scalar all-reduces of the
gradient norm.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanogpt_jax.errors import UserError

# -----------------------------------------------------------------------------
# the mesh

def make_mesh(devices, fsdp=1):
    """One mesh with the axes data and fsdp: groups of `fsdp` devices shard the training state."""
    shape = len(devices) // fsdp, fsdp
    return jax.make_mesh(shape, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=devices)


def choose_micro_batch_size(batch_size, block_size, n_embd, platform):
    """Max sequences per device per micro-step: batch_size, or fewer on a CPU."""
    if platform != 'cpu':
        return batch_size
    # a block's widest activation, (B, T, 4 n_embd) float32, should fit the CPU's caches: 4 MB
    return min(batch_size, max(1, 2 ** 18 // (block_size * n_embd)))


def split_global_batch(global_batch_size, micro_batch_size, n_devices, fsdp=1, n_processes=1):
    """Split the sequences of an optimizer step: (devices used, micro-steps per device).

    Uses the largest number of devices that divides the batch, in groups of fsdp, with equally many
    per process. Each device gets an equal share, in the fewest equal micro-batches of at most
    micro_batch_size sequences. Raises UserError if no number of devices divides the batch.
    """
    def possible_counts(fsdp):
        return [n for n in range(1, n_devices + 1)
                if global_batch_size % n == n % fsdp == n % n_processes == 0]
    used = max((n for n in possible_counts(fsdp) if n_devices % fsdp == 0), default=None)
    if used is None:
        sizes = [f for f in range(1, n_devices + 1) if n_devices % f == 0 and possible_counts(f)]
        hint = (f'with this batch fsdp can be {", ".join(map(str, sizes))}' if sizes else
                'make gradient_accumulation_steps * batch_size a multiple of the number of '
                'processes')
        raise UserError(f'{n_devices} devices of {n_processes} processes cannot split a global '
                        f'batch of {global_batch_size} sequences equally with fsdp={fsdp}; {hint}')
    share = global_batch_size // used
    divisors = {d for n in range(1, math.isqrt(share) + 1) if share % n == 0
                for d in (n, share // n)}
    return used, share // max(d for d in divisors if d <= micro_batch_size)


def select_mesh_devices(devices, n):
    """The first n of the devices, equally many from each process."""
    processes = sorted({d.process_index for d in devices})
    per_process = [[d for d in devices if d.process_index == p] for p in processes]
    return [d for own in per_process for d in own[:n // len(processes)]]


class Layout(NamedTuple):
    """How the sequences of an optimizer step are split over devices."""
    mesh: jax.sharding.Mesh
    global_batch_size: int  # sequences per optimizer step
    micro_steps: int  # per device and optimizer step
    micro_batch_size: int  # max sequences per device per micro-step


def choose_layout(devices, global_batch_size, micro_batch_size, fsdp=1):
    """The Layout on as many devices as divide the batch; see split_global_batch."""
    n_devices, micro_steps = split_global_batch(
        global_batch_size, micro_batch_size, len(devices), fsdp, jax.process_count())
    mesh = make_mesh(select_mesh_devices(devices, n_devices), fsdp)
    return Layout(mesh, global_batch_size, micro_steps, micro_batch_size)


# -----------------------------------------------------------------------------
# parameters and optimizer state

def partition_specs(tree, mesh):
    """A PartitionSpec for each array: sharded along the first dimension that fsdp divides.

    Arrays with fewer than two dimensions, or without such a dimension, are replicated. A parameter
    and its moments get the same spec.
    """
    n = mesh.shape['fsdp']

    def spec(a):
        if n == 1 or a.ndim < 2:
            return PartitionSpec()
        dim = next((d for d, size in enumerate(a.shape) if size % n == 0), None)
        return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, 'fsdp')
    return jax.tree.map(spec, tree)


def shardings(tree, mesh):
    """partition_specs as NamedShardings on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))


def state_bytes(state):
    """(bytes of a training state on one device, bytes of the full state)."""
    leaves = jax.tree.leaves(state)
    on_device = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    return on_device, sum(a.size * a.dtype.itemsize for a in leaves)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def all_gather_param(w, cast, dim):
    """The full parameter, gathered along dim from the shards `cast` on the devices of fsdp.

    cast: w in the dtype to gather; its gradient is zero. The gradient of w is reduce-scattered in
    w's dtype: it is summed over the devices, and each device keeps its shard.
    """
    return jax.lax.all_gather(cast, 'fsdp', axis=dim, tiled=True)


def _all_gather_param_backward(dim, w, g):
    g = jax.lax.psum_scatter(g.astype(w.dtype), 'fsdp', scatter_dimension=dim, tiled=True)
    # without the barrier, the TPU compiler accumulates full gradients and scatters them at the end
    return jax.lax.optimization_barrier(g), None


all_gather_param.defvjp(lambda w, cast, dim: (all_gather_param(w, cast, dim), w),
                        _all_gather_param_backward)


def cast_kernels(params, dtype):
    """The parameters to gather: kernels in `dtype`, all others in float32.

    Only matmuls use kernels, and they compute in that dtype anyway.
    """
    def cast(path, w):
        return w.astype(dtype) if path[-1].key == 'kernel' else w
    return jax.tree_util.tree_map_with_path(cast, params)


def gather_params(params, cast, specs):
    """All parameters in full, from one device's shards; cast: cast_kernels(params, dtype)."""
    def gather(w, cast, spec):
        return all_gather_param(w, cast, spec.index('fsdp')) if 'fsdp' in spec else w
    return jax.tree.map(gather, params, cast, specs)


# -----------------------------------------------------------------------------
# a loop over the blocks, which gathers one at a time

def stack_blocks(params, specs):
    """(params, specs) with the blocks stacked into one: arrays get a leading axis of n_layer.

    The specs are those of one block, without that axis.
    """
    h = params['transformer']['h']
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *h.values())
    return _with_blocks(params, stacked), _with_blocks(specs, specs['transformer']['h'][0])


def unstack_blocks(params):
    """The params before stack_blocks."""
    stacked = params['transformer']['h']
    n_layer = len(jax.tree.leaves(stacked)[0])
    return _with_blocks(params, {i: jax.tree.map(lambda a, i=i: a[i], stacked)
                                 for i in range(n_layer)})


def pop_blocks(params):
    """(params without the blocks, the blocks)."""
    others = dict(params['transformer'])
    h = others.pop('h')
    return params | {'transformer': others}, h


def _with_blocks(tree, h):
    return tree | {'transformer': tree['transformer'] | {'h': h}}


def scan_blocks(blocks, x, rngs, remat, stacked, gather=lambda params: params):
    """x (B, T, C) after all blocks, like run_blocks in jax_transformer.py, but by lax.scan.

    blocks: only their structure is used. stacked: stacked inputs of `gather`, which returns the
    params of one block. It runs in the forward pass and again in the backward pass, so that only
    one block is held in full.
    """
    graphdef = nnx.split(blocks[0], nnx.Param)[0]
    rngs_graphdef, rngs_state = nnx.split(rngs)

    def run_block(carry, params):
        x, rngs_state = carry
        rngs = nnx.merge(rngs_graphdef, rngs_state)
        x = nnx.merge(graphdef, gather(params))(x, rngs)
        return (x, nnx.state(rngs)), None

    # the loop keeps XLA from merging the two passes; no other barrier (prevent_cse) is needed
    run_block = jax.checkpoint(run_block, policy=None if remat else is_matmul, prevent_cse=False)
    return jax.lax.scan(run_block, (x, rngs_state), stacked)[0][0]


def is_matmul(primitive, *operands, **params):
    """A policy for jax.checkpoint: save the results of matmuls and of attention kernels.

    It saves neither gathered weights nor the results of elementwise operations, which XLA
    recomputes inside the matmuls of the backward pass.
    """
    policies = jax.checkpoint_policies
    return (policies.dots_saveable(primitive, *operands, **params)
            or policies.save_only_these_names('attention')(primitive, *operands, **params)
            or primitive.name == 'dot_product_attention_fwd_wrapper')  # cuDNN's, which has no name


# -----------------------------------------------------------------------------
# batches

def batch_sharding(mesh, ndim):
    """The sharding of arrays (..., B, T): B is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 2), ('data', 'fsdp')))


def shard_batch(mesh, *arrays):
    """Place arrays (..., B, T) on the devices; each process reads only its own devices' part."""
    return tuple(jax.make_array_from_callback(a.shape, batch_sharding(mesh, a.ndim), a.__getitem__)
                 for a in arrays)
