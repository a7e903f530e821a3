"""
Train a GPT on every device that JAX sees, from one CPU to several GPUs or a TPU.

To run with the defaults (GPT-2 124M on OpenWebText), or a small model on a CPU:
$ python train_jax.py
$ python train_jax.py config/train_pydoc.py
To change any setting below, and to resume a run:
$ python train_jax.py config/train_shakespeare_char.py --batch_size=32 --device=cpu
$ python train_jax.py --init_from=resume --out_dir=out-shakespeare-char
New to JAX? TORCH_TO_JAX_MAPPING.md begins with its lessons; docs/design.md follows one step.
"""

import os
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import optax

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__))) # python -P and -I leave it out
import jax_train_utils as utils
from jax_transformer import GPT_ARGS, GPTConfig, model_args
from nanogpt_jax.checkpoint import gather, quiet_orbax, should_save
from nanogpt_jax.devices import (
    attention_path, compute_dtype, describe_peak, enable_compilation_cache, peak_flops,
    select_devices,
)
from nanogpt_jax.errors import UserError, report_user_error
from nanogpt_jax.launch import keep_stdout_open, start_processes
from nanogpt_jax.run_dir import MetricsFile, data_dir_of, hold_out_dir
from nanogpt_jax.sharding import choose_layout, choose_micro_batch_size, state_bytes
from nanogpt_jax.signals import StopRequest
from nanogpt_jax.tokenizer import find_vocabulary, load_vocabulary

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
keep_stdout_open() # a closed terminal or pipe does not end the run
quiet_orbax() # it logs at length what it raises as well
# -----------------------------------------------------------------------------
# defaults: GPT-2 (124M) on OpenWebText
# files and logging
out_dir = 'out_jax' # where checkpoints and metrics.jsonl are written
eval_interval = 2000 # iterations between evaluations, each with a checkpoint
log_interval = 1 # iterations between printed losses
eval_iters = 200 # batches of each split per evaluation, the same ones each time
eval_only = False # evaluate once and exit; writes nothing
always_save_checkpoint = True # save after every evaluation; False: save only improvements
init_from = 'scratch' # 'scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a
                      # folder with GPT-2 weights
# wandb logging
wandb_log = False # log to Weights & Biases
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext' # a folder in data/
gradient_accumulation_steps = 5 * 8 # the global batch is this * batch_size sequences, on any
                                    # number of devices
batch_size = 12 # max sequences per device per micro-step; on a CPU fewer, to stay in its caches
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
beta1 = 0.9 # decay of the first moment
beta2 = 0.95 # decay of the second moment
grad_clip = 1.0 # maximum global norm of the gradient, 0.0 for no clipping
# learning rate decay
decay_lr = True # warmup and cosine decay; False: a constant learning rate
warmup_iters = 2000 # iterations of linear warmup
lr_decay_iters = 600000 # the last iteration of the decay; about max_iters, per Chinchilla
min_lr = 6e-5 # the learning rate from then on; about learning_rate/10, per Chinchilla
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
fsdp = 1 # shard weights, gradients and optimizer state across groups of this many devices
heartbeat_timeout = 100 # declare a process dead after this many seconds without a heartbeat
backend = 'nccl' # no effect: XLA chooses the communication library
from configurator import configure, override # --help prints the lines above
config, given = configure(globals()) # all settings, and the names of those that were given
# -----------------------------------------------------------------------------

# processes and devices first: JAX must know --device before anything uses it
rank = start_processes(device, heartbeat_timeout)
if rank == 0 and not eval_only:
    hold_out_dir(out_dir, resume=init_from == 'resume') # lock it against other runs
devices = select_devices(device)
if compilation_cache:
    enable_compilation_cache()
print(f'platform: {devices[0].platform}, devices: {len(devices)} ({devices[0].device_kind}), '
      f'processes: {jax.process_count()}')
utils.check_same_settings(gather(config))
for key in sorted(given & {'compile', 'backend'}):
    print(f'--{key} has no effect: XLA always compiles and chooses its communication library')

# checkpoints: resume the latest one, or make sure that out_dir has none
if init_from == 'resume' or not eval_only:
    checkpoints = utils.Checkpoints(out_dir, read_only=eval_only)
if init_from == 'resume':
    latest, saved = checkpoints.latest_meta()
    # flags win; all other settings come from the checkpoint
    config, differs = utils.merge_resumed_config(config, given, saved['config'])
    override(globals(), config)
    if differs:
        print(f'differs from the checkpoint: {differs}')
    if latest > max_iters and not eval_only:
        print(f'nothing left to train: {out_dir} is at iteration {latest}, past {max_iters=}')
        sys.exit()
elif not eval_only and checkpoints.steps():
    raise UserError(f'{out_dir} holds checkpoints of another run (iteration '
                    f'{checkpoints.steps()[-1]}): resume it with --init_from=resume, or choose '
                    'another --out_dir')
utils.check_settings(config)
if not eval_only: # fail early if the name of a future checkpoint is taken
    checkpoints.check_free([*range(0, max_iters + 1, eval_interval), max_iters + 1])

# split a global batch over the devices
micro_batch_size = choose_micro_batch_size(batch_size, block_size, n_embd, devices[0].platform)
layout = choose_layout(devices, gradient_accumulation_steps * batch_size, micro_batch_size, fsdp)
mesh = layout.mesh
if mesh.size < len(devices):
    print(f'using {mesh.size} of {len(devices)} devices: a global batch of '
          f'{layout.global_batch_size} sequences does not divide evenly across more')
tokens_per_iter = layout.global_batch_size * block_size
print(f'tokens per iteration will be: {tokens_per_iter:,}')
compute_type = compute_dtype(dtype, devices, 'dtype' in given)
if compute_type != dtype:
    print(f'computing in {compute_type} instead of {dtype}, as nanoGPT does on this device')

# data
data_dir = data_dir_of(dataset)
for split in ('train', 'val'):
    utils.count_tokens(data_dir, split, block_size) # fail early
# vocabulary: a list of characters ([] if unknown), the text of a tokenizer.json, or None for
# GPT-2's BPE
meta_vocab_size, vocabulary = load_vocabulary(data_dir)
if meta_vocab_size is not None:
    print(f'found vocab_size = {meta_vocab_size} (inside {find_vocabulary(data_dir)})')

# optimizer, which optax calls tx. Its own count of steps, which get_lr gets, equals iter_num
get_lr = utils.create_learning_rate_schedule(
    learning_rate, warmup_iters, lr_decay_iters, min_lr, decay_lr)
tx = utils.create_optimizer(get_lr, weight_decay, (beta1, beta2), grad_clip)

# model. JAX keeps structure and arrays apart: state has the weights and the optimizer's moments
iter_num, best_val_loss = 0, 1e9
if init_from == 'scratch':
    print('Initializing a new model from scratch')
    if meta_vocab_size is None:
        print('defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)')
    fields = {name: config[name] for name in GPT_ARGS if name in config} # all but vocab_size
    gptconf = GPTConfig(**fields, vocab_size=meta_vocab_size or 50304)
    state = utils.init_train_state(gptconf, tx, seed, mesh)
elif init_from == 'resume':
    # falls back to an earlier checkpoint if the latest is damaged
    iter_num, saved, state = checkpoints.load('latest', lambda saved: utils.abstract_train_state(
        GPTConfig.from_model_args(saved['model_args']), tx, mesh))
    print(f'Resuming training from {out_dir}, from iteration {iter_num}')
    if not eval_only:
        best_val_loss = checkpoints.best_val_loss(config)
    gptconf = replace(GPTConfig.from_model_args(saved['model_args']), dropout=dropout)
    if block_size < gptconf.block_size:
        state = utils.crop_state(state, block_size, mesh)
        gptconf = replace(gptconf, block_size=block_size)
    if vocabulary and saved['chars'] not in ([], vocabulary):
        raise UserError(f'the vocabulary of {data_dir} differs from that of {out_dir}: use the '
                        '--dataset that it was trained on')
    vocabulary = vocabulary or saved['chars']
elif init_from.startswith('gpt2') or os.path.isdir(init_from):
    whose = 'GPT-2' if os.path.isdir(init_from) else 'OpenAI GPT-2'
    print(f'Initializing from {whose} weights: {init_from}')
    state, gptconf = utils.load_pretrained(init_from, tx, mesh, block_size, dropout)
else:
    raise UserError(f"init_from is {init_from!r}; it must be 'scratch', 'resume', 'gpt2', "
                    "'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with config.json and "
                    'model.safetensors')
if meta_vocab_size and meta_vocab_size > gptconf.vocab_size:
    raise UserError(f'{find_vocabulary(data_dir)} has {meta_vocab_size} tokens, the model only '
                    f'{gptconf.vocab_size}: use the data that it was trained on, or '
                    '--init_from=scratch')
# save the model's actual shape: pretrained weights set their own
config |= {name: getattr(gptconf, name) for name in GPT_ARGS if name in config}
head_size = gptconf.n_embd // gptconf.n_head
gptconf = replace(gptconf, dtype=compute_type, remat=remat,
                  attention=attention_path(attention, compute_type, head_size, devices[0]))
if gptconf.attention != 'xla' and dropout > 0:
    print(f'attention: {gptconf.attention} in evaluation, xla in training: '
          'the fused kernels have no dropout')
model, train_graphdef, eval_graphdef = utils.split_model(gptconf) # without weights
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')
for name, tensors in zip(('decayed', 'non-decayed'), utils.decay_groups(state['params'])):
    print(f'num {name} parameter tensors: {len(tensors)}, '
          f'with {sum(p.size for p in tensors):,} parameters')
on_device, full = (n_bytes / 1e6 for n_bytes in state_bytes(state))
print(f"mesh: data {mesh.shape['data']} x fsdp {fsdp}, {layout.micro_steps} micro-steps per "
      f'iteration, {on_device:,.1f} MB of the {full:,.1f} MB of training state on each device')
peak = mesh.size * peak_flops(devices[0])
print(describe_peak(devices[0], mesh.size))
seconds = model.estimate_mfu(layout.global_batch_size, 1.0, peak) # per iteration at the peak
if devices[0].platform == 'cpu' and seconds > 10:
    smaller = '--gradient_accumulation_steps=1' * (gradient_accumulation_steps > 1)
    print(f'an iteration takes {seconds:.0f} s or more on this CPU; try '
          f'{smaller or "a smaller --batch_size"}, or a smaller model')

# batches and evaluation
batches = utils.Batches(layout, data_dir, block_size, gptconf.vocab_size, seed,
                        eval_iters=eval_iters, batch_size=batch_size)
eval_step = utils.make_eval_step(eval_graphdef, mesh)

def evaluate(stop=None):
    """What is measured every eval_interval, for metrics.jsonl and wandb; None if stopped."""
    losses = utils.estimate_loss(eval_step, state['params'], batches, stop)
    if losses is None:
        return None
    print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    return {'train/loss': losses['train'], 'val/loss': losses['val']}

if eval_only:
    loss = evaluate()['val/loss']
    try:
        n_bytes = batches.bytes_per_token('val', vocabulary)
        print(f'val loss in bits per byte: {loss / np.log(2) / n_bytes:.4f} '
              f'({n_bytes:.2f} bytes per token)')
    except UserError as e: # the loss is printed all the same
        print(f'val loss in bits per byte: not known, {e}')
    sys.exit()

# logging, by process 0 only; a resumed run keeps its wandb id, even across one without wandb
metrics_file = MetricsFile(out_dir, iter_num) if rank == 0 else None
run_id = saved['config'].get('wandb_run_id') if init_from == 'resume' else None
wandb_run = None
if wandb_log and rank == 0:
    wandb_run = utils.start_wandb(wandb_project, wandb_run_name, config, run_id)
    run_id = wandb_run.id
if run_id:
    config['wandb_run_id'] = run_id

def log(values):
    if metrics_file:
        metrics_file.write(**{name.replace('/', '_'): x for name, x in values.items()})
    if wandb_run:
        wandb_run.log(values)

def save(val_loss=None):
    print(f'saving checkpoint to {out_dir}')
    if metrics_file:
        metrics_file.upload() # to a bucket; a folder has them already
    checkpoints.save(state, dict(iter_num=iter_num, best_val_loss=best_val_loss, config=config,
                                 model_args=model_args(gptconf), chars=vocabulary), val_loss)

# compile: micro-steps, loss scaling, clipping and AdamW are one program, for these shapes and types
stop = StopRequest() # from here on a signal ends the run after this step, with a checkpoint
x, y = batches.train(iter_num)
print('compiling the model...')
t0 = time.perf_counter()
train_step = utils.make_train_step(train_graphdef, tx, seed, mesh, compute_type == 'float16')
train_step = train_step.lower(state, x, y, np.int32(iter_num)).compile()
print(f'compiled in {time.perf_counter() - t0:.1f} s')

# training loop
first_iter, last_logged = iter_num, iter_num - 1
running_mfu, queued = -1.0, [] # queued: (iteration, metrics) of steps that are not printed yet
started = t0 = time.perf_counter()
with stop, checkpoints: # waits for the last save at the end
    while True:

        # evaluate the loss on train/val sets and write checkpoints
        if iter_num % eval_interval == 0:
            jax.block_until_ready(state) # steps that still run are training time
            paused = time.perf_counter()
            measured = evaluate(stop)
            if measured is None: # interrupted by a signal
                break
            log({'iter': iter_num, 'tokens': iter_num * tokens_per_iter, **measured,
                 'lr': float(get_lr(iter_num))})
            val_loss = measured['val/loss']
            utils.check_finite(iter_num, {'validation loss': val_loss}, checkpoints)
            if should_save(val_loss, best_val_loss, always_save_checkpoint):
                best_val_loss = min(val_loss, best_val_loss)
                # this checkpoint exists, but was saved without a validation loss
                if init_from == 'resume' and iter_num == first_iter:
                    checkpoints.record_val_loss(iter_num, val_loss, config)
                elif iter_num > 0:
                    save(val_loss)
            now = time.perf_counter()
            t0 += now - paused # not training time
            if iter_num > first_iter:
                per_iter = (now - started) / (iter_num - first_iter)
                utils.print_time_left(per_iter * (max_iters + 1 - iter_num))

        # one optimizer step; the call returns before the devices finish, and reuses state's buffers
        state, metrics = train_step(state, x, y, np.int32(iter_num))
        due, queued = queued, [] # the step before this one
        if iter_num % log_interval == 0:
            queued = [(iter_num, metrics)]
        x, y = batches.train(iter_num + 1)
        checkpoints.check() # raise if the asynchronous save failed
        iter_num += 1
        stopping = stop.reached() or iter_num > max_iters # all processes ask stop equally often

        # timing and logging, one step late, since reading a loss waits for its step
        if stopping or iter_num % eval_interval == 0:
            due, queued = due + queued, [] # no step follows at once
        due = [(it, {name: float(value) for name, value in metrics.items()}) for it, metrics in due]
        t1 = time.perf_counter()
        for it, values in due: # two lines share their mean time
            dt = (t1 - t0) / (due[-1][0] - last_logged)
            if it - first_iter >= 5: # let the training loop settle a bit
                mfu = model.estimate_mfu(layout.global_batch_size, dt, peak)
                running_mfu = mfu if running_mfu == -1.0 else 0.9*running_mfu + 0.1*mfu
            print(f"iter {it}: loss {values['loss']:.4f}, time {dt*1000:.2f}ms, "
                  f"mfu {running_mfu*100:.2f}%")
            log({'iter': it, 'tokens': (it + 1) * tokens_per_iter, **values,
                 'lr': float(get_lr(it)), 'ms_per_iter': dt * 1000,
                 'tokens_per_s': tokens_per_iter / dt,
                 'mfu': running_mfu * 100 if running_mfu >= 0 else np.nan})
            utils.check_finite(it, values, checkpoints)
            if it == first_iter + 2: # a first estimate, of training alone
                utils.print_time_left(dt * (max_iters - it))
        if due:
            t0, last_logged = t1, due[-1][0]
        if stopping:
            break

    # save the last iteration too, unless its weights are not finite
    if iter_num > first_iter:
        norm = jax.jit(optax.tree.norm)(state['params'])
        utils.check_finite(iter_num, {'norm of the weights': norm}, checkpoints)
        save()
if stop.signum:
    then = (f'resume with: python train_jax.py --init_from=resume --out_dir={out_dir}'
            if checkpoints.steps() else 'nothing was saved')
    print(f'stopped by {stop.signum.name} before iteration {iter_num}; {then}')
print(f'checkpointing blocked training for {checkpoints.blocked:.2f} s '
      f'({checkpoints.saves} saves)')
sys.exit(stop.exit_code)
