"""
Plan a run on many devices without having them: compile the training step for a mesh of virtual ones, and print what each
would hold, compute and exchange, and from given speeds how long a step would take. All of it is predicted.
$ python plan_jax.py
$ python plan_jax.py --model=gpt2-xl --devices=8,64 --fsdp=8 --batch_size=4 --remat=True
"""

import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jax_transformer
from jax_devices import collectives, report_user_error, select_devices
from jax_train_utils import (
    batch_sharding, check_settings, create_optimizer, create_train_state, make_mesh, make_train_step, shardings, split_model,
)
from jax_transformer import GPT, HF_MODELS, GPTConfig, UserError

# -----------------------------------------------------------------------------
model = 'gpt2,gpt2-xl,7b' # gpt2, gpt2-medium, gpt2-large, gpt2-xl, 7b (32 layers, 4096 wide), or several with commas
devices = '8,64,256' # how many, or several numbers with commas
fsdp = 8 # so many of them share one copy of the training state
batch_size = 4 # rows that a device takes at a time
gradient_accumulation_steps = 8 # how often each device does, for one step
block_size = 1024
remat = False
dtype = 'bfloat16' # compute type: 'float32', 'bfloat16' or 'float16'
peak = 989.5e12 # FLOP/s of a device; an H100's in bfloat16
utilization = 0.4 # the share of the peak that one device alone reaches in training
fsdp_bandwidth = 450e9 # bytes/s that a device sends within its group of fsdp; an H100's NVLink, one direction
data_bandwidth = 50e9 # bytes/s that a device sends to other groups; one 400 Gbit/s adapter each
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

SHAPES = HF_MODELS | {'7b': (32, 32, 4096)} # n_layer, n_head, n_embd
sys.excepthook = report_user_error
sys.stdout.reconfigure(line_buffering=True)
check_settings(config)
models = model.split(',')
if not set(models) <= SHAPES.keys():
    raise UserError(f'model is {model!r}; it must be of {", ".join(SHAPES)}')
if not all(n.isdecimal() and int(n) >= 1 for n in devices.split(',')):
    raise UserError(f'devices is {devices!r}; it must be a number, or several with commas')
sizes = [int(n) for n in devices.split(',')]
if any(n % fsdp for n in sizes):
    raise UserError(f'fsdp={fsdp} must divide the numbers of devices, {devices}')
for name in ('peak', 'utilization', 'fsdp_bandwidth', 'data_bandwidth'):
    if config[name] <= 0:
        raise UserError(f'{name} is {config[name]}; it must be more than 0')
jax.config.update('jax_num_cpu_devices', max(sizes))
virtual = select_devices('cpu')


def moved(op, n_bytes, devices):
    """Bytes that a device sends in a collective operation over an array of n_bytes, by the ring algorithms."""
    return (2 if op == 'all-reduce' else 1) * n_bytes * (devices - 1) / devices


def compile_step(gptconf, mesh):
    """One micro-step and the update, compiled for the mesh from shapes alone."""
    tx = create_optimizer(lambda it: 1e-4, weight_decay=1e-1, betas=(0.9, 0.95), grad_clip=1.0)
    shapes = jax.eval_shape(lambda: create_train_state(GPT(gptconf, rngs=nnx.Rngs(0)), tx))
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings(shapes, mesh))
    batch = jax.ShapeDtypeStruct((1, batch_size * mesh.size, block_size), jnp.int32, sharding=batch_sharding(mesh, 3))
    iter_num = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    step = make_train_step(split_model(gptconf)[1], tx, 0, mesh)
    return step.lower(state, batch, batch, iter_num).compile(), shapes['params']


@jax.custom_vjp
def fused_attention(q, k, v):
    """In place of the fused kernel, which only a GPU's compiler knows: it keeps as much for the backward pass."""
    return q + k + v


def fused_attention_forward(q, k, v):
    y = fused_attention(q, k, v)
    return y, (q, k, v, y)


fused_attention.defvjp(fused_attention_forward, lambda kept, g: (g, g, g))
jax_transformer.fused_attention = fused_attention


def activation_bytes(gptconf, params):
    """What a micro-step keeps of its rows for the backward pass: by tracing alone, so more than XLA will need."""
    graphdef = split_model(gptconf)[1]

    def kept(n_rows):
        idx = jax.ShapeDtypeStruct((n_rows, block_size), jnp.int32)
        def backward(params, idx):
            return jax.vjp(lambda params: nnx.merge(graphdef, params)(idx, idx)[1], params)[1]
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(backward, params, idx)))
    return kept(2 * batch_size) - kept(batch_size) # the weights are among them, whatever the number of rows


def other_bytes(gptconf, params):
    """What a device holds beside the state: activations, weights gathered whole, their gradients, and its share of the
    gradients' sum."""
    n_params = sum(a.size for a in jax.tree.leaves(params))
    gathered = sum(a.size * (np.dtype(dtype).itemsize if path[-1].key == 'kernel' else 4)
                   for path, a in jax.tree_util.tree_leaves_with_path(params)) if fsdp > 1 else 0
    return activation_bytes(gptconf, params) + gathered + 4 * n_params + 4 * n_params // fsdp


print(f'{gradient_accumulation_steps} micro-steps of {batch_size} x {block_size} tokens per device and step, {dtype}, '
      f'remat {remat}, fsdp {fsdp}, {peak * utilization / 1e12:.0f} TFLOP/s, '
      f'{fsdp_bandwidth / 1e9:g} and {data_bandwidth / 1e9:g} GB/s')
print('| model | devices | tokens per step | GiB of state | GiB besides | TFLOP | GB over fsdp | GB over data | '
      'seconds per step | efficiency | compiled in |\n|' + ' --- |' * 11)
for name in models:
    n_layer, n_head, n_embd = SHAPES[name]
    gptconf = GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False, dtype=dtype,
                        remat=remat)
    for n in sizes:
        t0 = time.time()
        compiled, params = compile_step(gptconf, make_mesh(virtual[:n], fsdp))
        seconds = time.time() - t0
        n_params, state_bytes = sum(a.size for a in jax.tree.leaves(params)), compiled.memory_analysis().argument_size_in_bytes
        fused = replace(gptconf, attention='xla' if dtype == 'float32' else 'cudnn')
        traffic = {'fsdp': 0.0, 'data': 0.0}
        for op, n_bytes, group, times, _ in collectives(compiled.as_text(), n):
            # gathering weights and scattering gradients comes with every micro-step, the reduction with every step
            axis, often = ('data', times) if op == 'all-reduce' else ('fsdp', times * gradient_accumulation_steps)
            traffic[axis] += often * moved(op, n_bytes, group)
        tokens = gradient_accumulation_steps * batch_size * block_size # of one device
        flops = split_model(gptconf)[0].estimate_mfu(tokens // block_size, 1.0, peak_flops=1.0)
        compute = flops * (4 / 3 if remat else 1) / (peak * utilization) # the forward pass, a third of it, is done again
        fsdp_time, data_time = traffic['fsdp'] / fsdp_bandwidth, traffic['data'] / data_bandwidth
        # what moves over fsdp can be hidden behind the products; the reduction over data comes after the last of them
        best, worst = max(compute, fsdp_time) + data_time, compute + fsdp_time + data_time
        print(f'| {name} ({n_params / 1e6:,.0f}M) | {n} | {tokens * n:,} | {state_bytes / 2**30:.2f} | '
              f'{other_bytes(fused, params) / 2**30:.1f} | {flops / 1e12:.1f} | {traffic["fsdp"] / 1e9:.2f} | '
              f'{traffic["data"] / 1e9:.2f} | {best:.3f} to {worst:.3f} | {compute / best:.0%} to {compute / worst:.0%} | '
              f'{seconds:.0f} s |')
