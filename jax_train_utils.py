"""
What train_jax.py is made of: pure functions with explicit arguments.
Schedule and optimizer, batches, devices and sharding, the jitted steps, what a run is stopped by.
"""

import json
import math
import os
import pickle
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_transformer import GPT, UserError, optional_import

# -----------------------------------------------------------------------------
# learning rate and optimizer

def create_learning_rate_schedule(learning_rate, warmup_iters, lr_decay_iters, min_lr, decay_lr=True):
    """nanoGPT's get_lr as a callable: iteration to learning rate.

    Linear warmup, cosine down to min_lr at lr_decay_iters, then constant; constant throughout without
    decay_lr. float64 for a Python int, float32 for a traced iteration.
    """
    def schedule(it):
        if not decay_lr:
            return learning_rate
        xp = jnp if isinstance(it, jax.Array) else np
        warmup = learning_rate * (it + 1) / (warmup_iters + 1)
        ratio = xp.clip((it - warmup_iters) / max(1, lr_decay_iters - warmup_iters), 0, 1)
        decayed = min_lr + 0.5 * (1 + xp.cos(math.pi * ratio)) * (learning_rate - min_lr)
        return xp.where(it < warmup_iters, warmup, xp.where(it > lr_decay_iters, min_lr, decayed))
    return schedule


def decay_mask(params):
    """True for the tensors that are decayed: those of two or more dimensions, embeddings included."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def decay_groups(params):
    """(decayed tensors, the others), as lists."""
    tensors = list(zip(jax.tree.leaves(params), jax.tree.leaves(decay_mask(params))))
    return [p for p, decayed in tensors if decayed], [p for p, decayed in tensors if not decayed]


def create_optimizer(schedule, weight_decay, betas, grad_clip):
    """torch's clip_grad_norm_ and AdamW with nanoGPT's two groups, as one optax transformation.

    grad_clip: largest global norm of the gradient; 0 means no clipping.
    """
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        optax.adamw(schedule, b1=betas[0], b2=betas[1], eps=1e-8, weight_decay=weight_decay, mask=decay_mask),
    )


# -----------------------------------------------------------------------------
# data: raw uint16 token ids in data/<dataset>/{train,val}.bin, meta.pkl for a vocabulary of its own

TRAIN, EVAL = 0, 1  # the purposes that batches are drawn for


def batch_offsets(n_rows, n_offsets, seed, iter_num, purpose):
    """int64 (n_rows,) offsets below n_offsets: a function of (seed, iter_num, purpose) and nothing else."""
    # a counter-based generator needs no state, so a resumed run draws what it would have drawn;
    # NumPy's, since OpenWebText's offsets do not fit jax.random's int32
    rng = np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, iter_num]))
    return rng.integers(n_offsets, size=n_rows)


def count_tokens(data_dir, split, block_size):
    """How many tokens a split has. Raises UserError where there is no batch to draw from."""
    path = os.path.join(data_dir, f'{split}.bin')
    if not os.path.exists(path):
        large = '. That is large; for a first run see config/train_pydoc_char.py' if data_dir.endswith('openwebtext') else ''
        prepare = os.path.join(data_dir, 'prepare.py')
        raise UserError(f'{path} does not exist: prepare the data first, with python {prepare}{large}')
    size = os.path.getsize(path)
    if size % 2 or size // 2 < block_size + 1:
        raise UserError(f'{path} has {size} bytes; it must hold at least block_size + 1 = {block_size + 1} '
                        'token ids of two bytes each')
    return size // 2


def largest_token(path):
    """The largest id in a .bin file, read in bounded memory; kept in <path>.max under the file's size and time."""
    stat = os.stat(path)
    stamp, kept = [stat.st_size, stat.st_mtime_ns], path + '.max'
    try:
        with open(kept, encoding='utf-8') as f:
            known = json.load(f)
        if known['stamp'] == stamp:
            return known['max']
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours: count again
    largest, chunk = 0, 2 ** 24  # 32 MB at a time
    for start in range(0, stat.st_size // 2, chunk):
        largest = max(largest, int(np.fromfile(path, np.uint16, count=chunk, offset=2 * start).max()))
    try:
        with open(kept, 'w', encoding='utf-8') as f:
            json.dump({'stamp': stamp, 'max': largest}, f)
    except OSError:
        pass  # a read-only folder: counted again next time
    return largest


def check_tokens(data_dir, vocab_size, splits=('train', 'val')):
    """Raise UserError if a split holds a token id that the model has no embedding for."""
    for split in splits:
        path = os.path.join(data_dir, f'{split}.bin')
        largest = largest_token(path)
        if largest >= vocab_size:
            raise UserError(f"{path} holds the token id {largest}, the model's vocabulary ends at {vocab_size - 1}: "
                            'prepare the data again, or train a model with its vocabulary')


def read_rows(data_dir, split, offsets, block_size):
    """int32 (n_rows, block_size + 1): the tokens from each of the offsets, int (n_rows,), on."""
    # read, not memory-mapped: a new map for every batch costs more page faults than the rows cost reads, and one that is
    # kept counts all it ever read as this process's memory
    with open(os.path.join(data_dir, f'{split}.bin'), 'rb', buffering=0) as f:
        rows = []
        for offset in offsets:
            f.seek(2 * int(offset))
            rows.append(f.read(2 * (block_size + 1)))
    return np.frombuffer(b''.join(rows), np.uint16).reshape(len(offsets), block_size + 1).astype(np.int32)


def get_batch(data_dir, split, n_rows, block_size, seed, iter_num, purpose=TRAIN):
    """x, y: int32 (n_rows, block_size); y is x one token on."""
    n_offsets = count_tokens(data_dir, split, block_size) - block_size
    rows = read_rows(data_dir, split, batch_offsets(n_rows, n_offsets, seed, iter_num, purpose), block_size)
    return rows[:, :-1], rows[:, 1:]


def load_batch(mesh, data_dir, split, offsets, block_size):
    """x, y on the mesh's devices: int32 (n, rows, block_size), of int offsets (n, rows).

    Where an offset is negative, the row is filled with targets that do not count.
    """
    rows = np.zeros((*offsets.shape, block_size + 1), np.int32)
    for index in batch_sharding(mesh, offsets.ndim + 1).addressable_devices_indices_map(rows.shape).values():
        index = index[:-1]  # each process reads its own devices' part alone
        read = read_rows(data_dir, split, offsets[index].clip(0).ravel(), block_size)
        rows[index] = read.reshape(rows[index].shape)
    return shard_batch(mesh, rows[..., :-1], np.where(offsets[..., None] < 0, -1, rows[..., 1:]))


def get_train_batch(mesh, data_dir, n_rows, n_micro, block_size, seed, iter_num):
    """x, y of one optimizer step on the mesh's devices: int32 (n_micro, n_rows / n_micro, block_size)."""
    n_offsets = count_tokens(data_dir, 'train', block_size) - block_size
    offsets = batch_offsets(n_rows, n_offsets, seed, iter_num, TRAIN).reshape(n_micro, -1)
    return load_batch(mesh, data_dir, 'train', offsets, block_size)


class PlainUnpickler(pickle.Unpickler):
    """Reads plain dicts, lists, strings and numbers; a pickle that names anything else is refused, not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}; only plain Python data is allowed')


def load_meta(data_dir):
    """(vocab_size, chars) of a data set's meta.pkl, chars being the characters in the order of their ids, as far as it
    names them; (None, None) where there is no such file: the ids are GPT-2's BPE. Raises UserError for one of no use.
    """
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        return None, None
    try:
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
        itos = meta.get('itos', {})
        return int(meta['vocab_size']), [itos[i] for i in range(len(itos))]
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f'cannot use {path} ({type(e).__name__}: {e}); make it again with the prepare.py beside it') from e


def create_codec(chars):
    """(encode, decode): text to ids, and ids to UTF-8 bytes, by a list of characters, or GPT-2's BPE where it is None.

    A token of GPT-2's may be a part of a character. encode raises UserError for a character that is not in the list.
    """
    if chars is None:
        return _gpt2_codec()
    if not chars:
        raise UserError("the model's data set has no characters in its meta.pkl (itos), so text cannot be turned into tokens")
    ids = {c: i for i, c in enumerate(chars)}

    def encode(text):
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            raise UserError(f'the model never saw the characters {unknown}; it knows {"".join(chars)!r}')
        return [ids[c] for c in text]
    # a model finetuned on them may have a larger vocabulary
    return encode, lambda tokens: ''.join(chars[i] for i in tokens if i < len(chars)).encode('utf-8', 'replace')


def read_prompt(start):
    """--start as text; FILE:name reads a UTF-8 file. Raises UserError for a missing, empty or undecodable one."""
    if start.startswith('FILE:'):
        try:
            with open(start[5:], encoding='utf-8') as f:
                start = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'cannot read the prompt file {start[5:]}: {e}') from e
    if not start:
        raise UserError('the prompt is empty; give at least one character with --start')
    return start


def _gpt2_codec():
    tiktoken = optional_import('tiktoken')
    try:
        enc = tiktoken.get_encoding('gpt2')
    except Exception as e:  # its files are neither cached nor reachable: many types
        raise UserError(f'the GPT-2 tokenizer is neither cached nor reachable ({type(e).__name__}): let it download its '
                        'files once, or set TIKTOKEN_CACHE_DIR to a folder that has them') from e
    n = enc.n_vocab  # a model's vocabulary may be padded past it
    return (lambda text: enc.encode(text, allowed_special={'<|endoftext|>'}),
            lambda tokens: enc.decode_bytes([t for t in tokens if t < n]))


# -----------------------------------------------------------------------------
# devices and sharding

def make_mesh(devices, fsdp=1):
    """One mesh with the axes data and fsdp; fsdp devices share a copy of the training state."""
    shape = len(devices) // fsdp, fsdp
    return jax.make_mesh(shape, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=devices)


def micro_batch_rows(batch_size, block_size, n_embd, platform):
    """The most rows that a device takes at a time: batch_size; on a CPU fewer, as many as its caches hold."""
    # the widest activation, (rows, T, 4 n_embd) in float32, gets 4 MB
    return min(batch_size, max(1, 2 ** 18 // (block_size * n_embd))) if platform == 'cpu' else batch_size


def share_rows(n_rows, micro_rows, n_devices, fsdp=1, n_processes=1):
    """How a step's rows are shared: (devices used, micro-steps).

    Uses the largest number of devices that divides the rows, in groups of fsdp and as many of each process; each takes an
    equal share, in the fewest equal micro-batches of at most micro_rows rows. Raises UserError where there is no such number.
    """
    def numbers(fsdp):
        return [n for n in range(1, n_devices + 1) if n_rows % n == n % fsdp == n % n_processes == 0]
    used = max((n for n in numbers(fsdp) if n_devices % fsdp == 0), default=None)
    if used is None:
        possible = [f for f in range(1, n_devices + 1) if n_devices % f == 0 and numbers(f)]
        raise UserError(f'{n_devices} devices of {n_processes} processes cannot share the {n_rows} rows of a step equally with '
                        f'fsdp={fsdp}; ' + (f'with these rows fsdp can be {", ".join(map(str, possible))}' if possible else
                                            'let gradient_accumulation_steps * batch_size be a multiple of the processes'))
    share = n_rows // used
    return used, share // max(m for m in range(1, micro_rows + 1) if share % m == 0)


def take_devices(devices, n):
    """n of the devices, as many of each process."""
    processes = [[d for d in devices if d.process_index == p] for p in sorted({d.process_index for d in devices})]
    return [d for own in processes for d in own[:n // len(processes)]]


def partition_specs(tree, mesh):
    """How each array of a tree lies on the mesh: split over fsdp along the first of its dimensions that divides, whole on
    every device where it has less than two dimensions or none divides. The same for a parameter and its moments."""
    def spec(a):
        n = mesh.shape['fsdp']
        split = next((d for d, size in enumerate(a.shape) if size % n == 0), None) if n > 1 and a.ndim > 1 else None
        return PartitionSpec() if split is None else PartitionSpec(*[None] * split, 'fsdp')
    return jax.tree.map(spec, tree)


def shardings(tree, mesh):
    """partition_specs on the mesh's devices."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))


def state_bytes(state):
    """(bytes that one device holds of a training state, bytes of the whole)."""
    leaves = jax.tree.leaves(state)
    return (sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves), sum(a.nbytes for a in leaves))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(w, dim, dtype):
    """The whole of a parameter, in dtype, from the shards that the devices of fsdp hold of it along dim.

    The gradient comes back summed over them in the shard's own type, each device getting its part of it.
    """
    return jax.lax.all_gather(w.astype(dtype), 'fsdp', axis=dim, tiled=True)


def _gather_backward(dim, dtype, w, g):
    return jax.lax.psum_scatter(g.astype(w.dtype), 'fsdp', scatter_dimension=dim, tiled=True),


gather.defvjp(lambda w, dim, dtype: (gather(w, dim, dtype), w), _gather_backward)


def whole_model(graphdef, params, specs):
    """The model, of a device's shards of its parameters; kernels, used in products alone, travel in the compute type."""
    dtype = nnx.merge(graphdef, params).config.dtype

    def whole(path, w, spec):
        if 'fsdp' not in spec:
            return w
        return gather(w, spec.index('fsdp'), dtype if path[-1].key == 'kernel' else 'float32')
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(whole, params, specs))


def batch_sharding(mesh, ndim):
    """Arrays (..., rows, T) with the rows split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 2), ('data', 'fsdp')))


def shard_batch(mesh, *arrays):
    """Arrays (..., rows, T) onto the devices, the rows split over all of them; a process needs its own part only."""
    return tuple(jax.make_array_from_callback(a.shape, batch_sharding(mesh, a.ndim), a.__getitem__) for a in arrays)


# -----------------------------------------------------------------------------
# the training state and the jitted steps

def train_state(params, tx):
    """{'params', 'opt_state', 'loss_scale'} for parameters: plain dicts of arrays, which jit dispatches fastest."""
    # the loss scale is there for every dtype, so that a run can be resumed in another; GradScaler's first scale
    loss_scale = {'scale': jnp.float32(65536), 'good_steps': jnp.int32(0)}
    return {'params': params, 'opt_state': tx.init(params), 'loss_scale': loss_scale}


def create_train_state(model, tx):
    """The training state of a model."""
    return train_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), tx)


def init_train_state(config, tx, seed, mesh):
    """The state of a new model, created on the mesh's devices."""
    def init():
        return create_train_state(GPT(config, rngs=nnx.Rngs(seed)), tx)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh))()


def place_train_state(model, tx, mesh):
    """The state of a model that has weights already, on the mesh's devices."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    placed = jax.tree.map(lambda p, s: jax.make_array_from_callback(p.shape, s, np.asarray(p).__getitem__),
                          params, shardings(params, mesh))
    def init(params):
        return train_state(params, tx)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, params), mesh), donate_argnums=0)(placed)


def split_model(config):
    """A model without weights (for its shapes), its graph definition in training mode, and in evaluation mode."""
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    model.eval()
    eval_graphdef = nnx.split(model, nnx.Param)[0]
    model.train()
    return model, nnx.split(model, nnx.Param)[0], eval_graphdef


def update_loss_scale(loss_scale, finite):
    """GradScaler's rule: half the scale after an overflow, twice after 2000 good steps in a row."""
    good_steps = jnp.where(finite, loss_scale['good_steps'] + 1, 0)
    grow = good_steps == 2000
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    return {'scale': loss_scale['scale'] * factor, 'good_steps': jnp.where(grow, 0, good_steps)}


def keep_if_overflown(finite, new, old):
    """The old optimizer state after an overflow, but for the schedule's count: the learning rate follows iter_num."""
    def choose(new, old):
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    return jax.tree.map(choose, new, old, is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState))


def make_train_step(graphdef, tx, seed, mesh=None, scale_loss=False):
    """The jitted step(state, x, y, iter_num) -> (state, metrics): one optimizer step. It donates the state.

    x, y: int (micro-steps, rows, T), the rows split over the devices of mesh (None: the first device alone); the
    gradient is the mean over all of them, in float32.
    metrics: float32 scalars loss (the mean) and grad_norm (before clipping), and loss_scale with scale_loss.
    scale_loss: dynamic loss scaling, for float16; a step whose gradient overflows changes no weight.
    """
    mesh = mesh or make_mesh(jax.devices()[:1])

    def loss_fn(params, specs, x, y, key, scale):
        _, loss = whole_model(graphdef, params, specs)(x, y, rngs=nnx.Rngs(dropout=key))
        return loss * scale, loss

    def accumulate(params, x, y, key, scale, specs):
        """The mean loss, and its gradient times scale; what each device does with its rows and its shards of params."""
        n_micro = x.shape[0]
        key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names))

        def micro_step(total, batch):
            i, x, y = batch
            grads, loss = jax.grad(loss_fn, has_aux=True)(params, specs, x, y, jax.random.fold_in(key, i), scale)
            return jax.tree.map(jnp.add, total, (grads, loss)), None

        zeros = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        sums, _ = jax.lax.scan(micro_step, zeros, (jnp.arange(n_micro), x, y))

        def mean(total, spec):
            # the devices' sums are added once, here; along fsdp gather's gradient has done it for all that is split
            axes = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in spec)
            return jax.lax.psum(total, axes) / (n_micro * mesh.size)
        return jax.tree.map(mean, sums, (specs, PartitionSpec()))

    def train_step(state, x, y, iter_num):
        params = state['params']
        key = jax.random.fold_in(jax.random.key(seed), iter_num)
        scale = state['loss_scale']['scale'] if scale_loss else jnp.float32(1)
        specs, rows = partition_specs(params, mesh), batch_sharding(mesh, 3).spec
        # nothing in it is divided or moved between devices but by the code itself
        grads, loss = jax.shard_map(partial(accumulate, specs=specs), mesh=mesh, check_vma=False,
                                    in_specs=(specs, rows, rows, PartitionSpec(), PartitionSpec()),
                                    out_specs=(specs, PartitionSpec()))(params, x, y, key, scale)
        grads = jax.tree.map(lambda g: g / scale, grads)
        metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads)}

        updates, opt_state = tx.update(grads, state['opt_state'], params)
        new = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state, 'loss_scale': state['loss_scale']}
        if scale_loss:
            finite = jnp.isfinite(metrics['grad_norm'])
            metrics['loss_scale'] = scale
            new['params'] = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new['params'], params)
            new['opt_state'] = keep_if_overflown(finite, opt_state, state['opt_state'])
            new['loss_scale'] = update_loss_scale(state['loss_scale'], finite)
        return jax.lax.with_sharding_constraint(new, shardings(new, mesh)), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(graphdef, mesh=None):
    """The jitted step(params, x, y) -> (losses, counts), float32 and int (n,), dropout off: the mean loss of each of n
    batches, and how many targets are in it. x, y: int (n, rows, T), the rows split over the devices of mesh (None: the
    first device alone); targets of -1 do not count."""
    mesh = mesh or make_mesh(jax.devices()[:1])

    def batch_losses(params, x, y, specs):
        """The same on each device, with its rows."""
        model = whole_model(graphdef, params, specs)

        def batch_loss(_, batch):
            x, y = batch
            count = (y != -1).sum()
            return None, (jnp.where(count > 0, model(x, y)[1] * count, 0), count)
        totals, counts = jax.lax.psum(jax.lax.scan(batch_loss, None, (x, y))[1], mesh.axis_names)
        return totals / counts, counts

    @jax.jit
    def eval_step(params, x, y):
        specs, rows = partition_specs(params, mesh), batch_sharding(mesh, 3).spec
        return jax.shard_map(partial(batch_losses, specs=specs), mesh=mesh, check_vma=False,
                             in_specs=(specs, rows, rows), out_specs=PartitionSpec())(params, x, y)
    return eval_step


def estimate_loss(eval_step, params, mesh, data_dir, eval_iters, batch_size, block_size, micro_rows,
                  progress=lambda parts, what: parts):
    """{'train': loss, 'val': loss}: means over eval_iters batches that are the same in every run.

    micro_rows: the most rows that a device takes at a time. progress(parts, what): shows how many of them are done.
    """
    means = {}
    for split in ('train', 'val'):
        n_offsets = count_tokens(data_dir, split, block_size) - block_size
        offsets = np.concatenate([batch_offsets(batch_size, n_offsets, 0, k, EVAL) for k in range(eval_iters)])
        # rows are filled up to whole batches with some that do not count; and up to 20 equal parts, each one program and one read
        rows = min(mesh.size * micro_rows, len(offsets) + -len(offsets) % mesh.size)
        offsets = np.pad(offsets, (0, -len(offsets) % rows), constant_values=-1).reshape(-1, rows)
        n_parts = max(n for n in range(1, 21) if len(offsets) % n == 0)
        results = [eval_step(params, *load_batch(mesh, data_dir, split, part, block_size)) for part in np.split(offsets, n_parts)]
        losses, counts = zip(*[jax.device_get(result) for result in progress(results, f'evaluating {split}')])
        means[split] = float(np.average(np.concatenate(losses).astype(np.float64), weights=np.concatenate(counts)))
    return means


# -----------------------------------------------------------------------------
# what a run is refused and stopped by

def check_settings(config):
    """Raise UserError for numbers that no run can be made of, among the settings that config has."""
    at_least = dict(eval_interval=1, log_interval=1, eval_iters=1, gradient_accumulation_steps=1, batch_size=1, block_size=1,
                    n_layer=1, n_head=1, n_embd=1, seed=0, max_iters=0, warmup_iters=0, lr_decay_iters=0, learning_rate=0,
                    min_lr=0, weight_decay=0, grad_clip=0, beta1=0, beta2=0, fsdp=1)
    for name, least in ((name, least) for name, least in at_least.items() if name in config):
        if not least <= config[name] < math.inf:
            raise UserError(f'{name} is {config[name]}; it must be at least {least}')
    for name, bound in (('beta1', 1), ('beta2', 1), ('seed', 2 ** 32)):
        if config.get(name, 0) >= bound:
            raise UserError(f'{name} is {config[name]}; it must be below {bound}')


class StopRequest:
    """Remembers the first SIGTERM or SIGINT, for the loop to end at the next step; the second ends the process at once.

    Under jax.distributed SIGTERM is left to its own handler, by which all processes agree on the step to end at, and
    SIGINT is passed on as SIGTERM.
    """

    def __init__(self):
        self.signum = None
        self.signals = (signal.SIGINT,) if jax.distributed.is_initialized() else (signal.SIGINT, signal.SIGTERM)
        for signum in self.signals:
            signal.signal(signum, self._remember)

    def _remember(self, signum, frame):
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signum = signal.Signals(signum)
        for each in self.signals:
            signal.signal(each, signal.SIG_DFL)

    def reached(self, iter_num):
        """Whether to end before this iteration."""
        if multihost_utils.reached_preemption_sync_point(iter_num):
            self.signum = signal.SIGTERM
        return self.signum is not None

    @property
    def exit_code(self):
        """130 after Ctrl-C, as shells have it, else 0: schedulers send SIGTERM as a matter of course."""
        return 130 if self.signum == signal.SIGINT else 0


def find_non_finite(iter_num, numbers):
    """What is not finite among a step's metrics or other named scalars, in words, or None; waits for the device.

    In float16 an overflow only skips the step, until that has halved the loss scale to less than 1.
    """
    if float(numbers.get('loss_scale', 0)) >= 1:
        return None
    wrong = [f'{name} is {float(value)}' for name, value in numbers.items() if not math.isfinite(value)]
    return f'{" and ".join(wrong)} at iteration {iter_num}, not a finite number' if wrong else None


# -----------------------------------------------------------------------------
# resuming

def crop_state(state, block_size, mesh):
    """GPT.crop_block_size for a whole training state: the position embeddings and their moments."""
    def crop(path, leaf):
        return leaf[:block_size] if any(getattr(k, 'key', None) == 'wpe' for k in path) else leaf
    def cropped(state):
        return jax.tree_util.tree_map_with_path(crop, state)
    return jax.jit(cropped, out_shardings=shardings(jax.eval_shape(cropped, state), mesh))(state)


# what the checkpoint decides: no weights fit another shape
MODEL_SHAPE = ('n_layer', 'n_head', 'n_embd', 'bias')
# what belongs to the command and the machine, and is never taken from a checkpoint
NOT_RESUMED = ('init_from', 'out_dir', 'eval_only', 'device', 'attention', 'compilation_cache', 'fsdp', 'peer_timeout')


def merge_resumed_config(config, given, saved):
    """(config of a resumed run, what differs from the saved one as text).

    config: this run's; given: the names that the user set; saved: the checkpoint's config. What was
    given wins, but for the model's shape; all else comes from the checkpoint.
    Raises UserError for a larger block_size than the checkpoint's.
    """
    merged, differs = dict(config), []
    for name in (k for k in saved if k in config and k not in NOT_RESUMED):
        if name in MODEL_SHAPE or name not in given:
            merged[name] = saved[name]
        if name in given and config[name] != saved[name]:
            kept = ' (kept: the weights have this shape)' if name in MODEL_SHAPE else f' -> {config[name]}'
            differs.append(f'{name} {saved[name]}{kept}')
    if merged['block_size'] > saved['block_size']:
        raise UserError(f'block_size={merged["block_size"]} is larger than the checkpoint\'s {saved["block_size"]}; '
                        'give a smaller one, or none')
    return merged, ', '.join(differs)
