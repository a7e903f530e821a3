"""Runs whose out_dir and data are in a bucket. A local folder stands for the bucket."""

import contextlib
import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from helpers import ITER, STEP, TINY, one_line_error, run_inside, saved, train
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

import jax_train_utils as utils
from nanogpt_jax import run_dir
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import MetricsFile, read_metrics
from nanogpt_jax.sharding import make_mesh


class LocalBuckets(LocalFileSystem):
    """What gcsfs and s3fs are for fsspec and epath, with buckets in a local folder. Without folders
    of its own, as theirs: a folder is what the names of several files begin with."""

    protocol = ('gs', 'gcs', 's3')
    cachable = False
    root, ranges = '', []  # the local folder, and how many each call of cat_ranges has asked for

    @classmethod
    def _strip_protocol(cls, path):
        scheme, found, name = os.fspath(path).partition('://')
        return super()._strip_protocol(os.path.join(cls.root, name) if found else scheme)

    def mkdir(self, path, **kwargs):
        pass

    makedirs = mkdir

    def _open(self, path, mode='rb', **kwargs):
        if 'w' in mode:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return super()._open(path, mode, **kwargs)

    def glob(self, path, **kwargs):  # epath puts gs:// before these
        return [os.path.relpath(name, self.root) for name in super().glob(path, **kwargs)]

    def rm(self, path, **kwargs):
        super().rm(path, **kwargs)
        with contextlib.suppress(OSError):
            os.removedirs(os.path.dirname(self._strip_protocol(path)))

    def cat_ranges(self, paths, starts, *args, **kwargs):
        self.ranges.append(len(starts))
        return super().cat_ranges(paths, starts, *args, **kwargs)


@pytest.fixture
def bucket(folder, monkeypatch):
    """The folder that stands for gs://bucket and s3://bucket, with the data set tiny."""
    root = folder / 'buckets'
    for protocol in LocalBuckets.protocol:
        monkeypatch.setitem(_registry, protocol, LocalBuckets)
    monkeypatch.setattr(LocalBuckets, 'root', str(root))
    monkeypatch.setattr(LocalBuckets, 'ranges', [])
    monkeypatch.setenv('EPATH_USE_TF', 'false')  # else an installed tensorflow looks for gs://
    # orbax reads and writes arrays by tensorstore's drivers, not by fsspec, and asks a client of
    # Google's for one property of a bucket
    monkeypatch.setattr(tensorstore_utils, '_use_gcs_driver', lambda path: False)
    monkeypatch.setattr(tensorstore_utils, '_normalize_path',
                        lambda path: os.path.normpath(path.replace('gs:/', str(root))))
    monkeypatch.setattr(gcs_utils, 'is_hierarchical_namespace_enabled', lambda path: False)
    run_dir.remote_size.cache_clear()
    shutil.copytree(folder / 'data' / 'tiny', root / 'bucket' / 'tiny')
    return root / 'bucket'


def steps_in(folder):
    return sorted(name for name in os.listdir(folder) if name.isdecimal())


REMOTE = ['--dataset=gs://bucket/tiny', '--out_dir=gs://bucket/run']


# -----------------------------------------------------------------------------

def test_a_run_in_a_bucket_is_bit_for_bit_one_in_a_folder(folder, bucket):
    out = train(folder, *REMOTE, '--max_iters=6')
    assert out.count('WARNING') == 1 and 'gs://bucket/run cannot be locked' in out
    out += train(folder, '--init_from=resume', *REMOTE, '--max_iters=12')
    here = train(folder, '--out_dir=run', '--max_iters=12')

    def losses(lines, out):  # without the times
        return [found[:2] if lines is ITER else found for found in lines.findall(out)]
    assert losses(ITER, out) == losses(ITER, here) and losses(STEP, out) == losses(STEP, here)
    assert steps_in(bucket / 'run') == steps_in(folder / 'run') == ['12', '13']

    states = [saved(bucket, 'run', '13')[0], saved(folder, 'run', '13')[0]]
    assert all(map(np.array_equal, *map(jax.tree.leaves, states)))

    times = ('ms_per_iter', 'tokens_per_s')
    lines = [[{k: v for k, v in line.items() if k not in times} for line in read_metrics(out_dir)]
             for out_dir in ('gs://bucket/run', str(folder / 'run'))]
    assert lines[0] == lines[1] and len(lines[0]) == 13 + 4

    texts = [run_inside(folder, 'sample_jax.py', '--device=cpu', f'--out_dir={out_dir}',
                        '--num_samples=1', '--max_new_tokens=20', '--start=a').stdout
             for out_dir in ('gs://bucket/run', 'run')]
    assert texts[0] == texts[1] != ''
    # nothing else is left in the bucket, and nothing here
    assert {*os.listdir(bucket / 'run')} == {'12', '13', 'metrics.jsonl'}
    assert {*os.listdir(folder)} == {'buckets', 'data', 'run'}


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_a_batch_of_a_bucket_is_that_of_a_folder_and_read_in_one_call(folder, bucket, scheme):
    mesh = make_mesh(jax.devices()[:1])
    batches = [utils.get_train_batch(mesh, data_dir, 8, 2, 16, 1337, 3)
               for data_dir in (f'{scheme}://bucket/tiny', str(folder / 'data' / 'tiny'))]
    assert all(map(np.array_equal, *batches))
    assert LocalBuckets.ranges == [8]


def test_a_token_outside_the_vocabulary_is_found_in_a_bucket(bucket):
    utils.check_tokens('gs://bucket/tiny', 20)
    with pytest.raises(UserError, match='gs://bucket/tiny/train.bin has the token id 19'):
        utils.check_tokens('gs://bucket/tiny', 19)


# -----------------------------------------------------------------------------
# checkpoints

@pytest.fixture
def run(folder, bucket):
    """The out_dir of a run in the bucket with the checkpoints 4 and 5."""
    train(folder, *REMOTE, '--max_iters=4')
    assert steps_in(bucket / 'run') == ['4', '5']
    return bucket / 'run'


def test_in_a_bucket_only_what_a_killed_save_of_this_project_left_is_removed(folder, run):
    shutil.copytree(run / '4', run / '6')
    (run / '6' / 'commit_success.txt').unlink()  # a save that was killed
    (run / 'unfinished.json').write_text('["6"]')
    others = ['2024/raw/data.csv', 'notes/todo.txt', '7 b/data', '8/commit_success.txt']
    for other in others:
        (run / other).parent.mkdir(parents=True)
        (run / other).write_text('x')
    result = run_inside(folder, 'sample_jax.py', '--device=cpu', '--out_dir=gs://bucket/run',
                        '--num_samples=1', '--max_new_tokens=5', '--start=a')
    assert 'sampling from iteration 5 of gs://bucket/run' in result.stderr
    assert (run / '6').exists()  # a reader removes nothing
    out = train(folder, '--init_from=resume', *REMOTE, '--max_iters=5')
    assert 'from iteration 5' in out
    names = {*os.listdir(run)} - {other.split('/')[0] for other in others}
    assert names == {'4', '6', 'metrics.jsonl'} and (run / '6' / 'commit_success.txt').exists()
    assert all((run / other).exists() for other in others)
    result = run_inside(folder, 'train_jax.py', *TINY, '--init_from=resume', *REMOTE,
                        '--max_iters=7')
    one_line_error(result, 'gs://bucket/run/8 was not written by this project')


def test_a_damaged_checkpoint_in_a_bucket_is_renamed_and_the_one_before_is_resumed(folder, run):
    (run / '5' / 'meta' / 'metadata').write_text('{')
    out = train(folder, '--init_from=resume', *REMOTE, '--max_iters=5')
    assert 'gs://bucket/run/5 is damaged' in out and 'from iteration 4' in out
    renamed = [name for name in os.listdir(run) if name.startswith('damaged-5-')]
    assert len(renamed) == 1 and (run / renamed[0] / 'commit_success.txt').exists()
    assert steps_in(run) == ['4', '6']


# -----------------------------------------------------------------------------
# metrics.jsonl

def test_metrics_in_a_bucket_are_whole_after_a_failed_upload(bucket, monkeypatch, capsys):
    file = MetricsFile('gs://bucket/run', 0)
    file.write(iter=0, loss=3.0)
    with monkeypatch.context() as broken:
        broken.setattr(LocalBuckets, 'open', lambda *args, **kwargs: 1 / 0)
        file.upload()
    assert 'gs://bucket/run/metrics.jsonl is not up to date' in capsys.readouterr().out
    file.write(iter=1, loss=2.0)
    file.upload()
    file.write(iter=2, loss=1.0)  # after the last upload
    assert [line['iter'] for line in read_metrics('gs://bucket/run')] == [0, 1]
    resumed = MetricsFile('gs://bucket/run', 1)
    resumed.write(iter=1, loss=2.5)
    resumed.upload()
    assert [line['loss'] for line in read_metrics('gs://bucket/run')] == [3.0, 2.5]
    MetricsFile('gs://bucket/run', 0).upload()  # of another run
    earlier, = (bucket / 'run').glob('metrics-*.jsonl')
    assert [json.loads(line)['loss'] for line in open(earlier)] == [3.0, 2.5]
    assert read_metrics('gs://bucket/run') == []


def test_a_run_that_ends_between_evaluations_leaves_all_lines_in_its_bucket(folder, bucket):
    train(folder, '--dataset=tiny', '--out_dir=gs://bucket/run', '--max_iters=2')
    assert [line['iter'] for line in read_metrics('gs://bucket/run')] == [0, 0, 1, 2]


# -----------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize('flag, words', [
    ('--out_dir=http://host/run', ('http://host/run', 'a folder')),
    ('--out_dir=gs://', ('gs://BUCKET/NAME',)),
    ('--out_dir=s3://bucket/run', ('s3://bucket/run', 'Orbax', 'a folder')),
    ('--dataset=gcs://bucket/tiny', ('gcs://bucket/tiny', 'gs://BUCKET/NAME')),
    ('--dataset=gs://bucket/absent', ('gs://bucket/absent/train.bin', 'does not exist', 'copy')),
    ('--init_from=resume', ('gs://bucket/run does not exist', 'train first'))])
def test_a_wrong_name_of_a_bucket_is_one_line_and_leaves_nothing(folder, bucket, flag, words):
    result = run_inside(folder, 'train_jax.py', *TINY, *REMOTE, flag)
    one_line_error(result, *words)
    assert {*os.listdir(folder)} == {'buckets', 'data'} and os.listdir(bucket) == ['tiny']


def test_what_cannot_be_written_is_said_before_anything_is_computed(folder, bucket, monkeypatch):
    def refuse(self, path, mode='rb', *args, **kwargs):
        raise ConnectionRefusedError('403 no access')
    monkeypatch.setattr(LocalBuckets, 'open', refuse)
    result = run_inside(folder, 'train_jax.py', *TINY, *REMOTE)
    one_line_error(result, 'gs://bucket/run', '403 no access', 'gcloud auth')
    assert 'compiled' not in result.stdout


@pytest.mark.parametrize('flags, package', [
    (['--out_dir=gs://bucket/run'], 'gcsfs'), (['--dataset=s3://bucket/tiny'], 's3fs')])
def test_a_missing_package_is_named_in_one_line(folder, monkeypatch, flags, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run_inside(folder, 'train_jax.py', *TINY, *flags)
    one_line_error(result, f'pip install {package}')


def test_files_for_other_projects_are_not_written_to_a_bucket(folder, bucket):
    result = run_inside(folder, 'convert_jax.py', '--src=run', '--dst=gs://bucket/hf',
                        '--format=hf')
    one_line_error(result, 'gs://bucket/hf', '--format=jax')
    assert os.listdir(bucket) == ['tiny']
