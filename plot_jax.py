"""
Compare runs of this port and of PyTorch nanoGPT: print a table, and draw their losses against iterations and against time.
A run is an out_dir with its metrics.jsonl, or a file with what a train.py has printed, of either one.
$ python plot_jax.py out-shakespeare-char ../nanoGPT/train.log
$ python plot_jax.py out-a out-b out-c --labels=small,medium,large --out=sizes.png
"""

import json
import math
import os
import re
import sys
from types import SimpleNamespace

import numpy as np

from jax_devices import report_user_error
from jax_metrics import METRICS
from jax_transformer import UserError, optional_import

# -----------------------------------------------------------------------------
out = 'compare.png' # the picture, written over if it is there; '' for the table alone
labels = '' # what the runs are called, with commas; '' for the names of their files and folders
smooth = 0.04 # a point of a training curve is the mean over this share of its run; 0.0 for the losses as logged
from configurator import configure
# what has no - in front is a run here, not a config file
configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith('-')]) # overrides from the command line
# -----------------------------------------------------------------------------

sys.excepthook = report_user_error
sys.stdout.reconfigure(errors='replace') # a terminal that lacks a character gets ? for it
paths = [arg for arg in sys.argv[1:] if not arg.startswith('-')]
names = labels.split(',') if labels else [os.path.basename(os.path.abspath(path)) for path in paths]
if not labels and len(set(names)) < len(names):
    names = paths
if not paths:
    raise UserError('no run to plot; give out_dirs or log files, as in: python plot_jax.py out_jax train.log')
if len(names) != len(paths):
    raise UserError(f'labels has {len(names)} names for {len(paths)} runs; give one for each, with commas')
if not 0 <= smooth <= 1:
    raise UserError(f'smooth is {smooth}; it must be a share from 0.0 to 1.0')
if out and not out.lower().endswith('.png'):
    raise UserError(f'out is {out!r}; the picture is a PNG, so its name must end in .png')

# the lines of train.py and of train_jax.py; what was cut off matches none of them
LOSS = r'(\d+\.\d{4}|nan|inf)'
ITER = re.compile(rf'iter (\d+): loss {LOSS}, time (\d+\.\d\d)ms')
STEP = re.compile(rf'step (\d+): train loss {LOSS}, val loss {LOSS}')
TOKENS = re.compile(r'tokens per iteration will be: ([\d,]+)')
OURS = re.compile(r'^platform: \w+, devices: \d')


def read_lines(path):
    """The lines of an out_dir's metrics.jsonl, or of a text file. Raises UserError if it cannot be read."""
    path = os.path.join(path, METRICS) if os.path.isdir(path) else path
    try:
        with open(path, 'rb') as f:
            for line in f:
                # all that is looked for is ASCII: without its zeros, so is the UTF-16 that PowerShell's tee writes
                line = line.replace(b'\0', b'').decode('utf-8', 'replace')
                yield from re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', line).split('\r')
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror}); a run is an out_dir that train_jax.py has written metrics.jsonl '
                        'into, or a file with what it or train.py has printed') from e


def read_events(path):
    """(iteration, 1, loss, ms, tokens/s) for each logged iteration of a run's file, (iteration, 0, validation loss) for each
    evaluation, which comes before the iteration; in the file's order. What is not said is nan."""
    tokens_per_iter, evaluated, ours = math.nan, None, False
    for line in read_lines(path):
        if found := ITER.search(line):
            it, loss, ms = int(found[1]), float(found[2]), float(found[3]) or math.nan
            if it == evaluated and not ours:
                ms = math.nan # the time that PyTorch nanoGPT prints here has the evaluation in it
            yield it, 1, loss, ms, tokens_per_iter * 1000 / ms
        elif found := STEP.search(line):
            evaluated = int(found[1])
            yield evaluated, 0, float(found[3])
        elif found := TOKENS.search(line):
            tokens_per_iter = int(found[1].replace(',', ''))
        elif OURS.match(line):
            ours = True
        elif '{"' in line:
            try:
                record = json.loads(line[line.rindex('{'):]) # what was cut off may stand before it
            except ValueError:
                continue # cut off itself
            it, val, *logged = [record[key] if type(record.get(key)) in (int, float) else math.nan
                                for key in ('iter', 'val_loss', 'loss', 'ms_per_iter', 'tokens_per_s')]
            if type(it) is int and 'loss' in record:
                yield it, 1, *logged
            elif type(it) is int and 'val_loss' in record:
                yield it, 0, val


def read_run(path, name):
    """A run: its, losses and seconds of logged iterations, evals, vals and eval_seconds of evaluations (arrays); the medians ms
    and rate (tokens/s); settled, the iteration after its first tenth. Raises UserError for a file without a run."""
    events = {}
    for it, kind, *values in read_events(path):
        # a run that was resumed has done these again, and what is later in the file holds
        while events and next(reversed(events)) >= (it, kind):
            events.popitem()
        events[it, kind] = values
    if not events:
        raise UserError(f'no run in {path}: it has no line such as "iter 250: loss 2.4904, time 45.33ms", "step 250: train loss '
                        '2.4293, val loss 2.4447", or those of metrics.jsonl')
    its, losses, ms, rates = np.array([(it, *values) for (it, kind), values in events.items() if kind]).reshape(-1, 4).T
    evals, vals = np.array([(it, *values) for (it, kind), values in events.items() if not kind]).reshape(-1, 2).T
    run = SimpleNamespace(name=name, its=its, losses=losses, ms=median(its, ms), rate=median(its, rates), evals=evals, vals=vals)
    # a line stands for the iterations since the one before; a time that is not known counts as the median
    start = its[:1] - 1
    run.seconds = np.cumsum(np.diff(its, prepend=start) * np.where(np.isnan(ms), run.ms, ms)) / 1000
    run.eval_seconds = np.interp(evals - 1, [*start, *its], [*start * 0, *run.seconds]) if its.size else evals * math.nan
    (first, _), (last, _) = next(iter(events)), next(reversed(events))
    run.settled = first + (last - first) / 10
    return run


def median(its, values):
    """The median without the first five iterations, in which a run settles, if there are others; nan for nothing known."""
    known = ~np.isnan(values)
    settled = known & (its >= its[:1] + 5)
    return float(np.median(values[settled if settled.any() else known])) if known.any() else math.nan


def row(run, first):
    """A run's cells in the table."""
    finite = np.isfinite(run.vals)
    best = np.argmin(np.where(finite, run.vals, math.inf)) if finite.any() else None
    return [run.name, f'{max(*run.its[-1:], *run.evals[-1:], 0):.0f}',
            *[f'{losses[-1]:.4f}' if losses.size else '-' for losses in (run.losses, run.vals)],
            '-' if best is None else f'{run.vals[best]:.4f} at {run.evals[best]:.0f}',
            *['-' if math.isnan(x) else text.format(x) for x, text in (
                (run.ms, '{:.2f}'), (run.rate, '{:,.0f}'), (run.ms / first.ms, '{:.2f} x as long'))]]


def print_table(runs):
    rows = [['run', 'last iteration', 'train loss, last', 'val loss, last', 'val loss, best', 'ms/iter, median', 'tokens/s',
             "an iteration, beside the first run's"], *[row(run, runs[0]) for run in runs]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ['-' * width for width in widths])
    for cells in rows:
        print('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(cells, widths)) + ' |')
    sizes = [run.rate * run.ms / 1000 for run in runs if run.rate * run.ms > 0]
    if sizes and max(sizes) > 1.05 * min(sizes): # times are rounded
        print(f'WARNING: an iteration has from {min(sizes):,.0f} to {max(sizes):,.0f} tokens: compare tokens/s, not ms/iter')
    for run in runs:
        if math.isnan(run.ms):
            print(f'WARNING: no time in {run.name} is without an evaluation, so it has no curve against time')


def smoothed(y):
    """Means over a share of y, of fewer at the start, where the loss is steep, and at the end."""
    n, i = len(y), np.arange(len(y))
    before = np.minimum(int(n * smooth / 2), i)
    after = np.minimum(before, n - 1 - i)
    sums = np.concatenate([[0], np.cumsum(y)])
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def curves(run):
    """[(iterations, seconds, losses)] of training, smoothed, and of evaluations, without what is not finite."""
    train, val = np.isfinite(run.losses), np.isfinite(run.vals)
    return [(run.its[train], run.seconds[train], smoothed(run.losses[train])),
            (run.evals[val], run.eval_seconds[val], run.vals[val])]


def limits(runs):
    """The ends of the axis of losses: all that comes after the first tenth of each run, up to twice where runs begin."""
    drawn = [(its >= run.settled, losses) for run in runs for its, _, losses in curves(run) if its.size]
    low = min([losses.min() for _, losses in drawn], default=0)
    high = max([losses[late].max(initial=low) for late, losses in drawn], default=1)
    high = min([high, 2 * max([losses[0] for _, losses in drawn], default=1)])
    margin = (high - low) / 20 or 0.1
    return low - margin, high + margin


# Wong, "Points of view: Color blindness", Nature Methods 8, 441 (2011), without its yellow, which white swallows. Markers and
# dashes tell the runs apart in greyscale; all three together, the first 56 of them
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
MARKERS, DASHES = 'os^DvPX*', ['-', '--', '-.', ':']


def draw(runs):
    """The picture, as matplotlib's Figure. Raises UserError where that is not installed."""
    shown = [name if len(name) <= 32 else f'{name[:15]}\u2026{name[-16:]}' for name in (run.name for run in runs)]
    columns = max(1, 110 // (max(map(len, shown)) + 10))
    fig = optional_import('matplotlib.figure').Figure(figsize=(12, 5.5 + math.ceil(len(runs) / columns) / 4), dpi=120,
                                                      layout='constrained')
    longest = max([run.seconds[-1] for run in runs if not math.isnan(run.ms)], default=0)
    unit, length = ('s', 1) if longest < 180 else ('min', 60) if longest < 7200 else ('h', 3600)
    left, right = fig.subplots(1, 2, sharey=True)
    left.set(xlabel='iteration', ylabel='loss (nats per token)', ylim=limits(runs))
    right.set(xlabel=f'training time without evaluations ({unit})')
    left.xaxis.set_major_formatter('{x:,.0f}')
    handles = []
    for i, run in enumerate(runs):
        style = dict(color=COLORS[i % len(COLORS)], linestyle=DASHES[i % len(DASHES)])
        train, val = curves(run)
        evaluated = (val[0] >= run.settled).any() # one before is above the picture
        for ax, x, scale in ((left, 0, 1), (right, 1, length)):
            ax.grid(visible=True, alpha=0.3)
            ax.plot(train[x] / scale, train[2], **style, linewidth=1 if evaluated else 2, alpha=0.6 if evaluated else 1)
            ax.plot(val[x] / scale, val[2], **style, linewidth=2, marker=MARKERS[i % len(MARKERS)],
                    markevery=len(val[0]) // 15 + 1)
        handles.append(left.lines[-1 if evaluated else -2])
    legend = fig.legend(handles, list(map(str, range(len(runs)))), loc='outside lower center', ncols=columns, handlelength=4,
                        title='with markers: validation loss; without: training loss')
    for text, name in zip(legend.get_texts(), shown): # here, since legend() itself leaves out a name that begins with _
        text.set_parse_math(False)
        text.set_text(name)
    return fig


runs = [read_run(path, name) for path, name in zip(paths, names)]
print_table(runs)
if out:
    fig = draw(runs)
    try:
        fig.savefig(out)
    except OSError as e:
        raise UserError(f'cannot write {out} ({e.strerror}); choose another --out') from e
    print(f'{out} written')
