"""
Compare training runs of this port and of PyTorch nanoGPT: print a table, and plot their losses
against iterations and time. A run is an out_dir of train_jax.py, its metrics.jsonl, or a file with
the output of either project's training script; several with the same label, such as other seeds,
are one curve, their mean, in a band from the lowest to the highest. It reads no config files.
$ python -m tools.plot out-shakespeare-char ../nanoGPT/train.log
$ python -m tools.plot out-a out-b out-c --labels=small,medium,large --out=sizes.png
$ python -m tools.plot out-a1 out-a2 out-b1 out-b2 --labels=a,a,b,b
"""

import functools
import math
import os
import re
import sys
from types import SimpleNamespace

import numpy as np

from nanogpt_jax import run_dir as files
from nanogpt_jax.errors import UserError, optional_import, report_user_error
from nanogpt_jax.run_dir import read_metrics
from tools import print_table

sys.excepthook = report_user_error
# -----------------------------------------------------------------------------
out = 'compare.png' # the picture, overwritten if it exists; '' for the table alone
labels = '' # names of the runs, with commas; '' for the names of their files and folders
smooth = 0.04 # training curves are moving averages over this fraction of a run; 0.0 for none
times = '' # draw bars in place of the losses against time: ms per iteration of each label on one or
           # more machines, as in 'one machine:19.4:31.7,another:35.8:43.3'
from configurator import configure
# overrides from the command line; arguments without - are runs here, not config files
configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith('-')])
# -----------------------------------------------------------------------------

sys.stdout.reconfigure(errors='replace')  # prints ? for a character that the terminal lacks
paths = [arg for arg in sys.argv[1:] if not arg.startswith('-')]
names = labels.split(',') if labels else [
    os.path.basename(files.absolute(p).rstrip('/')) for p in paths]
if not labels and len(set(names)) < len(names):
    names = paths
if not paths:
    raise UserError('no run to plot; give out_dirs or log files, as in: '
                    'python -m tools.plot out_jax train.log')
if len(names) != len(paths):
    raise UserError(f'labels has {len(names)} names for {len(paths)} runs; '
                    'give one for each, with commas')
if not 0 <= smooth <= 1:
    raise UserError(f'smooth is {smooth}; it must be a fraction from 0.0 to 1.0')
bars = [(machine, [float(x) if re.fullmatch(r'\d+(\.\d+)?', x) else 0 for x in ms])
        for machine, *ms in (bar.split(':') for bar in times.split(',') if bar)]
if any(len(ms) != len(set(names)) or not all(ms) for _, ms in bars):
    raise UserError(f'times is {times!r}; write a machine and ms per iteration for each of the '
                    f'{len(set(names))} labels, as in one:19.4:31.7,another:35.8:43.3')
if out and not out.lower().endswith('.png'):
    raise UserError(f'out is {out!r}; the picture is a PNG, so its name must end in .png')


# -----------------------------------------------------------------------------
# reading runs

# the lines that train.py and train_jax.py print; a truncated line matches none of them
LOSS = r'(\d+\.\d{4}|nan|inf)'
ITER = re.compile(rf'iter (\d{{1,18}}): loss {LOSS}, time (\d+\.\d\d)ms')
STEP = re.compile(rf'step (\d{{1,18}}): train loss {LOSS}, val loss {LOSS}')
TOKENS = re.compile(r'tokens per iteration will be: ([\d,]+)')
OURS = re.compile(r'^platform: \w+, devices: \d')


def read_events(path):
    """What a run logged, in order: (iteration, 1, loss, ms, tokens/s) for an iteration, and
    (iteration, 0, validation loss) for an evaluation, which precedes it. nan: unknown."""
    try:
        if files.is_dir(path) or path.endswith('.jsonl'):
            yield from events_of_metrics(read_metrics(path))
        else:
            with files.open_file(path, 'rb') as f:
                yield from events_of_log(f)
    except (OSError, ValueError) as e:  # ValueError: no path has a NUL character
        raise UserError(f'cannot read {path} ({getattr(e, "strerror", e)}); give an out_dir of '
                        "train_jax.py, its metrics.jsonl, or a file with a training script's "
                        'output') from e


def events_of_metrics(records):
    """The events of a metrics.jsonl."""
    for record in records:
        val_loss, *logged = [record[key] if type(record.get(key)) in (int, float) else math.nan
                             for key in ('val_loss', 'loss', 'ms_per_iter', 'tokens_per_s')]
        if 'loss' in record:
            yield record['iter'], 1, *logged
        elif 'val_loss' in record:
            yield record['iter'], 0, val_loss


def events_of_log(file):
    """The events of a training script's output, from a binary file."""
    tokens_per_iter, evaluated, ours = math.nan, None, False
    for line in clean_lines(file):
        if found := ITER.search(line):
            it, loss, ms = int(found[1]), float(found[2]), float(found[3]) or math.nan
            if it == evaluated and not ours:
                ms = math.nan  # PyTorch nanoGPT's time includes the evaluation
            yield it, 1, loss, ms, tokens_per_iter * 1000 / ms
        elif found := STEP.search(line):
            evaluated = int(found[1])
            yield evaluated, 0, float(found[3])
        elif found := TOKENS.search(line):
            tokens_per_iter = int(found[1].replace(',', ''))
        elif OURS.match(line):
            ours = True


def clean_lines(file):
    """The lines of a binary file, without colours, and split where a progress bar was redrawn."""
    for line in file:
        # PowerShell's tee writes UTF-16, which for ASCII is UTF-8 with a zero in every character
        line = line.replace(b'\0', b'').decode('utf-8', 'replace')
        yield from re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', line).split('\r')


def read_run(path, name):
    """Read a run. Raises UserError if the file has none.

    its, losses, seconds: arrays over logged iterations; evals, vals, eval_seconds: arrays over
    evaluations; ms, rate: medians, the latter in tokens/s; settled: the iteration at which the
    first tenth of the run is over.
    """
    events = {}
    for it, kind, *values in read_events(path):
        # a resumed run repeats iterations: what comes later in the file counts
        while events and next(reversed(events)) >= (it, kind):
            events.popitem()
        events[it, kind] = values
    if not events:
        raise UserError(f'no run in {path}: give an out_dir with a metrics.jsonl, or a file with '
                        'lines such as "iter 250: loss 2.4904, time 45.33ms" or "step 250: train '
                        'loss 2.4293, val loss 2.4447"')
    logged = [(it, *values) for (it, kind), values in events.items() if kind]
    evaluated = [(it, *values) for (it, kind), values in events.items() if not kind]
    its, losses, ms, rates = np.array(logged).reshape(-1, 4).T
    evals, vals = np.array(evaluated).reshape(-1, 2).T
    run = SimpleNamespace(name=name, its=its, losses=losses, evals=evals, vals=vals,
                          ms=median(its, ms), rate=median(its, rates))
    # a line stands for all iterations since the line before; an unknown time counts as the median
    start = its[:1] - 1
    each = np.where(np.isnan(ms), run.ms, ms) / 1000
    run.seconds = np.cumsum(np.diff(its, prepend=start) * each)
    run.eval_seconds = (np.interp(evals - 1, [*start, *its], [*start * 0, *run.seconds])
                        if its.size else evals * math.nan)
    (first, _), (last, _) = next(iter(events)), next(reversed(events))
    run.settled = first + (last - first) / 10
    return run


def median(its, values):
    """Median of the known values; without the first five iterations, which are slower, if others
    are known. nan if none is."""
    known = ~np.isnan(values)
    settled = known & (its >= its[:1] + 5)
    if not known.any():
        return math.nan
    return float(np.median(values[settled if settled.any() else known]))


def grouped(runs):
    """Lists of the runs with the same name."""
    return [[run for run in runs if run.name == name] for name in dict.fromkeys(names)]


# -----------------------------------------------------------------------------
# the table

HEAD = ['run', 'last iteration', 'train loss, last', 'val loss, last', 'val loss, best',
        'ms/iter, median', 'tokens/s', 'time per iteration, first run = 1']


def mean_run(runs):
    """What table_row needs of several runs: their means where all of them logged."""
    def common(axis, values):
        x = shared([getattr(run, axis) for run in runs])
        return x, np.mean([getattr(run, values)[np.isin(getattr(run, axis), x)]
                           for run in runs], axis=0)
    (its, losses), (evals, vals) = common('its', 'losses'), common('evals', 'vals')
    return SimpleNamespace(name=f'{runs[0].name}, mean of {len(runs)}', its=its, losses=losses,
                           evals=evals, vals=vals, ms=np.mean([run.ms for run in runs]),
                           rate=np.mean([run.rate for run in runs]))


def shared(arrays):
    """The numbers that are in all of several arrays."""
    return functools.reduce(np.intersect1d, arrays)


def table_row(run, first):
    """A run's cells in the table; first: the run to compare its time with."""
    finite = np.isfinite(run.vals)
    best = np.argmin(np.where(finite, run.vals, math.inf)) if finite.any() else None

    def cell(text, x):
        return '-' if math.isnan(x) else text.format(x)
    return [run.name, f'{max(*run.its[-1:], *run.evals[-1:], 0):.0f}',
            *[f'{losses[-1]:.4f}' if losses.size else '-' for losses in (run.losses, run.vals)],
            '-' if best is None else f'{run.vals[best]:.4f} at {run.evals[best]:.0f}',
            cell('{:.2f}', run.ms), cell('{:,.0f}', run.rate),
            cell('{:.2f}', run.ms / first.ms)]


def print_runs(runs):
    means = [mean_run(group) for group in grouped(runs) if len(group) > 1]
    print_table(HEAD, [table_row(run, runs[0]) for run in [*runs, *means]])
    sizes = [run.rate * run.ms / 1000 for run in runs if run.rate * run.ms > 0]
    if sizes and max(sizes) > 1.05 * min(sizes):  # printed times are rounded
        print(f'WARNING: an iteration has from {min(sizes):,.0f} to {max(sizes):,.0f} tokens: '
              'compare tokens/s, not ms/iter')
    for run in runs:
        if math.isnan(run.ms):
            print(f'WARNING: no time in {run.name} is without an evaluation, '
                  'so it has no curve against time')


# -----------------------------------------------------------------------------
# the picture

# Wong, "Points of view: Color blindness", Nature Methods 8, 441 (2011), without its yellow, which
# is hard to see on white. Markers and dashes distinguish runs in greyscale; colors, markers and
# dashes together are unique for 56 runs
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
MARKERS, DASHES = 'os^DvPX*', ['-', '--', '-.', ':']


def smoothed(y):
    """Centered moving averages over a fraction of y; over fewer values near the ends, so that the
    steep start stays in place."""
    n, i = len(y), np.arange(len(y))
    before = np.minimum(int(n * smooth / 2), i)
    after = np.minimum(before, n - 1 - i)
    sums = np.concatenate([[0], np.cumsum(y)])
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def curves(run):
    """[(iterations, seconds, losses)] of training, smoothed, and of evaluations; finite losses
    only."""
    train, val = np.isfinite(run.losses), np.isfinite(run.vals)
    return [(run.its[train], run.seconds[train], smoothed(run.losses[train])),
            (run.evals[val], run.eval_seconds[val], run.vals[val])]


def loss_limits(runs):
    """Limits of the loss axis: all losses after the first tenth of each run, up to twice the
    highest initial loss."""
    drawn = [(its >= run.settled, losses)
             for run in runs for its, _, losses in curves(run) if its.size]
    low = min([losses.min() for _, losses in drawn], default=0)
    high = max([losses[late].max(initial=low) for late, losses in drawn], default=1)
    high = min([high, 2 * max([losses[0] for _, losses in drawn], default=1)])
    margin = (high - low) / 20 or 0.1
    return low - margin, high + margin


def mean_and_band(runs):
    """[(iterations, seconds, losses, lowest, highest)] of training and of evaluations: means over
    runs, where all of them have a finite loss."""
    for kind in zip(*map(curves, runs)):
        its = shared([x for x, _, _ in kind])
        seconds, losses = (np.array([curve[i][np.isin(curve[0], its)] for curve in kind])
                           for i in (1, 2))
        yield its, seconds.mean(0), losses.mean(0), losses.min(0), losses.max(0)


def draw_runs(axes, runs, i, time_unit):
    """Draw runs, with label number i, against iterations (left) and, if there is a second panel,
    time (right); returns the legend handle."""
    style = dict(color=COLORS[i % len(COLORS)], linestyle=DASHES[i % len(DASHES)])
    train, val = mean_and_band(runs)
    has_val = (val[0] >= runs[0].settled).any()  # an earlier evaluation is above the picture
    for ax, x, scale in zip(axes, (0, 1), (1, time_unit)):
        ax.plot(train[x] / scale, train[2], **style, linewidth=1 if has_val else 2,
                alpha=0.6 if has_val else 1)
        ax.plot(val[x] / scale, val[2], **style, linewidth=2, marker=MARKERS[i % len(MARKERS)],
                markevery=len(val[0]) // 15 + 1)
        for curve in (train, val):
            if len(runs) > 1:
                ax.fill_between(curve[x] / scale, *curve[3:], color=style['color'], alpha=0.2,
                                linewidth=0)
    return axes[0].lines[-1 if has_val else -2]


def draw_bars(ax):
    """Bars of ms per iteration, those of a machine side by side."""
    n = len(bars[0][1])
    for i in range(n):
        drawn = ax.bar([m + (i - (n - 1) / 2) * 0.8 / n for m in range(len(bars))],
                       [ms[i] for _, ms in bars], width=0.75 / n, color=COLORS[i % len(COLORS)])
        ax.bar_label(drawn, fmt='{:,.1f}', padding=2)
    ax.set_xticks(range(len(bars)), [machine for machine, _ in bars], parse_math=False)
    ax.set_ylabel('time per iteration (ms)')
    ax.grid(visible=True, axis='y', alpha=0.3)
    ax.set_axisbelow(True)


def draw(runs):
    """The picture, as matplotlib's Figure. Raises UserError if matplotlib is not installed."""
    Figure = optional_import('matplotlib.figure').Figure
    groups = grouped(runs)
    shown = [name if len(name) <= 32 else f'{name[:15]}\u2026{name[-16:]}'
             for name in (group[0].name for group in groups)]
    columns = max(1, 110 // (max(map(len, shown)) + 10))  # of the legend
    height = 5.5 + math.ceil(len(groups) / columns) / 4
    fig = Figure(figsize=(12, height), dpi=120, layout='constrained')
    longest = max([run.seconds[-1] for run in runs if not math.isnan(run.ms)], default=0)
    unit, seconds = (('s', 1) if longest < 180 else ('min', 60) if longest < 7200 else ('h', 3600))
    left, right = fig.subplots(1, 2, sharey=not bars)
    left.set(xlabel='iteration', ylabel='loss (nats per token)', ylim=loss_limits(runs))
    left.xaxis.set_major_formatter('{x:,.0f}')
    panels = [left] if bars else [left, right]
    for ax in panels:
        ax.grid(visible=True, alpha=0.3)
    if bars:
        draw_bars(right)
    else:
        right.set(xlabel=f'training time without evaluations ({unit})')
    handles = [draw_runs(panels, group, i, seconds) for i, group in enumerate(groups)]
    legend = fig.legend(handles, list(map(str, range(len(groups)))), loc='outside lower center',
                        ncols=columns, handlelength=4,
                        title='with markers: validation loss; without: training loss'
                        + ('; bands: lowest to highest' if len(runs) > len(groups) else ''))
    # set afterwards, since legend() skips names that begin with _
    for text, name in zip(legend.get_texts(), shown):
        text.set_parse_math(False)
        text.set_text(name)
    return fig


runs = [read_run(path, name) for path, name in zip(paths, names)]
print_runs(runs)
if out:
    fig = draw(runs)
    try:
        fig.savefig(out)
    except OSError as e:
        raise UserError(f'cannot write {out} ({e.strerror}); choose another --out') from e
    print(f'{out} written')
