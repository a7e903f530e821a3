"""
Train a GPT on every device that JAX sees, from one CPU to several GPUs or a TPU.

To run with the defaults (GPT-2 124M on OpenWebText), or a small model on a CPU:
$ python train_jax.py
$ python train_jax.py config/train_pydoc_char.py
To change any setting below, and to resume a run:
$ python train_jax.py config/train_shakespeare_char.py --batch_size=32 --device=cpu
$ python train_jax.py --init_from=resume --out_dir=out-shakespeare-char
"""

import os
import sys
import time
from functools import partial

import jax
import numpy as np
import optax

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__))) # python -P and -I leave it out
import jax_train_utils as utils
from jax_transformer import GPT_ARGS, GPTConfig
from nanogpt_jax import devices as machine
from nanogpt_jax.checkpoint import quiet_orbax
from nanogpt_jax.errors import UserError, report_user_error
from nanogpt_jax.metrics import (
    StepLog, check_finite, check_wandb, progress, start_wandb,
)
from nanogpt_jax.launch import keep_stdout_open, start_processes
from nanogpt_jax.run_dir import MetricsFile, data_dir_of, hold_out_dir
from nanogpt_jax.signals import StopRequest
from nanogpt_jax.sharding import (
    choose_micro_batch_size, describe_small_micro_batches, mesh_for_batch, state_bytes,
)
from nanogpt_jax.tokenizer import find_vocabulary, load_vocabulary

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
keep_stdout_open()
quiet_orbax()
# -----------------------------------------------------------------------------
# defaults: GPT-2 (124M) on OpenWebText
# files and logging
out_dir = 'out_jax' # where checkpoints and metrics.jsonl are written
eval_interval = 2000 # iterations from one evaluation, and save, to the next
log_interval = 1 # iterations from one printed loss to the next
eval_iters = 200 # batches of each split in an evaluation
eval_only = False # evaluate once and exit, without touching out_dir
always_save_checkpoint = True # save after every evaluation; False: if the val loss has improved
init_from = 'scratch' # 'scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a
                      # folder with GPT-2 weights
# wandb logging
wandb_log = False # log to Weights & Biases
wandb_project = 'owt' # its project
wandb_run_name = 'gpt2' # the run's name there
# data
dataset = 'openwebtext' # a folder in data/
gradient_accumulation_steps = 5 * 8 # the global batch is this * batch_size sequences
batch_size = 12 # micro-batch size: the most sequences that a device processes at a time (on a CPU
                # fewer, if its caches hold fewer); also the size of an evaluation batch
block_size = 1024 # context length, in tokens
# model
n_layer = 12 # transformer blocks
n_head = 12 # attention heads; must divide n_embd
n_embd = 768 # width of the embeddings
dropout = 0.0 # 0 is good for pretraining, try 0.1+ for finetuning
bias = False # biases inside LayerNorm and Linear layers?
# adamw optimizer
learning_rate = 6e-4 # the peak
max_iters = 600000 # the last iteration
weight_decay = 1e-1 # of tensors with two or more dimensions
beta1 = 0.9 # decay of AdamW's mean of gradients
beta2 = 0.95 # and of its mean of their squares
grad_clip = 1.0 # maximum global norm of the gradient, 0.0 for no clipping
# learning rate decay
decay_lr = True # warmup and cosine decay; False: a constant learning rate
warmup_iters = 2000 # iterations of linear warmup
lr_decay_iters = 600000 # the last iteration of the decay; about max_iters, per Chinchilla
min_lr = 6e-5 # from then on; about learning_rate/10, per Chinchilla
# system
seed = 1337 # of the initial weights, the batches and dropout; from 0, below 2**32
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1' for one of several, 'tpu', or another
                # platform of JAX, such as 'rocm'
dtype = 'bfloat16' # compute dtype: 'float32', 'bfloat16', or 'float16' with dynamic loss scaling;
                   # by default float16 on a GPU without bfloat16. A CPU computes in float32
attention = 'auto' # 'cudnn' (NVIDIA GPUs), 'splash' (TPUs), 'xla' (any device), 'auto': the fastest
remat = False # recompute each block in the backward pass: less memory, a third more FLOPs
compilation_cache = True # cache compiled programs in the user's cache folder: faster next start
compile = True # no effect: XLA always compiles
fsdp = 1 # weights, gradients and optimizer state are sharded across groups of this many devices
heartbeat_timeout = 100 # seconds of silence after which one of several processes counts as dead
backend = 'nccl' # no effect: XLA chooses the communication library
from configurator import configure
config, given = configure(globals()) # all settings, and the names of those that were given
# -----------------------------------------------------------------------------

# processes and devices first: JAX must know --device before anything uses it
rank = start_processes(device, heartbeat_timeout)
if rank == 0 and not eval_only:
    hold_out_dir(out_dir, resume=init_from == 'resume') # no other run writes there
devices = machine.select_devices(device)
if compilation_cache:
    machine.enable_compilation_cache()
print(f'platform: {devices[0].platform}, devices: {len(devices)} ({devices[0].device_kind}), '
      f'processes: {jax.process_count()}')
for key in sorted(given & {'compile', 'backend'}):
    print(f'--{key} has no counterpart here and is ignored: XLA always compiles, '
          'and has its own communication')

def resume():
    """Take the settings that were not given from the latest valid checkpoint.

    Returns (iteration, meta) of it.
    """
    global config
    step, saved = checkpoints.latest_meta()
    print(f'Resuming training from {out_dir}, from iteration {step}')
    config, differs = utils.merge_resumed_config(config, given, saved['config'])
    globals().update(config)
    if differs:
        print(f'differs from the checkpoint: {differs}')
    return step, saved

checkpoints = None
if not eval_only or init_from == 'resume':
    checkpoints = utils.Checkpoints(out_dir, read_only=eval_only) # fails early
iter_num, best_val_loss, saved = 0, 1e9, None
if init_from == 'resume':
    iter_num, saved = resume()
    if iter_num > max_iters and not eval_only:
        print(f'nothing left to train: {out_dir} is at iteration {iter_num}, past {max_iters=}')
        sys.exit()
elif not eval_only and (steps := checkpoints.steps()):
    raise UserError(f'{out_dir} holds checkpoints of another run (iteration {steps[-1]}): resume '
                    'it with --init_from=resume, or choose another --out_dir')
utils.check_settings(config)
if not eval_only:
    checkpoints.check_free({n for n in (*range(0, max_iters + 1, eval_interval), max_iters + 1)
                            if n > iter_num})

# how a global batch is split over the devices
global_batch_size = gradient_accumulation_steps * batch_size
micro_batch_size = choose_micro_batch_size(batch_size, block_size, n_embd, devices[0].platform)
mesh, grad_accum_steps = mesh_for_batch(devices, global_batch_size, micro_batch_size, fsdp)
if mesh.size < len(devices):
    print(f'using {mesh.size} of {len(devices)} devices: a global batch of {global_batch_size} '
          'sequences does not divide evenly across more')
if cost := describe_small_micro_batches(
        global_batch_size, micro_batch_size, mesh.size, grad_accum_steps):
    print(cost)
tokens_per_iter = global_batch_size * block_size
print(f'tokens per iteration will be: {tokens_per_iter:,}')
compute_type = machine.compute_dtype(dtype, devices, 'dtype' in given)
if compute_type != dtype:
    print(f'computing in {compute_type}, as nanoGPT does on this device, not in {dtype}')

# data
data_dir = data_dir_of(dataset)
for split in ('train', 'val'):
    utils.count_tokens(data_dir, split, block_size) # complains now, not at the first evaluation
meta_vocab_size, vocabulary = load_vocabulary(data_dir) # None, None: GPT-2's BPE
if meta_vocab_size is not None:
    print(f'found vocab_size = {meta_vocab_size} (inside {find_vocabulary(data_dir)})')
    if saved and saved['chars'] and saved['chars'] != vocabulary:
        raise UserError(f'{out_dir} was trained on other characters or tokens than those of '
                        f'{data_dir}: use the --dataset that it was trained on')
elif saved:
    vocabulary = saved['chars']
vocab_size = saved['model_args']['vocab_size'] if saved else meta_vocab_size or 50304
utils.check_tokens(data_dir, vocab_size)

# only process 0 logs, and evaluating a checkpoint is not a run of its own
wandb_log = wandb_log and rank == 0 and not (eval_only and 'wandb_log' not in given)
if wandb_log:
    check_wandb() # complains before the model is built

def create_state():
    """Returns (training state on the mesh's devices, model_args) for init_from."""
    global iter_num, best_val_loss, saved
    model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                      bias=bias, vocab_size=vocab_size, dropout=dropout)
    if init_from == 'scratch':
        print('Initializing a new model from scratch')
        if meta_vocab_size is None:
            print('defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)')
        return utils.init_train_state(GPTConfig(**model_args), tx, seed, mesh), model_args
    if init_from == 'resume':
        # only now are the arrays read: if they are damaged, an earlier checkpoint is resumed
        latest = iter_num
        iter_num, saved, state = checkpoints.load('latest', lambda saved:
            utils.abstract_train_state(GPTConfig(**saved['model_args']), tx, mesh))
        best_val_loss = checkpoints.best_val_loss(config)
        if iter_num < latest:
            print(f'Resuming training from {out_dir}, from iteration {iter_num}')
        model_args = saved['model_args'] | dict(dropout=dropout)
        if block_size < model_args['block_size']:
            state = utils.crop_state(state, block_size, mesh)
            model_args['block_size'] = block_size
        return state, model_args
    if init_from.startswith('gpt2') or os.path.isdir(init_from):
        whose = 'GPT-2' if os.path.isdir(init_from) else 'OpenAI GPT-2'
        print(f'Initializing from {whose} weights: {init_from}')
        state, gptconf = utils.load_pretrained(init_from, tx, mesh, block_size, dropout)
        return state, {name: getattr(gptconf, name) for name in GPT_ARGS}
    raise UserError(f"init_from is {init_from!r}; it must be 'scratch', 'resume', 'gpt2', "
                    "'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with config.json and "
                    'model.safetensors')

# model and optimizer
schedule = utils.create_learning_rate_schedule(
    learning_rate, warmup_iters, lr_decay_iters, min_lr, decay_lr)
tx = utils.create_optimizer(schedule, weight_decay, (beta1, beta2), grad_clip)
state, model_args = create_state()
config |= {k: v for k, v in model_args.items() if k in config} # of pretrained weights
vocab_size = model_args['vocab_size'] # of pretrained weights
if meta_vocab_size and meta_vocab_size > vocab_size:
    raise UserError(f'{find_vocabulary(data_dir)} has {meta_vocab_size} tokens, the model only '
                    f'{vocab_size}: use the data that it was trained on, or --init_from=scratch')
get_batch = partial(utils.get_train_batch, mesh, data_dir, global_batch_size, grad_accum_steps,
                    block_size, seed, vocab_size=vocab_size) # iter_num -> x, y
attention = machine.attention_path(
    attention, compute_type, model_args['n_embd'] // model_args['n_head'], devices[0])
if attention != 'xla' and dropout > 0:
    print(f'attention: {attention} in evaluation, xla in training: '
          'the fused kernel has no dropout in JAX')
gptconf = GPTConfig(**model_args, dtype=compute_type, attention=attention, remat=remat)
model, train_graphdef, eval_graphdef = utils.split_model(gptconf)
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')
for name, tensors in zip(('decayed', 'non-decayed'), utils.decay_groups(state['params'])):
    print(f'num {name} parameter tensors: {len(tensors)}, '
          f'with {sum(p.size for p in tensors):,} parameters')
on_device, full = (n_bytes / 1e6 for n_bytes in state_bytes(state))
print(f"mesh: data {mesh.shape['data']} x fsdp {fsdp}, {on_device:,.1f} MB of the {full:,.1f} MB "
      'of training state on each device')
peak = mesh.size * machine.peak_flops(devices[0]) # nan if it is not known
print(machine.describe_peak(devices[0], mesh.size))
if wait := machine.describe_wait(
        devices[0], model.estimate_mfu(global_batch_size, 1.0, 1.0), global_batch_size,
        2 * eval_iters * batch_size, gradient_accumulation_steps):
    print(wait)

# the jitted steps
train_step = utils.make_train_step(
    train_graphdef, tx, seed, mesh, scale_loss=compute_type == 'float16')
eval_step = utils.make_eval_step(eval_graphdef, mesh)

# logging
# a resumed run keeps its wandb id, which is in its checkpoints even if wandb_log was off meanwhile
run_id = saved['config'].get('wandb_run_id') if saved and not eval_only else None
if wandb_log:
    wandb, run_id = start_wandb(wandb_project, wandb_run_name, config, run_id)
if run_id:
    config['wandb_run_id'] = run_id

def evaluate(stopped=lambda: False, mfu=-1.0, **last_step):
    """Compute, log and return the losses of both splits; None as soon as stopped() is true."""
    losses = utils.estimate_loss(eval_step, state['params'], mesh, data_dir, eval_iters, batch_size,
                                 block_size, micro_batch_size, progress, vocab_size, stopped)
    if losses is None:
        return None
    print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    if wandb_log:
        wandb.log({'iter': iter_num, 'train/loss': losses['train'], 'val/loss': losses['val'],
                   'lr': float(schedule(iter_num)), **last_step,
                   **({} if np.isnan(mfu) else {'mfu': mfu * 100})}) # in percent
    return losses

def meta():
    return dict(iter_num=iter_num, best_val_loss=best_val_loss, model_args=model_args,
                config=config, chars=vocabulary)

if eval_only:
    evaluate()
    sys.exit()

# metrics; opened this late so that a mistake above leaves the earlier ones
metrics_file = MetricsFile(out_dir, iter_num) if rank == 0 else None

# compile
stop = StopRequest() # signals end the loop before its next iteration
batch = get_batch(iter_num)
t0 = time.time()
train_step = train_step.lower(state, *batch, np.int32(iter_num)).compile()
print(f'compiled in {time.time() - t0:.1f} s')

# training loop
start_iter = iter_num
log = StepLog(start_iter, max_iters, eval_interval, tokens_per_iter,
              lambda dt: model.estimate_mfu(global_batch_size, dt, peak),
              schedule, metrics_file, checkpoints.describe_valid)
with stop, checkpoints, log: # closes them at the end
    while iter_num <= max_iters and not stop.reached():

        # every eval_interval: the losses of both splits, and a checkpoint
        if iter_num % eval_interval == 0:
            log.flush()
            jax.block_until_ready(state)
            log.pause()
            losses = evaluate(stop.reached, log.running_mfu, **log.last_step)
            if losses is None: # a signal has broken it off
                break
            log.evaluated(iter_num, losses)
            improved = losses['val'] < best_val_loss
            if improved or always_save_checkpoint:
                best_val_loss = min(losses['val'], best_val_loss)
                if init_from == 'resume' and iter_num == start_iter: # saved already
                    checkpoints.record_val_loss(iter_num, losses['val'], config)
                elif iter_num > 0:
                    print(f'saving checkpoint to {out_dir}')
                    checkpoints.save(state, meta(), losses['val'])
            log.resume()

        # one optimizer step; while the devices compute it, prepare the next batch on the host and
        # log the step before
        state, metrics = train_step(state, *batch, np.int32(iter_num))
        batch = get_batch(iter_num + 1)
        log.flush()
        checkpoints.check() # for an error in the background
        if iter_num % log_interval == 0:
            log.queue(iter_num, metrics)
        iter_num += 1

    # save the last iteration too
    log.flush()
    if iter_num > start_iter:
        norm = jax.jit(optax.tree.norm)(state['params'])
        check_finite(iter_num, {'norm of the weights': norm}, checkpoints.describe_valid)
        print(f'saving checkpoint to {out_dir}')
        checkpoints.save(state, meta())
if stop.signum and checkpoints.steps():
    print(f'stopped by {stop.signum.name} before iteration {iter_num}; '
          f'resume with: python train_jax.py --init_from=resume --out_dir={out_dir}')
print(f'training waited {checkpoints.blocked:.2f} s for {checkpoints.saves} checkpoints')
sys.exit(stop.exit_code)
