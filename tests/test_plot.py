"""tools.plot: its table and its picture, for logs and metrics made here."""

import json
import os

import numpy as np
import pytest

from nanogpt_jax.errors import UserError
from tools import plot


@pytest.fixture(autouse=True)
def not_smoothed(monkeypatch):
    monkeypatch.setattr(plot, 'smooth', 0.0)


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
    return {'iter': it, 'loss': loss, 'ms_per_iter': ms, 'tokens_per_s': 1e6 / ms, 'mfu': None}


def evaluated(it, val_loss):
    return {'iter': it, 'train_loss': 9.0, 'val_loss': val_loss}


def out_dir(path, records):
    path.mkdir()
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def draw(*paths, labels=None, bars=()):
    names = labels or [path.name for path in paths]
    return plot.draw([plot.read_run(str(path), name) for path, name in zip(paths, names)], bars)


def drawn(ax):
    """[(x, y)] of a panel's lines: for each run its training loss, then its evaluations."""
    return [line.get_xydata().T for line in ax.lines]


# -----------------------------------------------------------------------------
# reading runs, and the table

def test_the_table_has_the_numbers_of_both_kinds_of_run(tmp_path):
    log = torch_log(tmp_path / 'torch.log', range(19))
    out = out_dir(tmp_path / 'out-jax', [
        evaluated(0, 4.2), *[logged(it, 4 - it / 10, 900 if it < 5 else 21) for it in range(9)],
        evaluated(9, 2.5), logged(9, 3.0, 21), evaluated(10, 2.7), logged(10, None, 21)])
    # neither tokens per iteration nor evaluations; no iterations
    (tmp_path / 'iters').write_text('\n'.join(torch_lines(range(1, 9))))
    (tmp_path / 'steps').write_text('step 0: train loss 4.0000, val loss 4.1000\n'
                                    'step 5: train loss nan, val loss nan\n')
    paths = log, out, tmp_path / 'iters', tmp_path / 'steps'
    runs = [plot.read_run(str(path), path.name) for path in paths]
    assert [plot.table_row(run, runs[0]) for run in runs] == [
        # of iterations 6 to 9 and 11 to 18, with 36 to 39 and 41 to 48 ms
        ['torch.log', '18', '2.2000', '3.2000', '3.2000 at 10', '42.50', '23,533', '1.00'],
        ['out-jax', '10', 'nan', '2.7000', '2.5000 at 9', '21.00', '47,619', '0.49'],
        ['iters', '8', '3.2000', '-', '-', '37.00', '-', '0.87'],  # the median of 36, 37 and 38
        ['steps', '5', '-', 'nan', '4.1000 at 0', '-', '-', '-']]
    assert len(draw(*paths).axes[0].lines) == 8


def test_a_logged_line_counts_for_the_iterations_since_the_last(tmp_path):
    out = out_dir(tmp_path / 'out', [evaluated(0, 4.0), logged(0, 4.0, 5), evaluated(10, 3.0),
                                     logged(10, 3.0, 20), logged(20, 2.0, 30), evaluated(21, 2.0)])
    left, right = draw(out).axes
    training, evaluations = drawn(right)
    assert training[0] == pytest.approx([.005, .205, .505])  # 1, 10 and 10 iterations
    assert evaluations[0] == pytest.approx([0, .185, .505])  # before the iteration of its number
    assert [list(line[0]) for line in drawn(left)] == [[0, 10, 20], [0, 10, 21]]
    # a time that includes an evaluation is left out
    torch = drawn(draw(torch_log(tmp_path / 'log', range(21), ms=lambda it: 10)).axes[1])
    assert torch[0][0] == pytest.approx(np.arange(1, 22) * .01)
    assert torch[1][0] == pytest.approx([0, .1, .2])


def test_of_repeated_iterations_the_later_ones_are_plotted(tmp_path):
    out_dir(tmp_path / 'run', [
        evaluated(0, 4.2), *[logged(it, 4.0, 30) for it in range(20)],
        *[r for it in range(20, 25) for r in (evaluated(it, 9.0), logged(it, 9.0, 30))],
        *[r for it in (20, 25, 30) for r in (evaluated(it, it / 10), logged(it, it / 20, 30))]])
    training, evaluations = drawn(draw(tmp_path / 'run').axes[0])
    assert list(training[0]) == [*range(20), 20, 25, 30]
    assert list(training[1][-3:]) == [1, 1.25, 1.5]
    assert evaluations.tolist() == [[0, 20, 25, 30], [4.2, 2, 2.5, 3]]


def test_a_truncated_log_has_a_prefix_of_the_events_and_can_be_appended_to(tmp_path):
    """What a crash leaves; a resumed run writes after it."""
    full = torch_log(tmp_path / 'full.log', range(9, 12), ms=lambda it: it + .25,
                     loss=lambda it: it + .1234).read_bytes()

    def events_of(content):
        (tmp_path / 'run.log').write_bytes(content)
        return list(map(repr, plot.read_records(str(tmp_path / 'run.log'))))  # nan equals nan here
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


def test_smoothing_is_a_mean_around_each_finite_point_and_the_start_is_left_out(
        tmp_path, monkeypatch):
    losses = np.random.default_rng(0).uniform(1, 3, 50)
    falls = out_dir(tmp_path / 'falls', [r for it in range(0, 100, 2) for r in (
        evaluated(it, 9 if it < 10 else 2 + it / 100), logged(it, 9 if it < 10 else 1.5, 9))])
    bottom, top = draw(falls).axes[0].get_ylim()
    assert 1.3 < bottom < 1.5 and 2.98 < top < 3.2  # overfitting stays in the picture
    monkeypatch.setattr(plot, 'smooth', 0.2)  # 5 on each side
    out = out_dir(tmp_path / 'out', [logged(it, loss, 9) for it, loss in enumerate(losses)])
    smooth = drawn(draw(out).axes[0])[0][1]
    for it, mean in (2, losses[:8]), (20, losses[15:26]), (49, losses[44:]):
        assert smooth[it] == pytest.approx(mean.mean())
    nans = out_dir(tmp_path / 'nans', [logged(it, None if it == 25 else 2.0, 9)
                                       for it in range(50)])
    its, smooth = drawn(draw(nans).axes[0])[0]
    assert len(its) == 49 and smooth == pytest.approx(2.0)


def test_runs_with_the_same_label_are_their_mean_in_a_band(tmp_path):
    for name, high in (('a', 0), ('b', 1), ('c', 2.5)):
        # the third is shorter, so what follows its end is in no mean
        torch_log(tmp_path / name, range(30 if name == 'c' else 40),
                  loss=lambda it, high=high: 2 + high)
    torch_log(tmp_path / 'd', range(30))
    fig = draw(*(tmp_path / name for name in 'abdc'), labels=['x', 'x', 'y', 'x'])
    x, x_evals, *y = drawn(fig.axes[0])
    assert len(y) == 2 and list(x[0]) == [*range(30)] and list(x_evals[0]) == [0, 10, 20]
    assert set(np.round(x[1], 4)) == {3.1667} and set(np.round(x_evals[1], 4)) == {3.3667}
    band, evals_band, *_ = (c.get_paths()[0].vertices[:, 1] for c in fig.axes[0].collections)
    assert {*band} == {2, 4.5} and {*evals_band} == {2.2, 4.7}
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['x', 'y']


def test_bars_of_times_stand_beside_the_validation_loss_from_the_start_on(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, 'titles', 'The same loss,Less waiting')
    paths = torch_log(tmp_path / 'a'), torch_log(tmp_path / 'b')
    fig = draw(*paths, bars=[('samples', 2, 50, 's'), ('A', 20, 30, 'ms'), ('C', 20, 17, 'ms')])
    left, seconds, ms = fig.axes
    assert [ax.get_title() for ax in (left, seconds)] == ['The same loss', 'Less waiting']
    assert [[*line[0]] for line in drawn(left)] == [[0, 10]] * 2 and left.get_ylim()[1] > 4.2
    assert [text.get_text() for text in seconds.texts] == ['2 s', '50 s (25.00\u00d7)']
    assert [text.get_text() for text in ms.texts] == [
        '20 ms', '20 ms', '30 ms (1.50\u00d7)', '17 ms (0.85\u00d7)']
    assert [bar.get_width() for bar in ms.patches] == [20, 20, 30, 17]
    assert [text.get_text() for text in ms.get_yticklabels()] == ['A', 'C']


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
    (['other.txt'], ['no run in other.txt', 'iter 250']),
    (['a.log', '--labels=x,y'], ['2 names for 1 runs']),
    (['a.log', '--times=other.txt'], ['cannot read other.txt', '--times', '[["ten samples", ']),
    (['a.log', '--out=a.log'], ['cannot write a.log', 'png'])])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, args, words):
    torch_log(tmp_path / 'a.log')
    (tmp_path / 'other.txt').write_text('nothing\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, 'args', args)
    for flag in args:
        if flag.startswith('--'):
            monkeypatch.setattr(plot, *flag[2:].split('='))
    with pytest.raises(UserError) as e:
        plot.main()
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in words), e.value
    assert sorted(os.listdir(tmp_path)) == ['a.log', 'other.txt']
