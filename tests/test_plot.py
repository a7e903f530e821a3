"""tools.plot: its table and its picture, for logs and metrics made here."""

import json
import os

import numpy as np
import pytest

from nanogpt_jax.errors import UserError
from tools import plot


def torch_lines(its=range(0, 20), ms=lambda it: 30 + it, loss=lambda it: 4 - it / 10, every=10):
    """PyTorch nanoGPT's log lines. Its times include evaluations, here at multiples of every."""
    for it in its:
        if it % every == 0:
            yield f'step {it}: train loss {loss(it) + .1:.4f}, val loss {loss(it) + .2:.4f}'
        yield (f'iter {it}: loss {loss(it):.4f}, time {999 if it % every == 0 else ms(it):.2f}ms, '
               'mfu 0.03%')


def torch_log(path, *args, **kwargs):
    path.write_text('\n'.join(['Overriding: device = cpu', 'tokens per iteration will be: 1,000',
                               *torch_lines(*args, **kwargs), '']))
    return path


def logged(it, loss, ms):
    return {'iter': it, 'tokens': 1000 * (it + 1), 'loss': loss, 'lr': 1e-3, 'grad_norm': .8,
            'ms_per_iter': ms, 'tokens_per_s': 1e6 / ms, 'mfu': None}


def evaluated(it, val_loss):
    return {'iter': it, 'tokens': 1000 * it, 'train_loss': 9.0, 'val_loss': val_loss, 'lr': 1e-3}


def out_dir(path, records):
    path.mkdir()
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def read(*paths, labels=None):
    return [plot.read_run(str(path), name)
            for path, name in zip(paths, labels or [path.name for path in paths])]


def rows(*paths):
    runs = read(*paths)
    return [plot.table_row(run, runs[0]) for run in runs]


def draw(*paths, labels=None, smooth=0.0):
    return plot.draw(read(*paths, labels=labels), smooth)


def drawn(ax):
    """[(x, y)] of a panel's lines: for each run its training loss, then its evaluations."""
    return [line.get_xydata().T for line in ax.lines]


# -----------------------------------------------------------------------------
# reading runs, and the table

def test_the_table_has_the_numbers_of_both_kinds_of_run(tmp_path):
    # of PyTorch iterations 5 to 9 and 11 to 18 count: 35 to 39 and 41 to 48 ms, with median 42
    log = torch_log(tmp_path / 'torch.log', range(19))
    out = out_dir(tmp_path / 'out-jax', [
        evaluated(0, 4.2), *[logged(it, 4 - it / 10, 900 if it < 5 else 21) for it in range(9)],
        evaluated(9, 2.5), logged(9, 3.0, 21), evaluated(10, 2.7), logged(10, None, 21)])
    # neither tokens per iteration nor evaluations; no iterations
    (tmp_path / 'iters').write_text('\n'.join(torch_lines(range(1, 9))))
    (tmp_path / 'steps').write_text('step 0: train loss 4.0000, val loss 4.1000\n'
                                    'step 5: train loss nan, val loss nan\n')
    paths = log, out, tmp_path / 'iters', tmp_path / 'steps'
    assert rows(*paths) == [
        ['torch.log', '18', '2.2000', '3.2000', '3.2000 at 10', '42.00', '23,810', '1.00'],
        ['out-jax', '10', 'nan', '2.7000', '2.5000 at 9', '21.00', '47,619', '0.50'],
        ['iters', '8', '3.2000', '-', '-', '37.00', '-', '0.88'],  # the median of 36, 37 and 38
        ['steps', '5', '-', 'nan', '4.1000 at 0', '-', '-', '-']]
    assert len(draw(*paths).axes[0].lines) == 8


def test_times_that_include_an_evaluation_are_left_out(tmp_path):
    log = torch_log(tmp_path / 'torch.log', range(21), ms=lambda it: 10)
    (tmp_path / 'jax.log').write_text('platform: cpu, devices: 1 (cpu), processes: 1\n'
                                      + log.read_text())
    torch, torch_evals, jax, _ = drawn(draw(log, tmp_path / 'jax.log').axes[1])
    assert torch[0] == pytest.approx(np.arange(1, 22) * .01)  # rounding
    assert torch_evals[0] == pytest.approx([0, .1, .2])
    # train_jax.py's own times never include an evaluation
    assert jax[0][-1] == pytest.approx(18 * .01 + 3 * .999)


def test_a_logged_line_counts_for_the_iterations_since_the_last(tmp_path):
    out = out_dir(tmp_path / 'out', [evaluated(0, 4.0), logged(0, 4.0, 5), evaluated(10, 3.0),
                                     logged(10, 3.0, 20), logged(20, 2.0, 30), evaluated(21, 2.0)])
    fig = draw(out)
    training, evaluations = drawn(fig.axes[1])
    assert training[0] == pytest.approx([.005, .205, .505])  # 1, 10 and 10 iterations
    assert evaluations[0] == pytest.approx([0, .185, .505])  # before the iteration of its number
    assert [list(line[0]) for line in drawn(fig.axes[0])] == [[0, 10, 20], [0, 10, 21]]


def test_of_repeated_iterations_the_later_ones_are_plotted(tmp_path):
    out_dir(tmp_path / 'run', [
        evaluated(0, 4.2), *[logged(it, 4 - it / 10, 30) for it in range(10)],
        evaluated(10, 3.2), *[logged(it, 4 - it / 10, 30) for it in range(10, 20)],
        *[r for it in range(20, 25) for r in (evaluated(it, 9.0), logged(it, 4 - it / 10, 30))],
        *[r for it in (20, 25, 30)
          for r in (evaluated(it, 1.2 + it / 100), logged(it, 1 + it / 100, 30))]])
    training, evaluations = drawn(draw(tmp_path / 'run').axes[0])
    assert list(training[0]) == [*range(20), 20, 25, 30]
    assert list(training[1][-3:]) == pytest.approx([1.2, 1.25, 1.3])
    assert list(evaluations[0]) == [0, 10, 20, 25, 30]
    assert evaluations[1][-1] == pytest.approx(1.5)


def test_a_truncated_log_has_a_prefix_of_the_events_and_can_be_appended_to(tmp_path):
    """What a crash leaves; a resumed run writes after it."""
    full = torch_log(tmp_path / 'full.log', range(9, 12), ms=lambda it: it + .25,
                     loss=lambda it: it + .1234).read_bytes()

    def events_of(content):
        (tmp_path / 'run.log').write_bytes(content)
        return list(map(repr, plot.read_events(str(tmp_path / 'run.log'))))  # nan equals nan here
    events = events_of(full)
    assert len(events) == 4
    for cut in range(len(full)):
        before = events_of(full[:cut])
        assert before == events[:len(before)]
        assert events_of(full[:cut] + full)[-4:] == events


# -----------------------------------------------------------------------------
# the picture

def test_the_picture_has_axes_with_units_and_a_legend_that_tells_runs_apart(tmp_path):
    paths = [torch_log(tmp_path / f'{i}.log') for i in range(20)]
    fig = draw(*paths)
    left, right = fig.axes
    assert left.get_xlabel() == 'iteration' and left.get_ylabel() == 'loss (nats per token)'
    assert right.get_xlabel() == 'training time without evaluations (s)'
    assert left.get_ylim() == right.get_ylim()
    legend, = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == [path.name for path in paths]
    looks, in_legend = ([(line.get_color(), line.get_linestyle()) for line in lines]
                        for lines in (left.lines[1::2], legend.get_lines()))
    assert len(set(looks)) == 20 and looks == in_legend


def test_a_value_that_is_not_a_number_is_unknown(tmp_path):
    odd = ['x', [1], 10 ** 400, {}, None]
    records = [{'iter': i, 'loss': x, 'ms_per_iter': x} for i, x in enumerate(odd)]
    path = out_dir(tmp_path / 'a', [*records, {'iter': 5, 'val_loss': 'x'}, evaluated(6, 2.0)])
    run, = read(path)
    assert np.isnan(run.losses).all() and [*run.vals[1:]] == [2.0] and len(run.losses) == 5


def test_smoothing_is_a_mean_around_each_finite_point_and_the_start_is_left_out(tmp_path):
    losses = np.random.default_rng(0).uniform(1, 3, 50)
    out = out_dir(tmp_path / 'out', [logged(it, loss, 9) for it, loss in enumerate(losses)])
    smooth = drawn(draw(out, smooth=0.2).axes[0])[0][1]  # 5 on each side
    assert smooth[20] == pytest.approx(losses[15:26].mean())
    assert smooth[2] == pytest.approx(losses[:5].mean())
    assert smooth[49] == pytest.approx(losses[44:].mean())
    nans = out_dir(tmp_path / 'nans', [logged(it, None if it == 25 else 2.0, 9)
                                       for it in range(50)])
    its, smooth = drawn(draw(nans, smooth=0.2).axes[0])[0]
    assert len(its) == 49 and set(smooth) == {2.0}
    falls = out_dir(tmp_path / 'falls', [r for it in range(0, 100, 2) for r in (
        evaluated(it, 9 if it < 10 else 2 + it / 100), logged(it, 9 if it < 10 else 1.5, 9))])
    bottom, top = draw(falls).axes[0].get_ylim()
    assert 1.3 < bottom < 1.5 and 2.98 < top < 3.2  # overfitting stays in the picture


def test_runs_with_the_same_label_are_their_mean_in_a_band(tmp_path):
    for name, high in (('a', 0), ('b', 1), ('c', 2.5)):
        # the third is shorter, so what follows its end is in no mean
        torch_log(tmp_path / name, range(30 if name == 'c' else 40),
                  ms=lambda it, high=high: 10 + high, loss=lambda it, high=high: 2 + high)
    torch_log(tmp_path / 'd', range(30))
    fig = draw(*(tmp_path / name for name in 'abdc'), labels=['x', 'x', 'y', 'x'])
    x, x_evals, *y = drawn(fig.axes[0])
    assert len(y) == 2 and list(x[0]) == [*range(30)] and list(x_evals[0]) == [0, 10, 20]
    assert set(np.round(x[1], 4)) == {3.1667} and set(np.round(x_evals[1], 4)) == {3.3667}
    band, evals_band, *_ = (c.get_paths()[0].vertices[:, 1] for c in fig.axes[0].collections)
    assert {*band} == {2, 4.5} and {*evals_band} == {2.2, 4.7}
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['x', 'y']


# -----------------------------------------------------------------------------
# the command line

def test_the_picture_is_a_png_that_is_overwritten_after_the_table(tmp_path, monkeypatch, capsys):
    torch_log(tmp_path / 'a.log')
    monkeypatch.setattr(plot, 'args', ['a.log'])
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'compare.png').write_text('an older picture')
    plot.main()
    assert (tmp_path / 'compare.png').read_bytes().startswith(b'\x89PNG')
    printed = capsys.readouterr().out.splitlines()
    assert '| a.log' in printed[-2] and printed[-1] == 'compare.png written'


@pytest.mark.parametrize('args, words', [
    ([], ['no run', 'out_dirs or log files']),
    (['absent.log'], ['absent.log', 'No such file', 'metrics.jsonl']),
    (['piped'], ['piped/metrics.jsonl', 'not a file']),
    (['other.txt'], ['no run in other.txt', 'iter 250', 'step 250']),
    (['a.log', '--labels=x,y'], ['2 names for 1 runs']),
    (['a.log', '--out=a.log'], ['cannot write a.log', 'png']),
    (['a.log', '--out=absent/a.png'], ['absent/a.png', '--out']),
])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, args, words):
    torch_log(tmp_path / 'a.log')
    (tmp_path / 'other.txt').write_text('nothing\n')
    (tmp_path / 'piped').mkdir()
    os.mkfifo(tmp_path / 'piped' / 'metrics.jsonl')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, 'args', args)
    for flag in args:
        if flag.startswith('--'):
            monkeypatch.setattr(plot, *flag[2:].split('='))
    with pytest.raises(UserError) as e:
        plot.main()
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in words), e.value
    assert sorted(os.listdir(tmp_path)) == ['a.log', 'other.txt', 'piped']
