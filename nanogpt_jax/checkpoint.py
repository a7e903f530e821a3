"""
Checkpoints: out_dir/<iter_num>/ with the items params, optimizer (its state and the loss scale) and
meta (JSON, with a checksum of each array), written by Orbax in the background and renamed into
place once complete (in a bucket: marked as complete). They hold arrays and JSON only, so reading
one runs no code.

A folder is a checkpoint of ours if its meta/metadata says so; no other is counted, renamed or
deleted.
"""

import asyncio
import concurrent.futures
import contextlib
import glob
import json
import logging
import os
import re
import sys
import time
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanogpt_jax import run_dir
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import check_out_dir, join

ARRAYS = 'params', 'optimizer'  # the items with arrays
VAL_LOSS = 'val_loss.json'  # losses that were measured after the checkpoint was saved
UNFINISHED = 'unfinished.json'  # names the folders that a save is writing or deleting
MEASURE = 'dataset', 'block_size', 'batch_size', 'eval_iters'  # settings of an evaluation
ITERATION = '0|[1-9][0-9]*'
TRIAL = 'save-test'  # the folder of a checkpoint of a few bytes


def should_save(val_loss, best_val_loss, always_save_checkpoint):
    """Whether to save after an evaluation."""
    return always_save_checkpoint or val_loss < best_val_loss


def should_keep(iter_num, latest, best):
    """Whether to keep a checkpoint once a later one is complete.

    best: the iterations with the lowest validation loss, one for each way to measure it.
    """
    return iter_num == latest or iter_num in best


def quiet_orbax():
    """For scripts: hide what Orbax logs at length and raises as well.

    When one of its reads or writes fails, those of its other threads complain in dozens of lines
    that nobody waited for them.
    """
    for logger in ('absl', 'asyncio'):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)

    def report(unraisable):
        if not (asyncio.iscoroutine(unraisable.object)
                or str(unraisable.exc_value) == 'Event loop is closed'):
            sys.__unraisablehook__(unraisable)
    sys.unraisablehook = report


# -----------------------------------------------------------------------------
# checksums

@jax.jit
def checksum(a):
    """The sum, modulo 2**32, of a hash of each word of an array and its position.

    The same however the array is sharded; each device reads its own shard only. A change of one
    word always changes it, since the hash is invertible; of other damage it misses one in 2**32,
    like a CRC.
    """
    position = jnp.uint32(0)
    for dim in range(a.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, a.shape, dim)
        position = position * jnp.uint32(0x9E3779B1) + index
    words = jax.lax.bitcast_convert_type(a, f'uint{8 * a.dtype.itemsize}').astype(jnp.uint32)
    h = words + position * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)  # the last steps of MurmurHash3
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def checksums_of(tree):
    return [int(c) for c in jax.device_get([checksum(a) for a in jax.tree.leaves(tree)])]


def seal(values):
    """values, a dict for a JSON file, with a checksum that unseal looks at."""
    return values | {'crc32': zlib.crc32(json.dumps(values, sort_keys=True).encode())}


def unseal(values):
    values = dict(values)
    crc32 = values.pop('crc32')
    if seal(values)['crc32'] != crc32:
        raise ValueError('its JSON is changed')
    return values


def restore(folder, item, tree):
    """An item's arrays. tree: of jax.ShapeDtypeStruct with shardings. Raises any error."""
    return ocp.StandardCheckpointHandler().restore(
        epath.Path(run_dir.absolute(folder)) / item, args=ocp.args.StandardRestore(tree))


# -----------------------------------------------------------------------------
# what a folder holds

class DamagedError(UserError):
    """A checkpoint cannot be read, or is not what was saved."""


class Loaded(NamedTuple):
    step: int
    meta: dict
    state: Any


def read_json(path):
    """Raises OSError, and ValueError if the file is damaged."""
    with run_dir.open_file(path, 'rb') as f:
        text = f.read()
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError('its JSON is nested too deeply') from e


def read_meta(folder):
    """A checkpoint's meta: a dict, a DamagedError, or None if this project has not written it.

    Raises OSError for what says nothing about its content.
    """
    try:
        meta = read_json(join(folder, 'meta', 'metadata'))
        return unseal(meta) if isinstance(meta, dict) and 'crc32' in meta else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:  # only the items' names are left to tell whose it is
        ours = all(run_dir.is_dir(join(folder, item)) for item in ARRAYS)
        return damaged(folder, e) if ours else None


def numbered(out_dir):
    """The names of iterations in a folder, ascending, whoever has written them."""
    names = run_dir.listdir(out_dir) if run_dir.is_dir(out_dir) else []
    return sorted((name for name in names if re.fullmatch(ITERATION, name)), key=int)


def find_checkpoints(out_dir):
    """{iteration: its meta, or a DamagedError} of what this project wrote, ascending.

    Raises UserError if it cannot be read.
    """
    try:
        names = None
        while names != (names := numbered(out_dir)):  # a run beside may replace one meanwhile
            found = {int(name): read_meta(join(out_dir, name)) for name in names
                     # no rename is atomic in a bucket: a marker is written last
                     if not run_dir.is_remote(out_dir)
                     or ocp.utils.is_checkpoint_finalized(join(out_dir, name))}
    except OSError as e:
        raise UserError(f'cannot read {e.filename or out_dir}: {e.strerror or e}') from e
    return {step: meta for step, meta in found.items() if meta is not None}


def read_val_losses(folder):
    """What record_val_loss has written to a checkpoint: [[measure(config), val_loss], ...]."""
    try:
        return unseal(read_json(join(folder, VAL_LOSS)))['measured']
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):  # absent or damaged
        return []


def steps_on_disk(out_dir):
    """The iterations that a folder has checkpoints of, ascending, valid or not."""
    return [*find_checkpoints(out_dir)]


def measure(config):
    """What a validation loss depends on beside the weights; only equal ones can be compared."""
    return [str(config.get(name)) for name in MEASURE]


def names_and_shapes(tree):
    """{name: shape} of a tree of arrays, or of Orbax's metadata of one."""
    return {jax.tree_util.keystr(path, simple=True, separator='.'): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fingerprint(shapes):
    return zlib.crc32(json.dumps(sorted(shapes.items())).encode())


def saved_shapes(folder, item):
    """{name: shape} of the arrays that an item of a checkpoint says it has. Raises any error."""
    return names_and_shapes(ocp.StandardCheckpointHandler().metadata(
        epath.Path(run_dir.absolute(folder)) / item).tree)


def difference(saved, wanted):
    """What two {name: shape} differ in, as text; '' if in nothing."""
    def some(names):
        names = [re.sub(r'\.(embedding|kernel|scale)$', '', name) for name in sorted(names)]
        return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
    if extra := saved.keys() - wanted.keys():
        return f'it has {some(extra)}, this one has not'
    if missing := wanted.keys() - saved.keys():
        return f'it has no {some(missing)}, this one has'
    changed = [name for name in wanted if saved[name] != wanted[name]]
    return f'it has other shapes of {some(changed)}' if changed else ''


# -----------------------------------------------------------------------------
# errors

def one_line(error):
    return ' '.join(str(error).split())


def tail(error):
    text = one_line(error)
    return text if len(text) < 300 else '...' + text[-300:]  # the cause is at the end


def damaged(folder, error):
    return DamagedError(f'checkpoint {folder} is damaged: {type(error).__name__}: '
                        + one_line(error)[:300])


ABOUT_MEMORY = MemoryError, jax.errors.JaxRuntimeError  # the scripts have an advice for these

# of the status that TensorStore's errors begin with; the others tell that files are not as written
NOT_DAMAGE = ('UNKNOWN', 'PERMISSION_DENIED', 'UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'INTERNAL',
              'DEADLINE_EXCEEDED', 'UNAUTHENTICATED', 'ABORTED', 'CANCELLED')


def is_damage(error):
    """Whether an error tells that a checkpoint is not what was saved; permissions, I/O and memory
    say nothing about that."""
    while error:
        if isinstance(error, (UserError, *ABOUT_MEMORY)) or (
                isinstance(error, OSError)
                and not isinstance(error, (FileNotFoundError, NotADirectoryError))):
            return isinstance(error, DamagedError)
        if str(error).partition(':')[0] in NOT_DAMAGE:
            return False
        error = error.__cause__ or error.__context__
    return True


def describe_failure(folder, error):
    """'damaged' or 'stop', a space, and an error in words; '' for no error."""
    if not error:
        return ''
    if is_damage(error):
        return f'damaged {damaged(folder, error)}'
    if isinstance(error, UserError):
        return f'stop {error}'
    return f'stop cannot read {folder}: {type(error).__name__}: {one_line(error)[:300]}'


# -----------------------------------------------------------------------------
# several processes

def from_all_processes(text):
    """The texts of all processes, on all processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(errors='replace'), np.uint8)
    size = 1 + int(np.max(multihost_utils.process_allgather(np.int32(data.size))))
    rows = multihost_utils.process_allgather(np.pad(data, (0, size - data.size)))
    return [row.tobytes().rstrip(b'\0').decode() for row in rows]


def from_process_0(read, *args):
    """read(*args) of process 0, which JSON can hold, or its error, on all processes."""
    answer, error = {}, None
    if jax.process_index() == 0:
        try:
            answer = {'value': read(*args)}
        except Exception as e:
            answer, error = {'error': one_line(e)}, e
    answer = json.loads(from_all_processes(json.dumps(answer))[0])
    if 'error' in answer:
        raise error or UserError(answer['error'])
    return answer['value']


# -----------------------------------------------------------------------------

class Checkpoints:
    """The checkpoints of a run. should_keep says which ones are kept.

    As a context manager it waits for the save in the background at the end. A writer proves by a
    few bytes that it can save, and removes what a killed save has left; all processes open it.
    read_only: for a reader beside a run; raises UserError if there is no checkpoint.
    """

    def __init__(self, out_dir, read_only=False):
        check_out_dir(out_dir, must_exist=read_only)
        self.out_dir, self.is_writer = out_dir, not read_only and jax.process_index() == 0
        self.blocked, self.saves = 0.0, 0  # seconds spent in save(), and number of calls
        self.damaged = {}  # {iteration: DamagedError}; they are renamed before the first save
        self.saving = None  # the concurrent.futures.Future of a save, and its iteration
        self.failed, self.orbax = set(), None
        if read_only and not self.steps():
            other = ', '.join(numbered(out_dir)[:3])
            raise UserError(f'no checkpoint in {out_dir}'
                            + (f' (this project has not written its {other})' if other else '')
                            + ': train first, or give another --out_dir')
        if not read_only:
            self._open_for_writing()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # when another process has died, waiting for it would take until the heartbeat timeout
        if kind is None or issubclass(kind, UserError) or not jax.distributed.is_initialized():
            self.close()

    def steps(self):
        return steps_on_disk(self.out_dir)

    def folder(self, step):
        return join(self.out_dir, str(step))

    # -------------------------------------------------------------------------
    # writing

    def _open_for_writing(self):
        # orbax looks for what its processes have written by a glob of the whole path; without
        # ocdbt nothing is to be found, and each array has files of its own
        path = run_dir.absolute(self.out_dir)
        # zstd takes most of a save's processor time, and makes it a few percent smaller
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, use_ocdbt=glob.escape(str(path)) == str(path))
        self.orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(
            handler_registry=ocp.handlers.create_default_handler_registry(
                **dict.fromkeys(ARRAYS, handler))))
        self.background = concurrent.futures.ThreadPoolExecutor(1)
        try:
            if self.is_writer and not run_dir.is_remote(path):
                os.makedirs(path, exist_ok=True)
            self._remove_unfinished()
            self._try_to_save()
        except Exception as e:  # errors of the file system arrive as many types
            if isinstance(e, (UserError, *ABOUT_MEMORY)):
                raise
            raise UserError(f'cannot save to {self.out_dir}: {tail(e)}; choose another '
                            '--out_dir') from e
        for name in numbered(self.out_dir) if self.is_writer else ():
            if int(name) not in self.steps():
                print(f'WARNING: {self.folder(name)} was not written by this project, and is left '
                      'alone')

    def _try_to_save(self):
        """Save, read and delete a few bytes of each process."""
        count = jax.process_count()
        devices = [next(d for d in jax.devices() if d.process_index == i) for i in range(count)]
        mesh, values = Mesh(np.array(devices), ('all',)), np.arange(count, dtype=np.int32)
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (['all'], []))
        array = jax.make_array_from_callback((count,), split, lambda index: values[index])
        path = join(run_dir.absolute(self.out_dir), TRIAL)
        self._note([TRIAL])
        self._write(path, {'crc32': 0}, {'params': {'a': array}})
        self.orbax.wait_until_finished()
        restored = restore(path, 'params', {'a': jax.ShapeDtypeStruct(
            (count,), np.int32, sharding=whole)})['a']
        if read_json(join(path, 'meta', 'metadata')) != {'crc32': 0} or not np.array_equal(
                restored.addressable_data(0), values):
            raise OSError('what is read back is not what was written')
        multihost_utils.sync_global_devices('all have read')
        if self.is_writer:
            run_dir.remove_tree(path)
        self._note([])

    def _note(self, names):
        """Record which folders are being written or deleted, for _remove_unfinished."""
        path = join(self.out_dir, UNFINISHED)
        if self.is_writer and names:
            with run_dir.open_file(path, 'w') as f:
                json.dump([*map(str, names)], f)
        elif self.is_writer:
            run_dir.remove_tree(path)

    def _remove_unfinished(self):
        """Delete what a killed save has left."""
        path = join(self.out_dir, UNFINISHED)
        if not self.is_writer or not run_dir.exists(path):
            return
        with contextlib.suppress(ValueError):  # cut off by a crash
            complete = [*map(str, self.steps())]
            for name in map(str, read_json(path)):
                # the file may come from elsewhere
                if re.fullmatch(f'{TRIAL}|{ITERATION}', name) and name not in complete:
                    for suffix in ('', ocp.utils.TMP_DIR_SUFFIX):
                        left = self.folder(name + suffix)
                        if run_dir.exists(left) and not os.path.islink(left):
                            run_dir.remove_tree(left)
        self._note([])

    def _write(self, path, meta, arrays):
        self.orbax.save(path, args=ocp.args.Composite(
            meta=ocp.args.JsonSave(meta),
            **{item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()}))

    def check_free(self, iterations):
        """Raise UserError if something else has the name of an iteration's folder."""
        mine = self.steps()
        for name in numbered(self.out_dir):
            if int(name) in iterations and int(name) not in mine:
                raise UserError(f'iteration {name} could not be saved, since {self.folder(name)} '
                                'was not written by this project: move it, or choose another '
                                '--out_dir')

    def save(self, state, meta, val_loss=None):
        """Save a training state; waits for checksums and the copy off the device.

        meta: iter_num, best_val_loss, model_args, config, chars (the vocabulary). val_loss: the
        validation loss at this iteration, if evaluated; the checkpoint can then be the best. Raises
        UserError if the save before has failed, or if this iteration or a later one is there.
        """
        t0, step = time.perf_counter(), meta['iter_num']
        self._finish()
        arrays = split_items(state)
        shapes = {item: names_and_shapes(tree) for item, tree in arrays.items()}
        meta = seal(meta | dict(
            val_loss=val_loss,
            checksums={item: checksums_of(tree) for item, tree in arrays.items()},
            trees={item: fingerprint(found) for item, found in shapes.items()}))
        try:
            if self.is_writer:
                self._make_room(step)
            self.damaged.clear()  # their numbers are free again
            self._note([step])
            self._write(run_dir.absolute(self.folder(step)), meta, arrays)
        except UserError:
            raise
        except Exception as e:  # errors of the file system arrive as many types
            raise self._failed(e) from e
        self.saving = step, self.background.submit(self._complete, step, meta['crc32'], shapes)
        self.blocked, self.saves = self.blocked + time.perf_counter() - t0, self.saves + 1

    def _make_room(self, step):
        """Rename damaged checkpoints to damaged-<iter_num>-<time>. Raises UserError if there is
        another one from `step` on."""
        for name in [s for s in self.damaged if s in self.steps()]:
            run_dir.replace(self.folder(name),
                            join(self.out_dir, f'damaged-{name}-{time.time_ns()}'))
        self.check_free([step])
        if (later := max(self.steps(), default=-1)) >= step:
            raise UserError(f'{self.out_dir} already has checkpoint {later}, so {step} was not '
                            'saved: choose another --out_dir')

    def _complete(self, step, crc32, shapes):
        """In the background: wait for a save, read it back, and delete what is no longer kept."""
        self.orbax.wait_until_finished()
        if not self.is_writer:
            return
        meta = read_meta(self.folder(step))
        if not isinstance(meta, dict) or seal(meta)['crc32'] != crc32:
            raise OSError('meta is not what was written')
        for item in shapes:
            if text := difference(saved_shapes(self.folder(step), item), shapes[item]):
                raise OSError(f'{item} is not what was written: {text}')
        self._delete_old()

    # orbax's own policies of retention take every folder with a number for a checkpoint, and delete
    # before the new one was read back
    def _delete_old(self):
        metas = self._intact()
        best = {step for _, step in self._best(metas).values()}
        old = [step for step in metas if not should_keep(step, max(metas), best)
               and not os.path.islink(self.folder(step))]
        if old:
            self._note(old)
        for step in old:
            # first what tells a reader that it is a checkpoint
            run_dir.remove_tree(join(self.folder(step), 'meta', 'metadata'))
            run_dir.remove_tree(self.folder(step))
        self._note([])

    def record_val_loss(self, step, val_loss, config):
        """Add to a checkpoint a validation loss that was measured later, by a run with `config`."""
        if self.is_writer:
            folder, how = self.folder(step), measure(config)
            others = [entry for entry in read_val_losses(folder) if entry[0] != how]
            with run_dir.open_file(join(folder, VAL_LOSS), 'w') as f:
                json.dump(seal({'measured': [*others, [how, val_loss]]}), f)

    def check(self):
        """Raise UserError if the save in the background has failed."""
        if self.saving and self.saving[1].done():
            self._finish()

    def close(self):
        """Wait for the save in the background. Raises UserError if it fails."""
        self._finish()
        if self.orbax:
            self.background.shutdown()
            self.orbax.close()

    def _finish(self):
        saving, self.saving = self.saving, None
        try:
            if saving:
                saving[1].result()
        except Exception as e:
            self.failed.add(saving[0])
            raise self._failed(e) from e

    def _failed(self, error):
        return UserError(f'saving to {self.out_dir} failed: {tail(error)}; {self.describe_valid()}')

    def describe_valid(self):
        """Which checkpoint a failed run can be resumed from, as text; waits for the last save."""
        if self.saving and self.saving[1].exception():  # check() and close() raise it
            self.failed.add(self.saving[0])
        with contextlib.suppress(UserError):
            if valid := self._intact().keys() - self.failed:
                return f'checkpoint {max(valid)} is complete and can be resumed from'
        return 'no checkpoint was saved yet'

    # -------------------------------------------------------------------------
    # reading

    def _intact(self):
        """{iteration: meta} of those that are not known to be damaged, latest first; warns of new
        ones that are."""
        found = find_checkpoints(self.out_dir)
        for step, meta in found.items():
            if isinstance(meta, DamagedError) and step not in self.damaged:
                self._give_up_on(step, meta)
        return {step: found[step] for step in reversed(found) if step not in self.damaged}

    def _give_up_on(self, step, error):
        self.damaged[step] = error
        print(f'WARNING: {error}; it is not used')

    def _best(self, metas):
        """{what it was measured with: (lowest validation loss, its iteration)}."""
        best = {}
        for step, meta in metas.items():
            for how, val_loss in [[measure(meta['config']), meta['val_loss']],
                                  *read_val_losses(self.folder(step))]:
                if val_loss is not None and not np.isnan(val_loss):
                    found = val_loss, step
                    best[tuple(how)] = min(best.get(tuple(how), found), found)
        return best

    def best_val_loss(self, config):
        """The lowest validation loss that was measured as config measures, else 1e9; on all
        processes. A line tells if the latest checkpoint was measured otherwise."""
        return from_process_0(self._best_val_loss, config)

    def _best_val_loss(self, config):
        metas, how = self._intact(), measure(config)
        alike = [meta['best_val_loss'] for meta in metas.values() if measure(meta['config']) == how]
        alike += [val_loss for key, (val_loss, _) in self._best(metas).items() if key == tuple(how)]
        latest = measure(next(iter(metas.values()))['config']) if metas else how
        if how != latest:
            changed = ', '.join(name for name, *ab in zip(MEASURE, how, latest) if len({*ab}) > 1)
            print(f'the latest validation loss was measured with another {changed}: the best '
                  + ('is that of the checkpoints with this one' if alike else 'starts anew'))
        return min([*alike, 1e9])

    def latest_meta(self):
        """(iteration, meta) of the latest checkpoint whose meta is intact, on all processes; its
        arrays are checked when they are read. Raises UserError if there is none."""
        return from_process_0(self._choose, 'latest')

    def _choose(self, checkpoint):
        """(iteration, meta) of the first choice for 'latest', 'best', a number or 'auto', among
        those not known to be damaged.

        auto is the best if the run saved improvements only (as nanoGPT's single file would be),
        else the latest. Raises UserError if there is none.
        """
        metas = self._intact()
        known = sorted([*metas, *self.damaged])
        if checkpoint not in ('auto', 'latest', 'best', *map(str, known)):
            raise UserError(f'no checkpoint {checkpoint!r} in {self.out_dir}: give auto, latest, '
                            f'best, or one of {known}')
        if checkpoint in map(str, self.damaged):
            raise UserError(f'{self.damaged[int(checkpoint)]}; try --checkpoint=latest')
        if not metas:
            raise UserError(f'no checkpoint in {self.out_dir} is valid; start again with another '
                            '--out_dir' if known else
                            f'no checkpoint in {self.out_dir}: train first, or give another '
                            '--out_dir')
        step = max(metas)
        settings = metas[step]['config']
        best = self._best(metas).get(tuple(measure(settings)), (None, None))[1]
        if checkpoint == 'best' and best is None:
            raise UserError(f'no checkpoint in {self.out_dir} has a validation loss, so none is '
                            'the best; use --checkpoint=latest')
        improvements_only = best is not None and not settings['always_save_checkpoint']
        if checkpoint == 'best' or checkpoint == 'auto' and improvements_only:
            step = best
        elif checkpoint not in ('auto', 'latest'):
            step = int(checkpoint)
        return step, metas[step]

    def load(self, checkpoint, abstract_of):
        """The first of a checkpoint's candidates that is intact, as Loaded(step, meta, state), the
        same on all processes.

        abstract_of: from meta to a training state as a tree of jax.ShapeDtypeStruct with shardings,
        or to its params only: {'params': ...}. The number of devices that wrote it does not matter.
        Warns of damaged checkpoints. Raises UserError if none is intact, if it is of another model,
        and for errors that say nothing about what was saved.
        """
        while True:
            step, meta = from_process_0(self._choose, checkpoint)
            arrays = self._read(step, meta, split_items(abstract_of(meta)))
            if not arrays and step in self.damaged and checkpoint not in ('auto', 'latest'):
                raise UserError(f'{self.damaged[step]}; try --checkpoint=latest')
            if arrays:
                state = {'params': arrays['params'], **arrays.get('optimizer', {})}
                return Loaded(step, meta, state)

    # orbax's handlers are called without its checkpointer, whose restore() waits for all processes
    # even if one of them has failed
    def _read(self, step, meta, abstract):
        """{item: arrays}; None if they are damaged, or if a run beside has replaced them."""
        folder, arrays, error = self.folder(step), {}, None
        try:
            for item, tree in abstract.items():
                self._compare_trees(step, meta, item, tree)
                arrays[item] = restore(folder, item, tree)
        except Exception as e:  # of many types
            error = e
        failures = from_all_processes(describe_failure(folder, error))
        kind, _, text = max(failures).partition(' ')  # 'stop' outranks 'damaged'
        if len(failures) > 1:
            text += f' (in process {failures.index(max(failures))})'
        if kind == 'stop':
            raise error if isinstance(error, ABOUT_MEMORY) else UserError(text)
        if kind == 'damaged':
            if read_meta(folder):  # else a run beside has deleted it
                self._give_up_on(step, DamagedError(text))
            return None
        if changed := [item for item in arrays
                       if checksums_of(arrays[item]) != meta['checksums'][item]]:
            self._give_up_on(step, damaged(folder, ValueError(
                f'its {" and ".join(changed)} are not what was saved')))
            return None
        return arrays

    def _compare_trees(self, step, meta, item, tree):
        wanted = names_and_shapes(tree)
        if meta.get('trees', {}).get(item) == fingerprint(wanted):
            return
        if text := difference(saved_shapes(self.folder(step), item), wanted):
            other = 'model' if item == 'params' else 'optimizer'
            raise UserError(f'{self.out_dir} was written by another {other}: {text}; use the code '
                            'that wrote it, or start again with another --out_dir')


def split_items(state):
    """A training state as the items of a checkpoint that hold arrays: parameters, and all else."""
    rest = {k: v for k, v in state.items() if k != 'params'}
    return {'params': state['params']} | ({'optimizer': rest} if rest else {})
