"""
Predict how a step scales to many devices by a model of bytes and FLOPs, without their compiler (for
that see tools.plan): compile the training step for a mesh of virtual CPU devices, and count what
each device stores, computes and sends.
$ python -m tools.scaling
$ python -m tools.scaling --model=gpt2-xl --n_devices=8,64 --fsdp=8 --batch_size=4 --remat=True
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_train_utils import (
    abstract_train_state, check_settings, create_optimizer, make_train_step, split_model,
)
from jax_transformer import GPTConfig
from nanogpt_jax.devices import select_devices
from nanogpt_jax.errors import UserError, report_user_error
from nanogpt_jax.pretrained import GPT2_SHAPES
from nanogpt_jax.sharding import batch_sharding, make_mesh
from tools import print_table
from tools.hlo import collectives

sys.excepthook = report_user_error
# -----------------------------------------------------------------------------
model = 'gpt2,gpt2-xl,7b' # gpt2, gpt2-medium, gpt2-large, gpt2-xl, 7b (32 layers, 4096 wide)
n_devices = '8,64,256' # like model one value, or several with commas
fsdp = 8 # number of devices that the training state is sharded across
batch_size = 4 # sequences of a micro-step on each device
gradient_accumulation_steps = 8 # micro-steps of a step on each device
block_size = 1024
remat = False # recompute each block in the backward pass, to save memory
dtype = 'bfloat16' # compute type: 'float32', 'bfloat16' or 'float16'
peak = 989.5e12 # FLOP/s of a device; an H100's in bfloat16
utilization = 0.4 # fraction of the peak that a single device reaches in training
fsdp_bandwidth = 450e9 # bytes/s sent by a device within its fsdp group; an H100's NVLink, one way
data_bandwidth = 50e9 # bytes/s sent by a device to other groups; one 400 Gbit/s adapter each
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

SHAPES = GPT2_SHAPES | {'7b': (32, 32, 4096)}  # n_layer, n_head, n_embd
sys.stdout.reconfigure(line_buffering=True)
check_settings(config)
models, counts = model.split(','), n_devices.split(',')
if not set(models) <= SHAPES.keys():
    raise UserError(f'model is {model!r}; it must be of {", ".join(SHAPES)}')
if not all(n.isdecimal() and len(n) <= 4 and int(n) >= 1 for n in counts):
    raise UserError(f'n_devices is {n_devices!r}; it must be a number from 1 to 9999, or several '
                    'with commas')
counts = [int(n) for n in counts]
if any(n % fsdp for n in counts):
    raise UserError(f'n_devices is {n_devices!r}; each number must be a multiple of fsdp={fsdp}')
for name in ('peak', 'utilization', 'fsdp_bandwidth', 'data_bandwidth'):
    if config[name] <= 0:
        raise UserError(f'{name} is {config[name]}; it must be more than 0')
jax.config.update('jax_num_cpu_devices', max(counts))
virtual_devices = select_devices('cpu')


# -----------------------------------------------------------------------------
# state and communication, from the compiled program

def compile_step(gptconf, mesh):
    """A step with a single micro-step, compiled for the mesh from shapes alone."""
    tx = create_optimizer(lambda it: 1e-4, weight_decay=1e-1, betas=(0.9, 0.95), grad_clip=1.0)
    batch = jax.ShapeDtypeStruct((1, batch_size * mesh.size, block_size), jnp.int32,
                                 sharding=batch_sharding(mesh, 3))
    iter_num = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    step = make_train_step(split_model(gptconf)[1], tx, 0, mesh)
    return step.lower(abstract_train_state(gptconf, tx, mesh), batch, batch, iter_num).compile()


def ring_bytes(op, n_bytes, devices):
    """Bytes that each device sends in a collective operation on an array of n_bytes, with the ring
    algorithms."""
    return (2 if op == 'all-reduce' else 1) * n_bytes * (devices - 1) / devices


def count_traffic(compiled, n):
    """Bytes that each of n devices sends in a step: (within its fsdp group, to other groups)."""
    over_fsdp, over_data = 0.0, 0.0
    for op, n_bytes, devices, count, _ in collectives(compiled.as_text(), n):
        sent = count * ring_bytes(op, n_bytes, devices)
        if op == 'all-reduce':  # of the gradients, once per step
            over_data += sent
        else:  # weights are gathered and gradients scattered in every micro-step
            over_fsdp += gradient_accumulation_steps * sent
    return over_fsdp, over_data


# -----------------------------------------------------------------------------
# other memory, from the model's shapes: the program compiled for a CPU differs from a GPU's

@jax.custom_vjp
def fused_attention(q, k, v):
    """Stands in for cuDNN's kernel, which only a GPU has: saves as much for the backward pass."""
    return q + k + v


def fused_attention_forward(q, k, v):
    y = fused_attention(q, k, v)
    return y, (q, k, v, y)


fused_attention.defvjp(fused_attention_forward, lambda saved, g: (g, g, g))


def activation_bytes(gptconf):
    """Bytes that a micro-step saves for the backward pass, found by tracing; XLA needs fewer."""
    abstract_model = split_model(gptconf)[0]
    if dtype != 'float32':
        for block in abstract_model.transformer.h:
            block.attn.fused = fused_attention
    graphdef, params = nnx.split(abstract_model, nnx.Param)

    def saved(n_sequences):
        idx = jax.ShapeDtypeStruct((n_sequences, block_size), jnp.int32)
        def backward(params, idx):
            return jax.vjp(lambda params: nnx.merge(graphdef, params)(idx, idx)[1], params)[1]
        leaves = jax.tree.leaves(jax.eval_shape(backward, params, idx))
        return sum(a.size * a.dtype.itemsize for a in leaves)
    return saved(2 * batch_size) - saved(batch_size)  # the difference leaves out the weights


def other_bytes(gptconf):
    """Bytes on a device besides the state: activations, gathered weights, their gradients, and its
    shard of the sum of the gradients."""
    params = nnx.to_flat_state(nnx.state(split_model(gptconf)[0], nnx.Param))
    n_params = sum(p.size for _, p in params)
    gathered = sum(p.size * (np.dtype(dtype).itemsize if path[-1] == 'kernel' else 4)
                   for path, p in params) if fsdp > 1 else 0
    return activation_bytes(gptconf) + gathered + 4 * n_params + 4 * n_params // fsdp


# -----------------------------------------------------------------------------
# the table

HEAD = ['model', 'devices', 'tokens per step', 'GiB of state', 'other GiB', 'TFLOP',
        'GB over fsdp', 'GB over data', 'seconds per step', 'efficiency']


def plan(name, n):
    """A row of the table: a model on n devices."""
    n_layer, n_head, n_embd = SHAPES[name]
    gptconf = GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                        bias=False, dtype=dtype, remat=remat)
    abstract_model = split_model(gptconf)[0]
    n_params = abstract_model.get_num_params(non_embedding=False)
    t0 = time.time()
    compiled = compile_step(gptconf, make_mesh(virtual_devices[:n], fsdp))
    print(f'{name} on {n} devices: compiled in {time.time() - t0:.0f} s')
    state_bytes = compiled.memory_analysis().argument_size_in_bytes

    n_sequences = gradient_accumulation_steps * batch_size  # on each device
    flops = abstract_model.estimate_mfu(n_sequences, 1.0, peak_flops=1.0)
    # remat repeats the forward pass, a third of the FLOPs
    compute_time = flops * (4 / 3 if remat else 1) / (peak * utilization)
    over_fsdp, over_data = count_traffic(compiled, n)
    fsdp_time, data_time = over_fsdp / fsdp_bandwidth, over_data / data_bandwidth
    # traffic over fsdp can overlap with the matmuls; the all-reduce over data comes after them
    best = max(compute_time, fsdp_time) + data_time
    worst = compute_time + fsdp_time + data_time
    return [f'{name} ({n_params / 1e6:,.0f}M)', n, f'{n_sequences * block_size * n:,}',
            f'{state_bytes / 2**30:.2f}', f'{other_bytes(gptconf) / 2**30:.1f}',
            f'{flops / 1e12:.1f}', f'{over_fsdp / 1e9:.2f}', f'{over_data / 1e9:.2f}',
            f'{best:.3f} to {worst:.3f}',
            f'{compute_time / best:.0%} to {compute_time / worst:.0%}']


print(f'each device computes {gradient_accumulation_steps} micro-steps of {batch_size} x '
      f'{block_size} tokens per step, {dtype}, remat {remat}, fsdp {fsdp}, at '
      f'{peak * utilization / 1e12:.0f} TFLOP/s, {fsdp_bandwidth / 1e9:g} GB/s over fsdp and '
      f'{data_bandwidth / 1e9:g} GB/s over data')
rows = [plan(name, n) for name in models for n in counts]
print()
print_table(HEAD, rows)
