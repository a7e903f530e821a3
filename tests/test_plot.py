"""tools.plot: its table and its picture, for logs and metrics made here and for a real run."""

import json
import math
import os
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import one_line_error, process_state_restored, run, run_inside, train
from matplotlib.colors import to_hex


@pytest.fixture
def plot(tmp_path, monkeypatch, capsys):
    """A function that runs the tool in tmp_path and returns the names that it defines, with `rows`,
    the cells of its table, and `printed`."""
    def plot(*args):
        with process_state_restored():
            sys.argv = ['plot', *map(str, args)]
            result = SimpleNamespace(**runpy.run_module('tools.plot'))
        result.printed = capsys.readouterr().out
        result.rows = [[cell.strip() for cell in line.strip('|').split('|')]
                       for line in result.printed.splitlines() if line.startswith('|')][2:]
        return result
    monkeypatch.chdir(tmp_path)
    return plot


def torch_lines(its=range(0, 20), ms=lambda it: 30 + it, loss=lambda it: 4 - it / 10, every=10):
    """PyTorch nanoGPT's log lines. Its times include evaluations, here at multiples of every."""
    for it in its:
        if it % every == 0:
            yield f'step {it}: train loss {loss(it) + .1:.4f}, val loss {loss(it) + .2:.4f}'
        yield (f'iter {it}: loss {loss(it):.4f}, time {999 if it % every == 0 else ms(it):.2f}ms, '
               'mfu 0.03%')


def torch_log(path, *args, tokens=1000, **kwargs):
    path.write_text('\n'.join(['Overriding: device = cpu',
                               f'tokens per iteration will be: {tokens:,}',
                               *torch_lines(*args, **kwargs), '']))
    return path


def logged(it, loss, ms):
    return {'iter': it, 'tokens': 1000 * (it + 1), 'loss': loss, 'lr': 1e-3, 'grad_norm': .8,
            'ms_per_iter': ms, 'tokens_per_s': 1e6 / ms, 'mfu': None}


def evaluated(it, val_loss):
    return {'iter': it, 'tokens': 1000 * it, 'train_loss': 9.0, 'val_loss': val_loss, 'lr': 1e-3}


def out_dir(path, records):
    path.mkdir(exist_ok=True)
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def drawn(ax):
    """[(x, y)] of a panel's lines: for each run its training loss, then its evaluations."""
    return [line.get_xydata().T for line in ax.lines]


# -----------------------------------------------------------------------------
# reading runs, and the table

def test_the_table_has_the_numbers_of_both_kinds_of_run(plot, tmp_path):
    # of PyTorch iterations 5 to 9 and 11 to 18 count: 35 to 39 and 41 to 48 ms, with median 42
    torch_log(tmp_path / 'torch.log', range(19))
    out_dir(tmp_path / 'out-jax', [
        evaluated(0, 4.2), *[logged(it, 4 - it / 10, 900 if it < 5 else 21) for it in range(9)],
        evaluated(9, 2.5), logged(9, 3.0, 21), evaluated(10, 2.7), logged(10, None, 21)])
    result = plot('torch.log', 'out-jax', '--out=')
    assert result.rows == [
        ['torch.log', '18', '2.2000', '3.2000', '3.2000 at 10', '42.00', '23,810',
         '1.00'],
        ['out-jax', '10', 'nan', '2.7000', '2.5000 at 9', '21.00', '47,619', '0.50']]
    assert 'WARNING' not in result.printed
    assert sorted(os.listdir(tmp_path)) == ['out-jax', 'torch.log']


def test_what_a_run_does_not_say_is_a_dash(plot, tmp_path):
    # neither tokens per iteration nor evaluations
    (tmp_path / 'iters.log').write_text('\n'.join(torch_lines(range(1, 9))))
    # no iteration after the fifth
    (tmp_path / 'short.log').write_text('\n'.join(torch_lines(range(1, 4))))
    (tmp_path / 'steps.log').write_text('step 0: train loss 4.0000, val loss 4.1000\n'
                                        'step 5: train loss nan, val loss nan\n')
    assert plot('iters.log', 'short.log', 'steps.log').rows == [
        # the median of 36, 37 and 38
        ['iters.log', '8', '3.2000', '-', '-', '37.00', '-', '1.00'],
        ['short.log', '3', '3.7000', '-', '-', '32.00', '-', '0.86'],
        ['steps.log', '5', '-', 'nan', '4.1000 at 0', '-', '-', '-']]


def test_times_that_include_an_evaluation_are_left_out(plot, tmp_path):
    log = torch_log(tmp_path / 'torch.log', range(21), ms=lambda it: 10)
    (tmp_path / 'jax.log').write_text('platform: cpu, devices: 1 (cpu), processes: 1\n'
                                      + log.read_text())
    result = plot('torch.log', 'jax.log', '--smooth=0.0')
    torch, torch_evals, jax, _ = drawn(result.fig.axes[1])
    assert torch[0] == pytest.approx(np.arange(1, 22) * .01)  # rounding
    assert torch_evals[0] == pytest.approx([0, .1, .2])
    # train_jax.py's own times never include an evaluation
    assert jax[0][-1] == pytest.approx(18 * .01 + 3 * .999)


def test_a_log_whose_every_time_includes_an_evaluation_has_no_times(plot, tmp_path):
    torch_log(tmp_path / 'torch.log', range(0, 50, 10))
    result = plot('torch.log')
    assert result.rows[0][5:] == ['-'] * 3
    assert 'WARNING: no time in torch.log' in result.printed
    assert np.isnan(drawn(result.fig.axes[1])[0][0]).all()


def test_a_logged_line_counts_for_the_iterations_since_the_last(plot, tmp_path):
    out_dir(tmp_path / 'out', [evaluated(0, 4.0), logged(0, 4.0, 5), evaluated(10, 3.0),
                               logged(10, 3.0, 20), logged(20, 2.0, 30), evaluated(21, 2.0)])
    result = plot('out', '--smooth=0.0')
    training, evaluations = drawn(result.fig.axes[1])
    assert training[0] == pytest.approx([.005, .205, .505])  # 1, 10 and 10 iterations
    assert evaluations[0] == pytest.approx([0, .185, .505])  # before the iteration of its number
    assert [list(line[0]) for line in drawn(result.fig.axes[0])] == [[0, 10, 20], [0, 10, 21]]


@pytest.mark.parametrize('kind', ['log', 'metrics'])
def test_of_repeated_iterations_the_later_ones_are_plotted(plot, tmp_path, kind):
    if kind == 'log':  # resumed with a larger log interval
        lines = [*torch_lines(range(25)),
                 *torch_lines(range(20, 31, 5), loss=lambda it: 1 + it / 100)]
        (tmp_path / 'run').write_text('\n'.join(lines))
    else:
        out_dir(tmp_path / 'run', [
            evaluated(0, 4.2), *[logged(it, 4 - it / 10, 30) for it in range(10)],
            evaluated(10, 3.2), *[logged(it, 4 - it / 10, 30) for it in range(10, 20)],
            *[r for it in range(20, 25) for r in (evaluated(it, 9.0), logged(it, 4 - it / 10, 30))],
            *[r for it in (20, 25, 30)
              for r in (evaluated(it, 1.2 + it / 100), logged(it, 1 + it / 100, 30))]])
    training, evaluations = drawn(plot('run', '--smooth=0.0').fig.axes[0])
    assert list(training[0]) == [*range(20), 20, 25, 30]
    assert list(training[1][-3:]) == pytest.approx([1.2, 1.25, 1.3])
    assert list(evaluations[0]) == ([0, 10, 20, 30] if kind == 'log' else [0, 10, 20, 25, 30])
    assert evaluations[1][-1] == pytest.approx(1.5)


def test_a_truncated_file_has_a_prefix_of_the_events_and_can_be_appended_to(plot, tmp_path):
    """What a crash leaves; a resumed run writes after it."""
    log = torch_log(tmp_path / 'full.log', range(9, 12), ms=lambda it: it + .25,
                    loss=lambda it: it + .1234).read_bytes()
    metrics = (out_dir(tmp_path / 'out', [logged(8, 2.125, 31.5), evaluated(9, 2.5),
                                          logged(9, 2.25, 12.5)]) / 'metrics.jsonl').read_bytes()
    read_events = plot('full.log', '--out=').read_events

    def events_of(name, content):
        (tmp_path / name).write_bytes(content)
        return list(map(repr, read_events(name)))  # as text, in which nan equals nan
    for name, full, n in (('run.log', log, 4), ('run.jsonl', metrics, 3)):
        events = events_of(name, full)
        assert len(events) == n
        for cut in range(len(full)):
            before = events_of(name, full[:cut])
            assert before == events[:len(before)]
            # train_jax.py drops a truncated line of metrics.jsonl before it appends
            if name == 'run.log':
                assert events_of(name, full[:cut] + full)[-n:] == events


def test_a_metric_that_is_no_number_is_unknown(plot, tmp_path):
    torch_log(tmp_path / 'full.log')
    read_events = plot('full.log', '--out=').read_events
    (tmp_path / 'a.jsonl').write_text('{"iter": 1, "loss": "a", "ms_per_iter": [2]}\n')
    assert str(list(read_events('a.jsonl'))) == '[(1, 1, nan, nan, nan)]'


@pytest.mark.parametrize('encoding, newline', [
    ('utf-8', '\n'), ('utf-8', '\r\n'), ('utf-8', '\r'), ('utf-8-sig', '\r\n'), ('utf-16', '\r\n'),
    ('utf-16-be', '\n')])
def test_encodings_colours_and_other_lines_change_nothing(plot, tmp_path, encoding, newline):
    plain = torch_log(tmp_path / 'plain.log')
    noise = ['wandb: \U0001f680 View run at iter/7', '{"not": "ours"}', '{"iter": "x", "loss": 1}',
             "{'a': 1}", 'at 50%\rdone']
    lines = []
    for i, line in enumerate(plain.read_text().splitlines()):
        coloured = line.replace('loss ', 'loss \x1b[1;32m')
        lines += [noise[i % len(noise)], f'10%|#   | 3/30\r\x1b[32m{coloured}\x1b[0m']
    (tmp_path / 'noisy.log').write_bytes(newline.join(lines).encode(encoding))
    rows = plot('plain.log', 'noisy.log', '--out=').rows
    assert rows[0][1:] == rows[1][1:] and rows[0][1] == '19'


def test_a_run_of_train_jax_is_the_same_by_its_log_and_by_its_out_dir(plot, folder):
    (folder / 'train.log').write_text(out := train(folder, '--max_iters=9', '--out_dir=out'))
    result = plot('train.log', 'out')
    log, metrics = result.rows
    last = [line for line in out.splitlines() if line.startswith('iter ')][-1]
    assert log[1] == '9' and f'loss {log[2]},' in last and log[1:5] == metrics[1:5]
    for ms, rate in (log[5:7], metrics[5:7]):  # both rounded; 128 tokens per iteration
        assert float(rate.replace(',', '')) * float(ms) / 1000 == pytest.approx(128, rel=0.02)
    assert metrics[7] == '1.00' and 'WARNING' not in result.printed
    for ax in result.fig.axes:
        # losses with 4 decimals, and a sum of times with 2 decimals of a ms
        for a, b in zip(drawn(ax)[:2], drawn(ax)[2:]):
            assert a.shape == b.shape and a == pytest.approx(b, abs=2e-4)


def test_runs_with_other_tokens_per_iteration_are_a_warning(plot, tmp_path):
    torch_log(tmp_path / 'a.log', range(19))
    torch_log(tmp_path / 'b.log', range(19), tokens=64000)
    (tmp_path / 'c.log').write_text('\n'.join(torch_lines()))  # does not say how many
    printed = plot('c.log', 'a.log', 'b.log', '--out=').printed
    assert 'WARNING: an iteration has from 1,000 to 64,000 tokens:' in printed


def test_runs_are_named_by_labels_else_by_file_names_else_by_paths(plot, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        torch_log(tmp_path / name / 'train.log')
    (tmp_path / 'c.log').write_text((tmp_path / 'a' / 'train.log').read_text())
    def names(*args):
        return [row[0] for row in plot(*args, '--out=').rows]
    assert names('a/train.log', 'c.log') == ['train.log', 'c.log']
    assert names('a/train.log', 'b/train.log') == ['a/train.log', 'b/train.log']
    assert names('a/train.log', '--labels=x,y', 'b/train.log') == ['x', 'y']


# -----------------------------------------------------------------------------
# the picture

def test_the_picture_has_axes_with_units_and_a_legend(plot, tmp_path):
    torch_log(tmp_path / 'a.log')
    # matplotlib would hide the first name, and read the second as a formula
    result = plot('a.log', 'a.log', '--labels=_a,$\\frac$')
    left, right = result.fig.axes
    assert left.get_xlabel() == 'iteration' and left.get_ylabel() == 'loss (nats per token)'
    assert right.get_xlabel() == 'training time without evaluations (s)'
    assert left.get_ylim() == right.get_ylim()
    assert left.xaxis.get_major_formatter()(600000) == '600,000'
    legend, = result.fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ['_a', '$\\frac$']
    assert 'with markers: validation loss' in legend.get_title().get_text()


def test_the_picture_is_a_png_that_is_overwritten(plot, tmp_path):
    torch_log(tmp_path / 'a.log')
    assert 'compare.png written' in plot('a.log').printed
    first = (tmp_path / 'compare.png').read_bytes()
    assert first.startswith(b'\x89PNG')
    plot('a.log', '--labels=other')
    assert (tmp_path / 'compare.png').read_bytes() != first


@pytest.mark.parametrize('n', [1, 2, 6, 20])
def test_the_legend_overlaps_nothing_and_tells_runs_apart_for_any_number(plot, tmp_path, n):
    names = [f'{i}-{"a-very-long-name-of-a-run-" * (i % 3)}{i}.log' for i in range(n)]
    for name in names:
        torch_log(tmp_path / name)
    fig = plot(*names).fig
    legend, = fig.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_tightbbox()) for ax in fig.axes)
    assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1
    assert fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1
    # at least 4 inches are left for the curves
    assert all(ax.bbox.height > 4 * fig.dpi and ax.bbox.width > 4 * fig.dpi for ax in fig.axes)
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(set(texts)) == n and all(len(text) <= 32 for text in texts)
    assert all(text[:15] == name[:15] for text, name in zip(texts, names))
    looks, in_legend = (
        [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]
        for lines in (fig.axes[0].lines[1::2], legend.get_lines()))
    assert len(set(looks)) == n and looks == in_legend
    # in greyscale
    assert len({look[1:] for look in looks}) == min(n, 8)
    assert len({look[1] for look in looks}) == min(n, 4)


# with only an evaluation at 0, which is above the picture, and without any
@pytest.mark.parametrize('first', [0, 1])
def test_without_evaluations_the_legend_shows_the_training_loss(plot, tmp_path, first):
    (tmp_path / 'a.log').write_text('\n'.join(torch_lines(range(first, 9))))
    fig = plot('a.log').fig
    assert len(fig.axes[0].lines[0].get_xdata()) == 9 - first
    handle, = fig.legends[0].get_lines()
    assert handle.get_marker() == 'None' and handle.get_alpha() == 1


@pytest.mark.parametrize('ms, unit, longest', [
    (1700, 's', 170), (1900, 'min', 190 / 60), (71_000, 'min', 7100 / 60),
    (73_000, 'h', 7300 / 3600)])
def test_the_unit_of_time_depends_on_the_longest_run(plot, tmp_path, ms, unit, longest):
    torch_log(tmp_path / 'a.log', range(100), ms=lambda it: ms, loss=lambda it: 4)
    right = plot('a.log').fig.axes[1]
    assert right.get_xlabel().endswith(f'({unit})')
    assert drawn(right)[0][0][-1] == pytest.approx(longest)


def test_the_loss_axis_leaves_out_first_iterations_and_divergence(plot, tmp_path):
    (tmp_path / 'a.log').write_text('\n'.join(
        torch_lines(range(200), loss=lambda it: 2 + 8 * math.exp(-it / 3), every=50)))
    bottom, top = plot('a.log').fig.axes[0].get_ylim()
    assert 1.8 < bottom < 2 and 2.2 < top < 2.3  # from iteration 20 on all is below 2.21
    (tmp_path / 'b.log').write_text('\n'.join(
        torch_lines(range(200), loss=lambda it: 3 + max(0, it - 180) ** 5)))
    assert 6 < plot('b.log').fig.axes[0].get_ylim()[1] < 7  # twice the initial loss
    # the validation loss of a run that overfits stays in the picture
    out_dir(tmp_path / 'out', [r for it in range(0, 100, 10)
                               for r in (evaluated(it, 2 + it / 100), logged(it, 1.5, 9))])
    assert plot('out').fig.axes[0].get_ylim()[1] > 2.9


def test_600_evaluations_have_at_most_16_markers(plot, tmp_path):
    out_dir(tmp_path / 'out', [r for it in range(600)
                               for r in (evaluated(it, 2.0), logged(it, 1.5, 9))])
    _, line = plot('out').fig.axes[0].lines
    assert len(line.get_xdata()) == 600
    assert 10 < len(line.get_xdata()[::line.get_markevery()]) <= 16


def test_smoothing_is_a_mean_around_each_point(plot, tmp_path):
    losses = np.random.default_rng(0).uniform(1, 3, 50)
    (tmp_path / 'a.log').write_text('\n'.join(
        torch_lines(range(1, 51), loss=lambda it: losses[it - 1])))
    printed = np.round(losses, 4)
    assert drawn(plot('a.log', '--smooth=0.0').fig.axes[0])[0][1] == pytest.approx(printed)
    smooth = drawn(plot('a.log', '--smooth=0.2').fig.axes[0])[0][1]  # 5 on each side
    assert smooth[20] == pytest.approx(printed[15:26].mean())
    assert smooth[2] == pytest.approx(printed[:5].mean())
    assert smooth[49] == pytest.approx(printed[44:].mean())
    # a loss that is not finite is left out, its neighbours are not
    out_dir(tmp_path / 'out', [logged(it, None if it == 25 else 2.0, 9) for it in range(50)])
    its, smooth = drawn(plot('out', '--smooth=0.2').fig.axes[0])[0]
    assert len(its) == 49 and set(smooth) == {2.0}


def test_runs_with_the_same_label_are_their_mean_in_a_band(plot, tmp_path):
    for name, high in (('a', 0), ('b', 1), ('c', 2.5)):
        # the third is shorter, so what follows its end is in no mean
        torch_log(tmp_path / name, range(30 if name == 'c' else 40),
                  ms=lambda it, high=high: 10 + high, loss=lambda it, high=high: 2 + high)
    torch_log(tmp_path / 'd', range(30))
    result = plot('a', 'b', 'd', 'c', '--labels=x,x,y,x', '--smooth=0.0')
    x, x_evals, *y = drawn(result.fig.axes[0])
    assert len(y) == 2 and list(x[0]) == [*range(30)] and list(x_evals[0]) == [0, 10, 20]
    assert set(np.round(x[1], 4)) == {3.1667} and set(np.round(x_evals[1], 4)) == {3.3667}
    band, evals_band = (c.get_paths()[0].vertices[:, 1] for c in result.fig.axes[0].collections)
    assert {*band} == {2, 4.5} and {*evals_band} == {2.2, 4.7}
    assert [text.get_text() for text in result.fig.legends[0].get_texts()] == ['x', 'y']
    assert [row[0] for row in result.rows] == ['x', 'x', 'y', 'x', 'x, mean of 3']
    assert result.rows[-1][2:7] == ['3.1667', '3.3667', '3.3667 at 0', '11.17', '90,303']


def test_given_times_are_bars_side_by_side(plot, tmp_path):
    torch_log(tmp_path / 'a')
    fig = plot('a', 'a', 'a', '--labels=x,x,y', '--times=here:19.4:31.7,there:1035.8:43').fig
    assert [text.get_text() for text in fig.axes[1].get_xticklabels()] == ['here', 'there']
    first, second = fig.axes[1].containers
    assert [bar.get_height() for bar in first] == [19.4, 1035.8]
    assert [bar.get_height() for bar in second] == [31.7, 43]
    assert [text.get_text() for text in fig.axes[1].texts] == ['19.4', '1,035.8', '31.7', '43.0']
    edges = [edge for pair in zip(first, second) for bar in pair
             for edge in (bar.get_x(), bar.get_x() + bar.get_width())]
    assert edges == sorted(edges)  # no bar covers another
    for i, container in enumerate((first, second)):
        assert to_hex(container[0].get_facecolor()) == fig.axes[0].lines[2 * i].get_color().lower()


# -----------------------------------------------------------------------------
# the command line

@pytest.mark.parametrize('args, words', [
    ([], ['no run', 'out_dirs or log files']),
    (['absent.log'], ['absent.log', 'No such file', 'metrics.jsonl']),
    (['a\0.log'], ['null byte', 'metrics.jsonl']),
    (['empty'], ['empty', 'metrics.jsonl', 'out_dir']),
    (['a.log', 'other.txt'], ['no run in other.txt', 'iter 250', 'step 250']),
    (['a.log', '--labels=x,y'], ['2 names for 1 runs']),
    (['a.log', '--out=a.log'], ["'a.log'", '.png']),
    (['a.log', '--out=absent/a.png'], ['absent/a.png', '--out']),
    (['a.log', '--smooth=2.0'], ['smooth is 2.0']),
    (['a.log', 'a.log', '--labels=x,y', '--times=here:19.4'], ["'here:19.4'", 'the 2 labels']),
    (['a.log', '--times=here:fast'], ["'here:fast'", 'one:19.4:31.7']),
    (['a.log', '--times=19.4'], ["'19.4'", 'one:19.4:31.7']),
    (['absent.log', '--outt=x.png'], ['--outt', '--out']),
])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, args, words):
    log = torch_log(tmp_path / 'a.log').read_bytes()
    (tmp_path / 'other.txt').write_text('nothing\n')
    (tmp_path / 'empty').mkdir()
    one_line_error(run_inside(tmp_path, 'tools.plot', *args), *words, alone=True)
    assert (tmp_path / 'a.log').read_bytes() == log
    assert sorted(os.listdir(tmp_path)) == ['a.log', 'empty', 'other.txt']


def test_help_lists_the_flags(tmp_path):
    result = run_inside(tmp_path, 'tools.plot', '--help')
    assert result.returncode == 0 and "out = 'compare.png' # the picture" in result.stdout
    assert 'import' not in result.stdout


def test_without_matplotlib_the_table_is_printed_before_the_error(tmp_path):
    torch_log(tmp_path / 'a.log')
    (tmp_path / 'matplotlib.py').write_text('raise ImportError')
    result = run(tmp_path, 'tools.plot', 'a.log')  # Python looks for modules in its folder first
    assert '| a.log' in result.stdout
    one_line_error(result, 'pip install matplotlib')
