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
import functools
import glob
import json
import logging
import os
import re
import stat
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
BAD_JSON = ValueError, RecursionError, TypeError, KeyError


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
    # one at a time: programs that do not depend on each other but communicate, started together,
    # can wait for each other for ever on CPU devices that share few threads
    return [int(checksum(a)) for a in jax.tree.leaves(tree)]


def seal(values):
    """values, a dict for a JSON file, with a checksum that read_sealed looks at."""
    return values | {'crc32': zlib.crc32(json.dumps(values, sort_keys=True).encode())}


def read_sealed(path):
    """The dict of a JSON file; None if it is not a sealed one. Raises OSError, and one of BAD_JSON
    if it is damaged."""
    with run_dir.open_file(path, 'rb') as f:
        text = f.read()
    values = json.loads(text)  # outside, where in a bucket every error is one of reaching it
    if not isinstance(values, dict) or 'crc32' not in values:
        return None
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

class Loaded(NamedTuple):
    step: int
    meta: dict
    state: Any


def read_meta(folder):
    """A checkpoint's meta; as text what is wrong with it; None if this project has not written it.

    Raises OSError for what says nothing about its content.
    """
    try:
        return read_sealed(join(folder, 'meta', 'metadata'))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except BAD_JSON as e:  # only the items' names are left to tell whose it is
        ours = all(run_dir.is_dir(join(folder, item)) for item in ARRAYS)
        return damaged(folder, e) if ours else None


def numbered(out_dir):
    """The names of iterations in a folder, ascending, whoever has written them."""
    names = run_dir.listdir(out_dir) if run_dir.is_dir(out_dir) else []
    return sorted((name for name in names if re.fullmatch(ITERATION, name)), key=int)


def find_checkpoints(out_dir):
    """{iteration: what read_meta says} of what this project wrote, ascending.

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


def steps_on_disk(out_dir):
    """The iterations that a folder has checkpoints of, ascending, valid or not."""
    return [*find_checkpoints(out_dir)]


def measure(config):
    """What a validation loss depends on beside the weights; only equal ones can be compared."""
    return ', '.join(f'{name}={config.get(name)}' for name in MEASURE)


def read_val_losses(folder):
    """What record_val_loss has written to a checkpoint: {measure(config): val_loss}."""
    try:
        return read_sealed(join(folder, VAL_LOSS))['measured']
    except (FileNotFoundError, *BAD_JSON):
        return {}
    except OSError as e:
        raise UserError(f'cannot read {e.filename or folder}: {e.strerror or e}') from e


def split_items(state):
    """A training state as the items of a checkpoint that hold arrays: parameters, and all else."""
    rest = {k: v for k, v in state.items() if k != 'params'}
    return {'params': state['params']} | ({'optimizer': rest} if rest else {})


def shapes_of(tree):
    """{name: shape} of a tree of arrays, or of Orbax's metadata of one."""
    return {jax.tree_util.keystr(path, simple=True, separator='.'): [*leaf.shape]
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# -----------------------------------------------------------------------------
# errors

ABOUT_MEMORY = MemoryError, jax.errors.JaxRuntimeError  # the scripts have an advice for these

# of the status that TensorStore's errors begin with; the others tell that files are not as written
NOT_DAMAGE = ('UNKNOWN', 'PERMISSION_DENIED', 'UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'INTERNAL',
              'DEADLINE_EXCEEDED', 'UNAUTHENTICATED', 'ABORTED', 'CANCELLED')


def is_damage(error):
    """Whether an error tells that a checkpoint is not what was saved; permissions, I/O and memory
    say nothing about that."""
    while error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return True
        if isinstance(error, (OSError, *ABOUT_MEMORY)) or str(error).startswith(NOT_DAMAGE):
            return False
        error = error.__cause__ or error.__context__
    return True


def check_reachable(folder):
    """Raise OSError if a file in a folder cannot be reached: Orbax would call it missing, which is
    damage."""
    for entry in os.scandir(folder):
        if stat.S_ISDIR(entry.stat().st_mode):
            check_reachable(entry.path)


def one_line(error):
    """An error's type and text; of a long text the ends, as the cause is at one of them."""
    text = f'{type(error).__name__}: ' + ' '.join(str(error).split())
    return text if len(text) < 300 else f'{text[:150]} ... {text[-150:]}'


def damaged(folder, error):
    return f'checkpoint {folder} is damaged: {one_line(error)}'


# -----------------------------------------------------------------------------
# several processes

def gather(value):
    """A value that JSON can hold of each process, on all processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(np.max(multihost_utils.process_allgather(np.int32(data.size))))
    rows = multihost_utils.process_allgather(np.pad(data, (0, size - data.size)))
    return [json.loads(row.tobytes().rstrip(b'\0')) for row in rows]


def by_process_0(method):
    """A method that process 0 runs for all: they return its value, which JSON can hold, or raise
    its UserError."""
    @functools.wraps(method)
    def shared(self, *args):
        value = error = None
        if jax.process_index() == 0:
            try:
                value = method(self, *args)
            except UserError as e:
                error = e
        value, text = gather([value, error and str(error)])[0]
        if text:
            raise error or UserError(text)
        return value
    return shared


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
        self.damaged = {}  # {iteration: what is wrong}; they are renamed before the next save
        self.saving = None  # the iteration of a save, and its concurrent.futures.Future
        self.orbax = None
        if not read_only:
            self._open_for_writing()
        elif not self.steps():
            raise UserError(f'no checkpoint in {out_dir} was written by this project: train first, '
                            'or give another --out_dir')

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
            if self.is_writer:
                if not run_dir.is_remote(path):
                    os.makedirs(path, exist_ok=True)
                self._remove_unfinished()
            self._try_to_save()
        except (UserError, *ABOUT_MEMORY):
            raise
        except Exception as e:  # errors of the file system arrive as many types
            raise UserError(f'cannot save to {self.out_dir}: {one_line(e)}; choose another '
                            '--out_dir') from e

    def _try_to_save(self):
        """Save a few bytes of each process, read them in all, and delete them."""
        devices = [*{d.process_index: d for d in reversed(jax.devices())}.values()]
        mesh, values = Mesh(np.array(devices), 'all'), np.arange(len(devices), dtype=np.int32)
        split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('all', None))
        array = jax.make_array_from_callback(values.shape, split, lambda index: values[index])
        path = join(run_dir.absolute(self.out_dir), TRIAL)
        self._note([TRIAL])
        gather(None)  # now process 0 has written it
        # orbax would wait for ever
        if False in (seen := gather(run_dir.exists(join(self.out_dir, UNFINISHED)))):
            raise UserError(f'process {seen.index(False)} does not see what process 0 writes to '
                            f'{self.out_dir}: give all processes one folder that they share')
        self._write(path, {}, {'params': {'a': array}})
        self.orbax.wait_until_finished()
        read = restore(path, 'params', {'a': jax.ShapeDtypeStruct(
            values.shape, values.dtype, sharding=whole)})['a']
        if not np.array_equal(read.addressable_data(0), values):
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
                json.dump(seal({'names': [*map(str, names)]}), f)
        elif self.is_writer:
            run_dir.remove_tree(path)

    def _remove_unfinished(self):
        """Delete what a killed save has left."""
        try:
            names = read_sealed(join(self.out_dir, UNFINISHED))['names']
        except FileNotFoundError:
            return
        except BAD_JSON:  # cut off by a crash
            names = []
        for name in {*map(str, names)} - {*map(str, self.steps())}:
            if re.fullmatch(f'{TRIAL}|{ITERATION}', name):  # the file may come from elsewhere
                for left in (self.folder(name), self.folder(name + ocp.utils.TMP_DIR_SUFFIX)):
                    if run_dir.exists(left):
                        run_dir.remove_tree(left)
        self._note([])

    def _write(self, path, meta, arrays):
        self.orbax.save(path, args=ocp.args.Composite(
            meta=ocp.args.JsonSave(meta),
            **{item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()}))

    @by_process_0
    def check_free(self, iterations):
        """Raise UserError if something else has the name of an iteration's folder, from the latest
        checkpoint on."""
        first = max(self._intact(), default=0)  # others before it do not matter
        for name in {*map(int, numbered(self.out_dir))} - {*self.steps()}:
            if name >= first and name in iterations:
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
        meta = seal(meta | dict(
            val_loss=val_loss,
            checksums={item: checksums_of(tree) for item, tree in arrays.items()},
            shapes={item: shapes_of(tree) for item, tree in arrays.items()}))
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
        self.saving = step, self.background.submit(self._complete, step, meta)
        self.blocked, self.saves = self.blocked + time.perf_counter() - t0, self.saves + 1

    def _make_room(self, step):
        """Rename damaged checkpoints to damaged-<iter_num>-<time>. Raises UserError if there is
        something else with the name of `step`, or a later checkpoint."""
        for name in self.damaged.keys() & {*self.steps()}:
            run_dir.replace(self.folder(name),
                            join(self.out_dir, f'damaged-{name}-{time.time_ns()}'))
        later = [s for s in self.steps() if s > step]
        if later or run_dir.exists(self.folder(step)):
            raise UserError(f'{self.folder(max(later, default=step))} is there already, so '
                            f'iteration {step} was not saved: choose another --out_dir')

    def _complete(self, step, meta):
        """In the background: wait for a save, read it back, and delete what is no longer kept."""
        self.orbax.wait_until_finished()
        if not self.is_writer:
            return
        folder = self.folder(step)
        found = read_meta(folder)
        if not isinstance(found, dict) or seal(found)['crc32'] != meta['crc32']:
            raise OSError('its meta is not what was written')
        for item, shapes in meta['shapes'].items():
            saved = shapes_of(ocp.StandardCheckpointHandler().metadata(
                epath.Path(run_dir.absolute(folder)) / item).tree)
            if saved != shapes:
                raise OSError(f'its {item} are not what was written')
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
            try:
                # first what tells a reader that it is a checkpoint
                run_dir.remove_tree(join(self.folder(step), 'meta', 'metadata'))
                run_dir.remove_tree(self.folder(step))
            except OSError as e:  # NFS, for one, keeps a folder whose files somebody reads
                print(f'WARNING: cannot delete {self.folder(step)} ({e}); training continues')
        self._note([])

    def record_val_loss(self, step, val_loss, config):
        """Add to a checkpoint a validation loss that was measured later, by a run with `config`."""
        if self.is_writer:
            measured = read_val_losses(self.folder(step)) | {measure(config): val_loss}
            with run_dir.open_file(join(self.folder(step), VAL_LOSS), 'w') as f:
                json.dump(seal({'measured': measured}), f)

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
        (step, future), self.saving = self.saving or (None, None), None
        if future and (error := future.exception()):
            self.damaged[step] = damaged(self.folder(step), error)
            raise self._failed(error) from error

    def _failed(self, error):
        return UserError(f'saving to {self.out_dir} failed: {one_line(error)}; '
                         + self.describe_valid())

    def describe_valid(self):
        """Which checkpoint a failed run can be resumed from, as text; waits for the last save."""
        with contextlib.suppress(UserError):
            self._finish()
        with contextlib.suppress(UserError):
            if valid := self._intact():
                return f'checkpoint {max(valid)} is complete and can be resumed from'
        return 'no checkpoint was saved yet'

    # -------------------------------------------------------------------------
    # reading

    def _intact(self):
        """{iteration: meta} of those that are not known to be damaged; warns of new ones."""
        found = find_checkpoints(self.out_dir)
        for step, meta in found.items():
            if isinstance(meta, str) and step not in self.damaged:
                self._give_up_on(step, meta)
        return {step: meta for step, meta in found.items() if step not in self.damaged}

    def _give_up_on(self, step, text):
        self.damaged[step] = text
        print(f'WARNING: {text}; it is not used')

    def _best(self, metas):
        """{what it was measured with: (lowest validation loss, its iteration)}."""
        measured = [
            (how, val_loss, step) for step, meta in metas.items()
            for how, val_loss in [(measure(meta['config']), meta['val_loss']),
                                  *read_val_losses(self.folder(step)).items()]
            if val_loss is not None and not np.isnan(val_loss)]
        return {how: found for how, *found in sorted(measured, reverse=True)}

    @by_process_0
    def best_val_loss(self, config):
        """The lowest validation loss that was measured as config measures, else 1e9. A line tells
        if the latest checkpoint was measured otherwise."""
        metas, how = self._intact(), measure(config)
        alike = [meta['best_val_loss'] for meta in metas.values() if measure(meta['config']) == how]
        alike += [val_loss for other, (val_loss, _) in self._best(metas).items() if other == how]
        latest = metas[max(metas)]['config'] if metas else config
        if changed := [name for name in MEASURE if latest.get(name) != config.get(name)]:
            best = 'is that of the checkpoints with this one' if alike else 'starts anew'
            print(f'the latest validation loss was measured with another {", ".join(changed)}: the '
                  f'best {best}')
        return min([*alike, 1e9])

    def latest_meta(self):
        """(iteration, meta) of the latest checkpoint whose meta is intact, on all processes; its
        arrays are checked when they are read. Raises UserError if there is none."""
        return self._choose('latest')

    @by_process_0
    def _choose(self, checkpoint):
        """(iteration, meta) of 'latest', 'best', a number or 'auto', among those not known to be
        damaged.

        auto is the best if the run saved improvements only (as nanoGPT's single file would be),
        else the latest. Raises UserError if there is none.
        """
        metas = self._intact()
        if checkpoint in map(str, self.damaged):
            raise UserError(f'{self.damaged[int(checkpoint)]}; try --checkpoint=latest')
        if not metas:
            raise UserError(f'no checkpoint in {self.out_dir} is valid: start again with another '
                            '--out_dir')
        latest = max(metas)
        config = metas[latest]['config']
        _, best = self._best(metas).get(measure(config), (None, None))
        choices = {str(step): step for step in metas} | {'latest': latest, 'best': best}
        choices['auto'] = latest if best is None or config['always_save_checkpoint'] else best
        step = choices.get(checkpoint)
        if step is None:
            raise UserError(f'no checkpoint {checkpoint!r} in {self.out_dir}: give auto, latest, '
                            f'best (if a validation loss was measured), or one of {[*metas]}')
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
            step, meta = self._choose(checkpoint)
            wanted = split_items(abstract_of(meta))
            self._check_shapes(wanted, meta.get('shapes', {}))
            arrays = self._read(step, wanted, meta['checksums'])
            if arrays:
                state = {'params': arrays['params'], **arrays.get('optimizer', {})}
                return Loaded(step, meta, state)
            if checkpoint == 'best' and step in self.damaged:
                checkpoint = str(step)  # which raises its error: not the second best

    def _check_shapes(self, wanted, saved):
        """saved: {item: {name: shape}}, empty for old checkpoints."""
        for item, tree in wanted.items():
            here = shapes_of(tree)
            there = saved.get(item, here)
            if changed := sorted(name for name in here.keys() | there.keys()
                                 if here.get(name) != there.get(name)):
                name, other = changed[0], 'model' if item == 'params' else 'optimizer'
                raise UserError(
                    f'{self.out_dir} was written by another {other}: the shape of {name} is '
                    f'{there.get(name)} there and {here.get(name)} here; use the code that wrote '
                    'it, or start again with another --out_dir')

    @by_process_0
    def _is_there(self, step):
        return step in self.steps()

    # orbax's handlers are called without its checkpointer, whose restore() waits for all processes
    # even if one of them has failed
    def _read(self, step, wanted, checksums):
        """{item: arrays}; None if they are damaged, or if a run beside has replaced them."""
        folder, arrays, text = self.folder(step), {}, ''
        try:
            if not run_dir.is_remote(folder):
                check_reachable(folder)
            for item, tree in wanted.items():
                arrays[item] = restore(folder, item, tree)
        except ABOUT_MEMORY:
            raise
        except Exception as e:  # of many types
            if not is_damage(e):
                raise UserError(f'cannot read {folder}: {one_line(e)}') from e
            text = damaged(folder, e)
        text = next(filter(None, gather(text)), '')
        if not text:
            changed = [item for item in arrays if checksums_of(arrays[item]) != checksums[item]]
            if not changed:
                return arrays
            text = damaged(folder, ValueError(f'its {changed[0]} are not what was saved'))
        if self._is_there(step):  # else a run beside has deleted it
            self._give_up_on(step, text)
        return None
