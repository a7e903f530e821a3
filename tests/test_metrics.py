"""metrics.jsonl, the time left and progress bars: of real runs, and on a pseudo-terminal."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ENV, ITER, STEP, TINY, TRAIN, train

from nanogpt_jax import devices, metrics
from nanogpt_jax.errors import UserError
from nanogpt_jax.metrics import progress
from nanogpt_jax.run_dir import MetricsFile, read_metrics


def split(lines):
    """(the lines of iterations, the lines of evaluations)."""
    return ([line for line in lines if 'loss' in line],
            [line for line in lines if 'val_loss' in line])


def test_metrics_have_the_numbers_of_every_log_line(folder):
    out = train(folder, '--max_iters=9', '--log_interval=2')
    iters, steps = split(read_metrics(folder / 'out_jax'))
    assert [(str(m['iter']), f'{m["loss"]:.4f}', f'{m["ms_per_iter"]:.2f}',
             'nan') for m in iters] == ITER.findall(out)
    assert all(m['mfu'] is None for m in iters)  # a CPU's peak is not known
    assert [(str(m['iter']), f'{m["train_loss"]:.4f}', f'{m["val_loss"]:.4f}')
            for m in steps] == STEP.findall(out)
    tokens_per_iter = 2 * 4 * 16  # micro-steps, sequences, tokens
    assert [m['tokens'] for m in iters] == [tokens_per_iter * (m['iter'] + 1) for m in iters]
    assert [m['tokens'] for m in steps] == [tokens_per_iter * m['iter'] for m in steps]
    for m in iters:
        # one is computed from the other's number, unrounded
        assert abs(m['tokens_per_s'] * m['ms_per_iter'] / 1000 / tokens_per_iter - 1) < 1e-9
        assert m['grad_norm'] > 0 and 0 < m['lr'] < 1.001e-2
    # one type per column, so that pandas.read_json(path, lines=True) makes numbers of it
    assert all(isinstance(v, (int, float, type(None))) for m in iters + steps for v in m.values())


def test_mfu_is_against_the_devices_peak_and_unknown_for_five_iterations(
        folder, monkeypatch):
    monkeypatch.setitem(devices.PEAK_FLOPS, 'cpu', 1e9)
    out = train(folder, '--max_iters=9')
    assert 'mfu is counted against 0.001 TFLOP/s, the 16-bit peak of cpu' in out
    printed = [mfu for *_, mfu in ITER.findall(out)]
    assert printed[:5] == ['-100.00'] * 5
    iters, _ = split(read_metrics(folder / 'out_jax'))
    mfus = [m['mfu'] for m in iters]
    assert mfus[:5] == [None] * 5 and printed[5:] == [f'{mfu * 100:.2f}' for mfu in mfus[5:]]
    n_params = 2 * 32 + 12 * 32 ** 2 + 32 + 20 * 32  # LayerNorms, matrices, the last, wte
    flops = 128 * (6 * n_params + 12 * 32 * 16)  # 128 tokens a step
    np.testing.assert_allclose(mfus[5], flops / (iters[5]['ms_per_iter'] / 1000) / 1e9, rtol=1e-9)


@pytest.mark.parametrize('peaks, logged', [({}, []), ({'cpu': 1e9}, [-100, 0])])
def test_wandb_gets_mfu_only_if_the_peak_is_known(folder, monkeypatch, peaks, logged):
    lines = []
    offline = SimpleNamespace(settings=SimpleNamespace(mode='offline'))
    stub = SimpleNamespace(__file__='wandb.py', setup=lambda: offline, log=lines.append,
                           init=lambda **kwargs: SimpleNamespace(id='x'))
    monkeypatch.setitem(sys.modules, 'wandb', stub)
    monkeypatch.setattr(devices, 'PEAK_FLOPS', devices.PEAK_FLOPS | peaks)
    train(folder, '--max_iters=8', '--eval_interval=8', '--wandb_log=True')
    assert [line['iter'] for line in lines] == [0, 8]
    mfus = [line['mfu'] for line in lines if 'mfu' in line]
    assert len(mfus) == len(logged) and all(m == -100 or m >= 0 for m in mfus), mfus


def test_a_resumed_run_leaves_the_metrics_of_an_uninterrupted_one(folder):
    train(folder, '--max_iters=9', '--out_dir=whole')
    train(folder, '--max_iters=5', '--out_dir=parts')
    # a run that was killed after its last checkpoint has written more, its last line cut off
    with open(folder / 'parts' / 'metrics.jsonl', 'a') as f:
        f.write('{"iter": 6, "loss": 1.0}\n{"iter": 7, "loss": 1.0}\n{"iter": 8, "lo')
    train(folder, '--init_from=resume', '--max_iters=9', '--out_dir=parts')
    def numbers(out_dir):
        return [{k: m[k] for k in m if k not in ('ms_per_iter', 'tokens_per_s', 'mfu')}
                for m in read_metrics(folder / out_dir)]
    assert numbers('parts') == numbers('whole') and len(numbers('whole')) == 13


def test_the_metrics_of_another_run_are_renamed(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"iter": 3}\n')
    MetricsFile(tmp_path, 0).write(iter=0, loss=float('inf'))
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"iter": 0, "loss": null}\n'
    (other,) = set(os.listdir(tmp_path)) - {'metrics.jsonl'}
    assert (tmp_path / other).read_text() == '{"iter": 3}\n'


def test_metrics_that_cannot_be_written_are_a_warning(tmp_path, capsys):
    metrics_file = MetricsFile(tmp_path / 'absent', 0)
    metrics_file.write(iter=0)
    assert capsys.readouterr().out.startswith('WARNING: ') and metrics_file.file is None


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no named pipes')
def test_metrics_that_are_a_named_pipe_are_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / 'metrics.jsonl')
    with pytest.raises(UserError, match='metrics.jsonl is not a file'):
        read_metrics(tmp_path)
    assert MetricsFile(tmp_path, 3).file is None
    assert 'is not a file); training continues without it' in capsys.readouterr().out


def test_read_metrics_skips_lines_that_are_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    good = {'iter': 1, 'loss': None}
    lines = [b'', b'3', b'[]', b'{"loss": 1}', b'{"iter": "1"}', b'\xff', json.dumps(good).encode(),
             b'{"iter": 2,', b'[' * 99999, b'{"iter": 1%s}' % (b'0' * 99)]
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines))
    assert read_metrics(tmp_path) == read_metrics(tmp_path / 'metrics.jsonl') == [good]


# -----------------------------------------------------------------------------
# on a terminal

@pytest.mark.skipif(sys.platform == 'win32', reason='there are no pseudo-terminals')
def test_the_time_left_is_printed_on_a_terminal_only(folder):
    assert 'left' not in train(folder, '--max_iters=8')
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*TRAIN, *TINY, '--max_iters=20000', '--out_dir=other'], cwd=folder,
                               stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | ENV)
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
    assert re.search(r'^\d:\d\d:\d\d left, done at about \w+ \d\d:\d\d\r$', out.decode(), re.M), out


@pytest.mark.parametrize('terminal', [True, False])
def test_a_progress_bar_is_drawn_on_a_terminal_only(monkeypatch, terminal):
    tqdm = pytest.importorskip('tqdm', reason='tqdm is not installed')
    monkeypatch.setattr(tqdm, 'tqdm', partial(tqdm.tqdm, mininterval=0))  # drawn at each update
    monkeypatch.setattr(metrics, 'BAR_DELAY', 0)
    monkeypatch.setattr(sys, 'stdout', io.StringIO())
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
    monkeypatch.setattr(sys, 'stderr', screen := io.StringIO())
    assert list(progress([1, 2, 3], 'evaluating val', 200)) == [1, 2, 3]
    assert ('evaluating val' in screen.getvalue()) is terminal
    # the batches of an evaluation, not the parts that it is computed in
    assert all((f' {n}/200 [' in screen.getvalue()) is terminal for n in (0, 66, 133, 200))
