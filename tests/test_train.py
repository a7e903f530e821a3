"""Whole runs of train_jax.py, and the functions that its settings, batches and log go through."""

import io
import os
import pickle
import pty
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import (
    ENV, ITER, ROOT, STEP, TINY, abstract_state, one_line_error, resume, run, saved, train,
    with_data,
)

import jax_train_utils as utils
from jax_transformer import GPTConfig
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.devices import cpu_key
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import MetricsFile, read_metrics
from test_jax_transformer import layout_of, one_device_mesh


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder and the output of a run of 20 iterations."""
    folder = with_data(tmp_path_factory.mktemp('trained'))
    # --compile and --backend are nanoGPT's; float16 must be accepted on a CPU
    out = train(folder, '--compile=False', '--backend=gloo', '--dtype=float16')
    return SimpleNamespace(folder=folder, out=out)


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of that folder to change."""
    return shutil.copytree(trained.folder, tmp_path / 'copy')


# -----------------------------------------------------------------------------
# a run

def test_log_lines_are_nanogpts_and_the_loss_falls(trained):
    out = trained.out
    iters, steps = ITER.findall(out), STEP.findall(out)
    assert [int(i[0]) for i in iters] == list(range(21))
    assert [int(s[0]) for s in steps] == [0, 4, 8, 12, 16, 20]
    # log(20) = 3.0 falls towards log(2) = 0.7
    assert float(steps[-1][2]) < float(steps[0][2]) - 0.3
    for line in ('platform: cpu, devices: 1 (cpu)', 'tokens per iteration will be: 128',
                 'found vocab_size = 20 (inside data/tiny/meta.pkl)',
                 'Initializing a new model from scratch', 'number of parameters: 0.0',
                 'num decayed parameter tensors: ', 'num non-decayed parameter tensors: ',
                 'saving checkpoint to out_jax', '--compile has no effect',
                 '--backend has no effect',
                 'computing in float32 instead of float16, as nanoGPT does on this device'):
        assert line in out, line
    assert len(re.findall(r'^compiled in \d+\.\d s$', out, re.M)) == 1
    # the state after the last iteration is saved, as a line says, and the best checkpoint is kept
    assert out.count('saving checkpoint to out_jax') == len(steps[1:]) + 1
    best = min(steps[1:], key=lambda s: float(s[2]))
    assert {*Checkpoints(trained.folder / 'out_jax', read_only=True).steps()} == {int(best[0]), 21}


def test_metrics_have_the_numbers_of_every_log_line(trained):
    lines = read_metrics(trained.folder / 'out_jax')
    iters = [line for line in lines if 'loss' in line]
    steps = [line for line in lines if 'val_loss' in line]
    # mfu is not known in the first five iterations
    assert [(str(m['iter']), f'{m["loss"]:.4f}', f'{m["ms_per_iter"]:.2f}',
             '-100.00' if m['mfu'] is None else f'{m["mfu"]:.2f}')
            for m in iters] == ITER.findall(trained.out)
    assert [m['mfu'] is None for m in iters] == [True] * 5 + [False] * 16
    assert [(str(m['iter']), f'{m["train_loss"]:.4f}', f'{m["val_loss"]:.4f}')
            for m in steps] == STEP.findall(trained.out)
    tokens_per_iter = 2 * 4 * 16  # micro-steps, sequences, tokens
    assert [m['tokens'] for m in iters] == [tokens_per_iter * (m['iter'] + 1) for m in iters]
    assert [m['tokens'] for m in steps] == [tokens_per_iter * m['iter'] for m in steps]
    for m in iters:
        # one is computed from the other's number, unrounded
        assert abs(m['tokens_per_s'] * m['ms_per_iter'] / 1000 / tokens_per_iter - 1) < 1e-9
        assert m['grad_norm'] > 0 and 0 < m['lr'] < 1.001e-2
    # one type per column, so that pandas.read_json(path, lines=True) makes numbers of it
    assert all(isinstance(v, (int, float, type(None))) for m in lines for v in m.values())


def test_mfu_on_a_cpu_is_against_a_matmul_measured_at_the_start(trained):
    line = re.search(r'^mfu is counted against ([\d.]+) TFLOP/s, .*matmul.*$', trained.out, re.M)
    peak = float(line[1]) * 1e12
    m = read_metrics(trained.folder / 'out_jax')[7]
    assert m['iter'] == 5  # the first one that is not smoothed
    params = saved(trained.folder, 'out_jax', 21)[0]['params']
    n_params = (sum(p.size for p in jax.tree.leaves(params))
                - params['transformer']['wpe']['embedding'].size)
    flops = 128 * (6 * n_params + 12 * 32 * 16)  # 128 tokens a step
    # the line rounds the peak to three digits
    np.testing.assert_allclose(m['mfu'], 100 * flops / (m['ms_per_iter'] / 1000) / peak, rtol=1e-2)


FAKE_WANDB = """
class Error(Exception): pass
errors = type("errors", (), {"Error": Error})
class Run:
    id = "x"
    def log(self, values): print("logged", values)
def init(**kwargs): return Run()
"""


def test_lines_come_in_nanogpts_order_reach_wandb_and_only_improvements_are_saved(folder):
    # a step's loss is read only once the next step is queued; with a learning rate of 0 nothing
    # improves after the first evaluation
    (folder / 'wandb.py').write_text(FAKE_WANDB)
    out = train(folder, '--max_iters=9', '--log_interval=3', '--always_save_checkpoint=False',
                '--learning_rate=0.0', '--min_lr=0.0', '--wandb_log=True',
                PYTHONPATH=f'{folder}{os.pathsep}{ROOT}')
    assert re.findall(r'^(step|iter) (\d+)', out, re.M) == [
        ('step', '0'), ('iter', '0'), ('iter', '3'), ('step', '4'), ('iter', '6'), ('step', '8'),
        ('iter', '9')]
    assert out.count('saving checkpoint') == 1
    assert Checkpoints(folder / 'out_jax', read_only=True).steps() == [10]
    lines = [eval(line.removeprefix('logged '), {'nan': float('nan')})
             for line in out.splitlines() if line.startswith('logged ')]
    assert [line['iter'] for line in lines if 'val/loss' in line] == [0, 4, 8]
    steps = [line for line in lines if 'loss' in line]
    assert [line['iter'] for line in steps] == [0, 3, 6, 9]
    assert {'loss', 'grad_norm', 'lr', 'ms_per_iter', 'mfu'} <= steps[0].keys()
    assert f'{steps[-1]["mfu"]:.2f}' == ITER.findall(out)[-1][3]  # in percent


@pytest.mark.slow
def test_compiled_programs_are_cached_unless_turned_off(folder):
    # without the cache that the tests share, which has precedence
    env = {'XDG_CACHE_HOME': str(folder / 'cache'), 'JAX_COMPILATION_CACHE_DIR': ''}
    train(folder, '--eval_only=True', '--compilation_cache=False', **env)
    assert not (folder / 'cache').exists()
    cache = folder / 'cache' / 'nanogpt-jax' / cpu_key()
    env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    found = []
    for out_dir in ('one', 'two'):
        train(folder, '--max_iters=0', f'--out_dir={out_dir}', **env)
        found.append(sorted(cache.glob('*train_step*-cache')))
    assert len(found[0]) == 1 and found[0] == found[1]
    # a folder that cannot be created costs the cache, not the run
    (folder / 'file').write_text('')
    env['XDG_CACHE_HOME'] = str(folder / 'file')
    out = train(folder, '--eval_only=True', **env)
    assert 'compiled programs are not cached for the next start' in out


@pytest.mark.slow
def test_the_time_left_is_printed_on_a_terminal_only(trained):
    assert 'left' not in trained.out
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'train_jax.py'), *TINY, '--max_iters=20000',
         '--out_dir=other'], cwd=trained.folder, stdout=theirs, stderr=subprocess.DEVNULL,
        env=os.environ | ENV)
    os.close(theirs)
    out = b''
    try:
        while b' left, ' not in out and (part := os.read(ours, 2 ** 16)):
            out += part
        out += os.read(ours, 2 ** 16)  # the rest of the line
    except OSError:
        pass  # how Linux reports that the other end is closed
    process.kill()
    process.wait()
    line = r'^\d+:\d\d:\d\d left, done at about \w+ \d\d:\d\d\r$'
    assert re.search(line, out.decode(), re.M), out


@pytest.mark.parametrize('terminal', [True, False])
def test_a_progress_bar_is_drawn_on_a_terminal_only(monkeypatch, terminal):
    tqdm = pytest.importorskip('tqdm', reason='tqdm is not installed')
    monkeypatch.setattr(tqdm, 'tqdm', lambda *args, **kwargs: original(
        *args, **kwargs | dict(mininterval=0, delay=0)))  # drawn at once
    original = type(tqdm.std.tqdm([], disable=True))
    monkeypatch.setattr(sys, 'stdout', io.StringIO())
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
    monkeypatch.setattr(sys, 'stderr', screen := io.StringIO())
    assert list(utils.progress([1, 2, 3], 'evaluating val')) == [1, 2, 3]
    assert ('evaluating val' in screen.getvalue()) is terminal


# -----------------------------------------------------------------------------
# metrics.jsonl

def test_the_metrics_of_another_run_are_renamed(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"iter": 3}\n')
    MetricsFile(tmp_path, 0).write(iter=0, loss=float('inf'))
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"iter": 0, "loss": null}\n'
    (other,) = set(os.listdir(tmp_path)) - {'metrics.jsonl'}
    assert (tmp_path / other).read_text() == '{"iter": 3}\n'


def test_read_metrics_skips_lines_that_are_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    good = b'{"iter": 1, "loss": null}'
    lines = [b'', b'3', b'[]', b'{"loss": 1}', b'{"iter": "1"}', b'\xff', good, b'{"iter": 2,']
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines))
    assert read_metrics(tmp_path) == [{'iter': 1, 'loss': None}]
    (tmp_path / 'metrics.jsonl').unlink()
    os.mkfifo(tmp_path / 'metrics.jsonl')  # reading it would never end
    assert MetricsFile(tmp_path, 3).file is None
    with pytest.raises(UserError, match='metrics.jsonl is not a file'):
        read_metrics(tmp_path)
    (tmp_path / 'metrics.jsonl').unlink()
    os.mkfifo(tmp_path / 'metrics.jsonl.tmp')
    assert MetricsFile(tmp_path, 3).file is None


# -----------------------------------------------------------------------------
# resume and evaluation

@pytest.mark.parametrize('stop, always', [
    (6, False),  # just before an evaluation: its result belongs to the checkpoint that is there
    pytest.param(7, True, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(folder, stop, always):
    args = ['--dropout=0.2', f'--always_save_checkpoint={always}', '--eval_interval=3',
            '--learning_rate=0.1', '--min_lr=0.1']
    uninterrupted = train(folder, *args, '--max_iters=8', '--out_dir=uninterrupted')
    first = train(folder, *args, f'--max_iters={stop - 1}', '--out_dir=parts')
    # a run that was killed after its last checkpoint has logged more, its last line cut off
    with open(folder / 'parts' / 'metrics.jsonl', 'a') as f:
        f.write(f'{{"iter": {stop}, "loss": 1.0}}\n{{"iter": 8, "lo')
    # no other flags: the settings come from the checkpoint
    out = resume(folder, '--out_dir=parts', '--max_iters=8')
    assert f'differs from the checkpoint: max_iters {stop - 1} -> 8\n' in out
    losses = {i[0]: i[1] for part in (first, out) for i in ITER.findall(part)}
    assert losses == {i[0]: i[1] for i in ITER.findall(uninterrupted)}
    # no iteration is skipped or repeated
    assert [int(i[0]) for i in ITER.findall(out)] == list(range(stop, 9))
    state, meta = saved(folder, 'uninterrupted', 9)
    again, meta_again = saved(folder, 'parts', 9)
    np.testing.assert_equal(state, again)
    assert meta['best_val_loss'] == meta_again['best_val_loss']
    assert sorted(os.listdir(folder / 'uninterrupted')) == sorted(os.listdir(folder / 'parts'))

    def numbers(out_dir):
        return [{k: m[k] for k in m if k not in ('ms_per_iter', 'tokens_per_s', 'mfu')}
                for m in read_metrics(folder / out_dir)]
    assert numbers('parts') == numbers('uninterrupted')


def test_eval_only_evaluates_once_whatever_the_seed_and_writes_nothing(copy, trained):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
    out = resume(copy, '--eval_only=True', '--seed=7')
    assert not ITER.findall(out)
    # the model at iteration 21 has trained one step more than that of the last line
    (step, *losses), = STEP.findall(out)
    # its characters have one byte each; the line is computed from the unrounded loss
    bits = float(re.search(r'^val loss in bits per byte: ([\d.]+) \(1.00 bytes per token\)$', out,
                           re.M)[1])
    assert abs(bits - float(losses[1]) / np.log(2)) < 2e-4
    assert step == '21' and abs(float(losses[1]) - float(STEP.findall(trained.out)[-1][2])) < 0.2
    assert {path: path.stat().st_mtime_ns for path in copy.rglob('*')} == before


@pytest.mark.slow
def test_evaluation_does_not_disturb_training(folder):
    args = ['--max_iters=5', '--dropout=0.2']
    train(folder, *args, '--eval_interval=2', '--out_dir=often')
    train(folder, *args, '--eval_interval=100', '--eval_iters=1', '--out_dir=rarely')
    np.testing.assert_equal(saved(folder, 'often', 6)[0], saved(folder, 'rarely', 6)[0])


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_train(trained):
    out = resume(trained.folder)
    assert 'nothing left to train' in out and not ITER.findall(out)


@pytest.mark.slow
def test_a_smaller_block_size_crops_on_resume_and_a_larger_is_refused(copy):
    out = resume(copy, '--block_size=8', '--max_iters=21', '--n_layer=5')
    assert 'block_size 16 -> 8' in out and 'n_layer 1 (kept' in out
    state, meta = saved(copy, 'out_jax', 22)
    assert meta['model_args']['block_size'] == 8
    assert state['params']['transformer']['wpe']['embedding'].shape == (8, 32)
    with pytest.raises(UserError, match='block_size=16 is larger'):
        utils.merge_resumed_config(meta['config'] | {'block_size': 16}, {'block_size'},
                                   meta['config'])


@pytest.mark.slow
def test_a_validation_loss_counts_for_the_data_that_it_was_measured_on_only(copy):
    data = shutil.copytree(copy / 'data' / 'tiny', copy / 'data' / 'easy')
    for split in ('train', 'val'):
        (np.arange(4000) % 20).astype(np.uint16).tofile(data / f'{split}.bin')
    flags = ['--eval_interval=2', '--always_save_checkpoint=False', '--learning_rate=1e-4',
             '--min_lr=1e-4']
    easy = resume(copy, *flags, '--dataset=easy', '--max_iters=25')
    assert 'a run with another dataset; the best validation loss starts anew' in easy
    again = resume(copy, *flags, '--dataset=tiny', '--max_iters=31')
    assert 'the best validation loss is from an earlier checkpoint with this one' in again
    losses = [{int(s[0]): float(s[2]) for s in STEP.findall(out)} for out in (easy, again)]
    best = [min(each, key=each.get) for each in losses]
    assert losses[0][best[0]] < losses[1][best[1]] # and would hide every improvement
    checkpoints = Checkpoints(copy / 'out_jax', read_only=True)
    assert checkpoints.steps() == [*best, 32]
    assert checkpoints.load('best', abstract_state).step == best[1]


def test_resuming_on_other_characters_is_refused(copy):
    meta = pickle.loads((copy / 'data' / 'tiny' / 'meta.pkl').read_bytes())
    meta['itos'] = dict(enumerate(reversed(meta['itos'].values())))
    (copy / 'data' / 'tiny' / 'meta.pkl').write_bytes(pickle.dumps(meta))
    result = run(copy, 'train_jax.py', '--init_from=resume', '--device=cpu', '--max_iters=25')
    one_line_error(result, 'vocabulary of data/tiny differs')


def test_a_second_run_does_not_overwrite_the_first(trained):
    before = sorted(os.listdir(trained.folder / 'out_jax'))
    one_line_error(run(trained.folder, 'train_jax.py', *TINY), '--init_from=resume')
    assert sorted(os.listdir(trained.folder / 'out_jax')) == before


# -----------------------------------------------------------------------------
# wandb

@pytest.mark.slow
def test_wandb_logs_offline_a_resumed_run_keeps_its_id_and_an_error_is_one_line(folder):
    pytest.importorskip('wandb', reason='wandb is not installed')
    env = dict(WANDB_MODE='offline', WANDB_SILENT='true')
    train(folder, '--max_iters=4', '--wandb_log=True', '--wandb_project=p', **env)
    resume(folder, '--max_iters=6', '--wandb_log=False', **env)
    resume(folder, '--max_iters=8', '--wandb_log=True', **env)
    diverging = ['--learning_rate=1e38', '--min_lr=1e38', '--max_iters=50']
    result = run(folder, 'train_jax.py', '--init_from=resume', '--device=cpu', *diverging, **env)
    one_line_error(result, 'not a finite number', alone=True)
    runs = [name for name in os.listdir(folder / 'wandb') if name.startswith('offline-run-')]
    assert len(runs) == 3 and len({name.split('-')[-1] for name in runs}) == 1


@pytest.mark.slow
def test_wandb_without_a_key_is_one_line_with_the_ways_out(folder, monkeypatch):
    pytest.importorskip('wandb', reason='wandb is not installed')
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    nobody = dict(HOME=str(folder), NETRC=str(folder / 'none'), WANDB_CONFIG_DIR=str(folder))
    result = run(folder, 'train_jax.py', *TINY, '--wandb_log=True', **nobody)
    one_line_error(result, 'No API key', '`wandb login`', 'WANDB_MODE=offline', '--wandb_log=False')


# -----------------------------------------------------------------------------
# a user's mistakes: one line, exit code 1, no traceback

def test_a_mistake_is_one_line_with_exit_code_1(folder):
    result = run(folder, 'train_jax.py', *TINY, '--batch_size=0')
    one_line_error(result, 'batch_size is 0; it must be at least 1', alone=True)


GOOD = dict(batch_size=4, block_size=16, gradient_accumulation_steps=2, eval_iters=2)


@pytest.mark.parametrize('wrong, words', [
    (dict(gradient_accumulation_steps=-1),
     'gradient_accumulation_steps is -1; it must be at least 1'),
    (dict(eval_interval=0), 'eval_interval is 0'),
    (dict(max_iters=-1), 'max_iters is -1'),
    (dict(max_iters=2 ** 31), 'max_iters is 2147483648; .*below 2147483648'),
    (dict(learning_rate=-1.0), 'learning_rate is -1.0'),
    (dict(beta2=1.0), 'beta2 is 1.0; .* below 1'),
    (dict(batch_size=10 ** 9), r'2 \* 1000000000 \* 16 need 256 GB of memory'),
    (dict(n_layer=10 ** 4), 'n_layer is 10000; .*below 10000'),
    (dict(seed=2 ** 32), 'seed is 4294967296'),
])
def test_settings_that_no_run_can_use_are_refused(wrong, words):
    utils.check_settings(GOOD)
    with pytest.raises(UserError, match=words):
        utils.check_settings(GOOD | wrong)


def test_processes_with_different_settings_are_refused():
    same = GOOD | dict(out_dir='a', device='cuda:0')
    utils.check_same_settings([same, same | dict(out_dir='b', device='cuda:1')])
    with pytest.raises(UserError, match='max_iters is 20 in process 0 and 9 in process 2: start'):
        utils.check_same_settings([same | dict(max_iters=20), same | dict(max_iters=20),
                                   same | dict(max_iters=9)])


def test_a_model_that_does_not_fit_into_memory_is_refused():
    with pytest.raises(UserError, match='two moments of AdamW .* GB of memory'):
        utils.init_train_state(GPTConfig(n_layer=9999, n_head=1, n_embd=60000), None, 0,
                               one_device_mesh())


# -----------------------------------------------------------------------------
# data that cannot be used, or changes

def batches_of(folder, **changed):
    settings = dict(layout=layout_of(one_device_mesh(), 4), data_dir=str(folder / 'data' / 'tiny'),
                    block_size=16, vocab_size=20, seed=0, eval_iters=2, batch_size=4)
    return utils.Batches(**settings | changed)


@pytest.mark.parametrize('content, words', [
    (b'\0' * 32, 'train.bin has 16 tokens, but needs block_size [+] 1 = 17'),
    (b'\0' * 101, 'train.bin has 101 bytes, but token ids have two'),
    (b'\0\0' * 16 + b'\x14\0' * 2, 'train.bin has the token id 20, .* ends at 19'),
])
def test_unusable_data_is_refused(folder, content, words):
    (folder / 'data' / 'tiny' / 'train.bin').write_bytes(content)
    with pytest.raises(UserError, match=words):
        batches_of(folder).train(0)


def test_data_that_is_missing_or_unreadable_is_told_apart(folder, monkeypatch):
    with pytest.raises(UserError, match='no folder .*absent: choose another --dataset'):
        batches_of(folder, data_dir=str(folder / 'absent')).train(0)
    (folder / 'raw').mkdir()
    with pytest.raises(UserError, match='raw/train.bin does not exist: .*python .*prepare.py'):
        batches_of(folder, data_dir=str(folder / 'raw')).train(0)
    def denied(path, *args, **kwargs):  # root may read everything
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(os, 'stat', denied)
    with pytest.raises(UserError, match='cannot read .*tiny/train.bin: Permission denied'):
        batches_of(folder).train(0)


def test_data_that_changes_during_a_run_is_a_warning_and_a_shorter_file_an_error(folder, capsys):
    path = folder / 'data' / 'tiny' / 'val.bin'
    batches = batches_of(folder)
    assert len([*batches.evaluation('val')]) == 2
    with open(path, 'ab') as f:
        f.write(b'\0\0')
    for _ in range(2):
        next(batches.evaluation('val'))
    assert capsys.readouterr().out.count('val.bin has changed since this run started') == 1
    path.write_bytes(b'\0' * 40)
    with pytest.raises(UserError, match='val.bin has become shorter since this run started'):
        [*batches.evaluation('val')]
    path.unlink()
    os.mkfifo(path)  # reading it would never end
    with pytest.raises(UserError, match='val.bin is not a file'):
        [*batches.evaluation('val')]


@pytest.mark.parametrize('content, words', [
    (b'no pickle', 'meta.pkl .*prepare.py'),
    (pickle.dumps({'vocab_size': 2 ** 31}), 'vocab_size is 2147483648; .* from 1 to 65536'),
    (pickle.dumps({'vocab_size': 2, 'itos': {0: 'a', 1: 2}}), 'itos must have a string'),
    (b'cos\nsystem\n(S"touch executed"\ntR.', 'os.system.*only plain Python data'),
])
def test_a_meta_file_that_is_not_plain_data_is_refused_and_runs_no_code(
        folder, monkeypatch, content, words):
    from nanogpt_jax.tokenizer import load_vocabulary
    monkeypatch.chdir(folder)
    (folder / 'data' / 'tiny' / 'meta.pkl').write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_vocabulary(str(folder / 'data' / 'tiny'))
    assert not (folder / 'executed').exists()
