"""
Checkpoints: out_dir/<iter_num>/ with the items params, optimizer (its state and the loss scale) and meta (JSON),
written by Orbax in the background and renamed into place when whole, checksums.json among them.
They hold arrays and JSON alone: reading one runs no code.
"""

import hashlib
import json
import logging
import os
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jax_train_utils import create_train_state, shardings
from jax_transformer import GPT, UserError

# orbax warns of every save that has no metric, and logs at length what it raises as well
logging.getLogger('absl').setLevel(logging.CRITICAL)

CHECKSUMS = 'checksums.json'
VAL_LOSS = 'val_loss.json'


def checksums_of(folder):
    """{relative path: sha256} of the files in a checkpoint's items; what lies beside them is Orbax's own book-keeping."""
    sums = {}
    for item in (e.path for e in os.scandir(folder) if e.is_dir()):
        for root, _, names in os.walk(item):
            for path in (os.path.join(root, name) for name in names):
                with open(path, 'rb') as f:
                    sums[os.path.relpath(path, folder)] = hashlib.file_digest(f, 'sha256').hexdigest()
    return sums


def find_damage(folder):
    """What is wrong with a checkpoint's files, in words, or None: each is read and compared with its checksum."""
    try:
        with open(os.path.join(folder, CHECKSUMS), encoding='utf-8') as f:
            wanted = json.load(f)
        found = checksums_of(folder)
    except FileNotFoundError:
        return f'it has no {CHECKSUMS}, so it was never finished'
    except (OSError, ValueError) as e:
        return f'{type(e).__name__}: {e}'
    if not (isinstance(wanted, dict) and wanted):
        return f'{CHECKSUMS} names no files'
    wrong = sorted(path for path in wanted if found.get(path) != wanted[path])
    return f'{wrong[0]} is {"changed" if wrong[0] in found else "missing"}' if wrong else None


def hide_closed_loop(unraisable):
    """sys.unraisablehook: when one write of a save has failed, tensorstore's other threads complain about the loop
    that is gone, over dozens of lines; the failure itself is raised by check()."""
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def steps_on_disk(out_dir):
    """The iterations that a folder holds checkpoints of, ascending; whole or not."""
    if not os.path.isdir(out_dir):
        return []
    return sorted(int(e.name) for e in os.scandir(out_dir) if e.name.isdecimal() and e.is_dir())


class Manager(ocp.CheckpointManager):

    def reached_preemption(self, step):
        # the training loop asks that question itself. orbax's background thread asks it for the step of the last save, which
        # sets jax's count of steps back; a notice that comes then names a step to stop at that has passed already
        return False


class KeepLatestAndBest(PreservationPolicy):

    def __init__(self, find_best):
        self.find_best = find_best

    def should_preserve(self, checkpoints, *, context):
        keep = {max(c.step for c in checkpoints), self.find_best()}
        return [c.step in keep for c in checkpoints]


class Checkpoints:
    """The checkpoints of a run, the latest and the best of which are kept.

    read_only: for a reader beside a run; it raises UserError where there is no checkpoint. A writer removes what a
    killed save has left.
    """

    def __init__(self, out_dir, read_only=False):
        if read_only and not os.path.isdir(out_dir):
            raise UserError(f'{out_dir} does not exist, so there is no checkpoint: train first, or give another --out_dir')
        self.out_dir = out_dir
        self.blocked, self.saves = 0.0, 0  # seconds that save() took, and how often it was called
        self.val_losses = {step: self._read_val_loss(step) for step in self.steps()}
        sys.unraisablehook = hide_closed_loop
        try:
            self.manager = Manager(os.path.abspath(out_dir), options=ocp.CheckpointManagerOptions(
                preservation_policy=KeepLatestAndBest(self.best), read_only=read_only,
                cleanup_tmp_directories=not read_only,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)))
            if not read_only and not os.access(out_dir, os.W_OK | os.X_OK):
                raise PermissionError('no permission')
        except OSError as e:
            raise UserError(f'cannot write to {out_dir}: {e}; choose another --out_dir') from e
        if read_only and not self.steps():
            raise UserError(f'no checkpoint in {out_dir}: train first, or give another --out_dir')

    def _write_checksums(self):
        # orbax calls this in its background thread when all files are written, before they are renamed into place
        if jax.process_index() != 0:
            return
        for entry in os.scandir(self.manager.directory):
            if '.orbax-checkpoint-tmp' in entry.name:
                sums = checksums_of(entry.path)
                with open(os.path.join(entry.path, CHECKSUMS), 'w', encoding='utf-8') as f:
                    json.dump(sums, f, indent=1)
                self._write_val_loss(entry.path, int(entry.name.split('.')[0]))

    def _write_val_loss(self, folder, step):
        if self.val_losses[step] is not None:
            with open(os.path.join(folder, VAL_LOSS), 'w', encoding='utf-8') as f:
                json.dump(self.val_losses[step], f)

    def _read_val_loss(self, step):
        try:
            with open(os.path.join(self.folder(step), VAL_LOSS), encoding='utf-8') as f:
                return float(json.load(f))
        except (OSError, ValueError, TypeError):
            return None  # not evaluated at that iteration, or damaged: then it is not the best

    def steps(self):
        return steps_on_disk(self.out_dir)

    def folder(self, step):
        return os.path.join(self.out_dir, str(step))

    def best(self):
        """The iteration with the lowest validation loss, or None where none was evaluated."""
        evaluated = [step for step, val_loss in self.val_losses.items() if val_loss is not None]
        return min(evaluated, key=self.val_losses.get, default=None)

    # -------------------------------------------------------------------------
    # writing

    def save(self, state, iter_num, best_val_loss, model_args, config, chars, val_loss=None):
        """Save what nanoGPT's checkpoints hold; waits for the copy off the device only.

        chars: the characters of the vocabulary, or None for GPT-2's BPE. val_loss, where it was evaluated at
        this very iteration, makes the checkpoint a candidate for the best. Raises UserError where an earlier save
        has failed, and where a later checkpoint is in the way.
        """
        self.check()
        t0, self.val_losses[iter_num] = time.time(), val_loss
        meta = dict(iter_num=iter_num, best_val_loss=best_val_loss, model_args=model_args, config=config, chars=chars)
        params, optimizer = split_items(state)
        try:
            items = ocp.args.Composite(params=ocp.args.StandardSave(params), optimizer=ocp.args.StandardSave(optimizer),
                                       meta=ocp.args.JsonSave(meta))
            saved = self.manager.save(iter_num, args=items)
        except Exception as e:  # what the file system refuses reaches us as many types
            raise self._failed(e) from e
        self.blocked, self.saves = self.blocked + time.time() - t0, self.saves + 1
        if not saved:
            raise UserError(f'{self.out_dir} holds checkpoint {self.steps()[-1]} already, so {iter_num} was not saved: '
                            'choose another --out_dir')

    def evaluated(self, step, val_loss):
        """Make a checkpoint that was saved without a validation loss a candidate for the best."""
        self.val_losses[step] = val_loss
        if jax.process_index() == 0:
            self._write_val_loss(self.folder(step), step)

    def check(self):
        """Raise UserError if a save in the background has failed."""
        try:
            self.manager.check_for_errors()
        except Exception as e:
            raise self._failed(e) from e

    def close(self):
        """Wait for the save in the background. Raises UserError if it fails."""
        try:
            self.manager.wait_until_finished()
            self.manager.close()
        except Exception as e:
            raise self._failed(e) from e

    def _failed(self, error):
        text = ' '.join(str(error).split())
        text = text if len(text) < 300 else '...' + text[-300:]  # the cause stands last
        return UserError(f'saving to {self.out_dir} failed: {text}; {self.what_is_whole()}')

    def what_is_whole(self):
        """Where a run that has failed can go on from, in words."""
        whole = [step for step in self.steps() if find_damage(self.folder(step)) is None]
        return f'checkpoint {whole[-1]} is whole and can be resumed from' if whole else 'no checkpoint was saved yet'

    def set_aside_after(self, step):
        """Rename checkpoints past `step` to damaged-<iter_num>-<time>: orbax saves none at or below one that is there."""
        for later in [s for s in self.val_losses if s > step]:
            if jax.process_index() == 0:
                os.replace(self.folder(later), os.path.join(self.out_dir, f'damaged-{later}-{time.time_ns()}'))
            del self.val_losses[later]
        multihost_utils.sync_global_devices('damaged checkpoints are out of the way')
        self.manager.reload()

    # -------------------------------------------------------------------------
    # reading

    def newest_whole(self):
        """The newest iteration whose files are as they were written; says which are not. Raises UserError if none is.

        Of several processes the first reads the files, and tells the others.
        """
        whole = -1
        for step in reversed(self.steps()) if jax.process_index() == 0 else ():
            damage = find_damage(self.folder(step))
            if damage is None:
                whole = step
                break
            print(f'WARNING: checkpoint {self.folder(step)} is damaged and not used: {damage}')
        whole = int(multihost_utils.broadcast_one_to_all(np.int32(whole)))
        if whole < 0:
            raise UserError(f'no checkpoint in {self.out_dir} is whole; start again with another --out_dir')
        return whole

    def find(self, which='auto'):
        """The iteration that `which` names: latest, best, a number, or auto, which is the best where the run kept
        improvements only (as nanoGPT's single file would be), else the latest. Raises UserError for one that is
        not there or damaged; latest and auto fall back to the newest that is whole."""
        if which in ('auto', 'latest'):
            latest = self.newest_whole()
            if which == 'latest' or self.meta(latest)['config']['always_save_checkpoint'] or self.best() is None:
                return latest
        if which not in ('auto', 'best') and not (which.isdecimal() and int(which) in self.steps()):
            raise UserError(f'no checkpoint {which!r} in {self.out_dir}: give auto, latest, best, or one of {self.steps()}')
        if which == 'best' and self.best() is None:
            raise UserError(f'no checkpoint in {self.out_dir} was evaluated yet, so none is the best; use --which=latest')
        step = int(which) if which.isdecimal() else self.best()
        damage = find_damage(self.folder(step))
        if damage and which == 'auto':
            print(f'WARNING: checkpoint {self.folder(step)} is damaged and not used: {damage}')
            return latest
        if damage:
            raise UserError(f'checkpoint {self.folder(step)} is damaged: {damage}; try --which=latest')
        return step

    def meta(self, step):
        """The JSON part: iter_num, best_val_loss, model_args, config, chars."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']

    def params(self, step, config, sharding):
        """The parameters alone, for sampling, each under the same sharding. config: the GPTConfig they were saved under."""
        shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param)))
        params = restore_onto(shapes, jax.tree.map(lambda _: sharding, shapes))
        return self.manager.restore(step, args=ocp.args.Composite(params=params))['params']

    def state(self, step, config, tx, mesh):
        """The whole training state, onto the mesh's devices, however many wrote it."""
        params, optimizer = split_items(jax.eval_shape(lambda: create_train_state(GPT(config, rngs=nnx.Rngs(0)), tx)))
        items = self.manager.restore(step, args=ocp.args.Composite(
            params=restore_onto(params, shardings(params, mesh)), optimizer=restore_onto(optimizer, shardings(optimizer, mesh))))
        return {'params': items['params'], **items['optimizer']}


def split_items(state):
    """A training state as the two items of a checkpoint: what a sampler needs, and the rest."""
    return state['params'], {k: v for k, v in state.items() if k != 'params'}


def restore_onto(shapes, shardings):
    return ocp.args.StandardRestore(jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, shardings))
