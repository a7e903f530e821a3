"""Runs with their out_dir and data in a bucket. A local folder stands for the bucket."""

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
from helpers import ITER, ROOT, RUN, STEP, TINY, run, saved
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

import jax_train_utils as utils
from nanogpt_jax import run_dir
from nanogpt_jax.checkpoint import Checkpoints, seal
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import MetricsFile, hold_out_dir, read_metrics
from nanogpt_jax.sharding import make_mesh
from test_jax_transformer import layout_of
from test_survival import abstract, save


class LocalBuckets(LocalFileSystem):
    """gcsfs and s3fs for fsspec and epath, with buckets in a local folder. As there, a folder
    exists only as the beginning of names of files."""

    protocol = ('gs', 'gcs', 's3')
    cachable = False
    root, ranges = '', []  # the local folder, and the number of ranges in each call of cat_ranges

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


def use_local_buckets(root, monkeypatch):
    """Let root/NAME stand for gs://NAME and s3://NAME in this process."""
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


@pytest.fixture
def bucket(folder, monkeypatch):
    """The folder that stands for gs://bucket and s3://bucket, with the data set tiny."""
    use_local_buckets(folder / 'buckets', monkeypatch)
    shutil.copytree(folder / 'data' / 'tiny', folder / 'buckets' / 'bucket' / 'tiny')
    return folder / 'buckets' / 'bucket'


# -----------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_in_a_bucket_is_bit_for_bit_one_in_a_folder(folder, bucket):
    there = [*TINY, '--dataset=gs://bucket/tiny', '--out_dir=gs://bucket/run']
    result = run(folder, '-c', RUN + f'''
sys.path[:0] = {[ROOT, os.path.dirname(__file__)]}
import pytest, test_buckets
test_buckets.use_local_buckets({str(folder / 'buckets')!r}, pytest.MonkeyPatch())
run('train_jax.py', *{there}, '--max_iters=6')
print('saved:', [line['iter'] for line in test_buckets.read_metrics('gs://bucket/run')])
run('train_jax.py', *{there}, '--init_from=resume', '--max_iters=12')
print('here:')
run('train_jax.py', *{TINY}, '--out_dir=run', '--max_iters=12')
''')
    assert result.returncode == 0, result.stderr
    out, here = result.stdout.split('here:\n')
    assert out.count('WARNING') == out.count('gs://bucket/run cannot be locked') == 2
    assert 'saved: [0, 0, 1, 2, 3, 4, 4, 5, 6]\n' in out

    def losses(lines, out):  # without the times
        return [found[:2] if lines is ITER else found for found in lines.findall(out)]
    assert losses(ITER, out) == losses(ITER, here) and losses(STEP, out) == losses(STEP, here)
    states = [saved(place, 'run', '13')[0] for place in (bucket, folder)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, states)))

    times = ('ms_per_iter', 'tokens_per_s', 'mfu')
    lines = [[{k: v for k, v in line.items() if k not in times} for line in read_metrics(out_dir)]
             for out_dir in ('gs://bucket/run', str(folder / 'run'))]
    assert lines[0] == lines[1] and len(lines[0]) == 13 + 4
    # nothing else is left in the bucket, and nothing here
    assert {*os.listdir(bucket / 'run')} == {'12', '13', 'metrics.jsonl'}
    assert {*os.listdir(folder)} == {'buckets', 'data', 'run'}


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_a_batch_of_a_bucket_is_that_of_a_folder_and_read_in_one_call(folder, bucket, scheme):
    def batches(data_dir, vocab_size=20):
        layout = layout_of(make_mesh(jax.devices()[:1]), 8, 2)
        return utils.Batches(layout, data_dir, 16, vocab_size, 1337, 1, 8)
    here, there = (batches(data_dir).train(3)
                   for data_dir in (str(folder / 'data' / 'tiny'), f'{scheme}://bucket/tiny'))
    assert all(map(np.array_equal, here, there)) and LocalBuckets.ranges == [16]
    with pytest.raises(UserError, match=f'{scheme}://bucket/tiny/train.bin has the token id 19'):
        batches(f'{scheme}://bucket/tiny', 19).train(0)


# -----------------------------------------------------------------------------
# checkpoints

def test_only_files_of_this_project_are_removed_or_renamed_in_a_bucket(bucket, capsys):
    with Checkpoints('gs://bucket/run') as checkpoints:
        save(checkpoints, 4, 1.0)
        save(checkpoints, 5)
    there = bucket / 'run'
    assert {*os.listdir(there)} == {'4', '5'}
    shutil.copytree(there / '4', there / '6')
    (there / '6' / 'commit_success.txt').unlink()  # a save that was killed
    (there / 'unfinished.json').write_text(json.dumps(seal({'names': ['6']})))
    others = ['2024/raw/data.csv', 'notes/todo.txt', '7 b/data', '8/commit_success.txt']
    for other in others:
        (there / other).parent.mkdir(parents=True)
        (there / other).write_text('x')
    reader = Checkpoints('gs://bucket/run', read_only=True)
    assert reader.load('latest', abstract).step == 5
    assert (there / '6').exists()  # a reader removes nothing
    (there / '5' / 'meta' / 'metadata').write_text('{')
    with Checkpoints('gs://bucket/run') as checkpoints:
        assert not (there / '6').exists()
        assert checkpoints.load('latest', abstract).step == 4
        assert 'gs://bucket/run/5 is damaged' in capsys.readouterr().out
        save(checkpoints, 6)
        checkpoints.close()
        with pytest.raises(UserError, match='gs://bucket/run/8 exists and was not written'):
            checkpoints.check_free([8])
    assert checkpoints.steps() == [4, 6] and all((there / other).exists() for other in others)
    renamed, = there.glob('damaged-5-*')
    assert (renamed / 'commit_success.txt').exists()


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


# -----------------------------------------------------------------------------
# mistakes

def count_tokens(data_dir):
    return utils.count_tokens(data_dir, 'train', 8)


def resume(out_dir):
    return hold_out_dir(out_dir, resume=True)


@pytest.mark.parametrize('use, path, words', [
    (hold_out_dir, 'http://host/run', 'http://host/run .* a folder'),
    (hold_out_dir, 'gs://', 'gs://BUCKET/NAME'),
    (hold_out_dir, 's3://bucket/run', 's3://bucket/run .*Orbax .*a folder'),
    (resume, 'gs://bucket/run', 'gs://bucket/run does not exist.*train first'),
    (count_tokens, 'gcs://bucket/tiny', 'gcs://bucket/tiny.*gs://BUCKET/NAME'),
    (count_tokens, 'gs://bucket/absent', 'absent/train.bin does not exist.* copy')])
def test_a_wrong_name_of_a_bucket_is_refused_and_leaves_nothing(folder, bucket, use, path, words):
    with pytest.raises(UserError, match=words):
        use(path)
    assert {*os.listdir(folder)} == {'buckets', 'data'} and os.listdir(bucket) == ['tiny']


def test_a_bucket_without_access_is_refused_at_once_with_the_command_for_credentials(
        bucket, monkeypatch):
    def refuse(self, path, mode='rb', *args, **kwargs):
        raise ConnectionRefusedError('403 no access')
    monkeypatch.setattr(LocalBuckets, 'open', refuse)
    with pytest.raises(UserError, match='gs://bucket/run.*403 no access.*gcloud auth'):
        Checkpoints('gs://bucket/run')


@pytest.mark.parametrize('path, package', [('gs://bucket/run', 'gcsfs'), ('s3://bucket/a', 's3fs')])
def test_a_missing_package_is_named(monkeypatch, path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'pip install {package}'):
        run_dir.exists(path)
