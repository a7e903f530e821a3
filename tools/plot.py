"""
Compare training runs of this port and of PyTorch nanoGPT: print a table, and plot their losses
against iterations and time. A run is an out_dir of train_jax.py, its metrics.jsonl, or a file with
the output of either project's training script. Runs with the same label, such as other seeds, are
one curve, their mean, in a band from the lowest to the highest. It reads no config files.
$ python -m tools.plot out-shakespeare-char ../nanoGPT/train.log
$ python -m tools.plot out-a out-b out-c --labels=small,medium,large --out=sizes.png
$ python -m tools.plot out-a1 out-a2 out-b1 out-b2 --labels=a,a,b,b
"""

import functools
import math
import re
import sys
from types import SimpleNamespace

import numpy as np

from nanogpt_jax.errors import UserError, optional_import, report_user_error
from nanogpt_jax.run_dir import is_dir, open_file, read_metrics
from tools import print_table

if __name__ == '__main__':
    sys.excepthook = report_user_error
# -----------------------------------------------------------------------------
out = 'compare.png' # the picture, overwritten if it exists; '' for the table alone
labels = '' # names of the runs, with commas; '' for their paths
smooth = 0.04 # training curves are moving averages over this fraction of a run; 0.0 for none
from configurator import configure
args = sys.argv[1:] if __name__ == '__main__' else []
# overrides from the command line; arguments without - are runs here, not config files
configure(globals(), [arg for arg in args if arg.startswith('-')])
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# reading runs

# the lines that train.py and train_jax.py print; a truncated line matches none of them
LOSS = r'(\d+\.\d{4}|nan|inf)'
ITER = re.compile(rf'iter (\d+): loss {LOSS}, time (\d+\.\d\d)ms')
STEP = re.compile(rf'step (\d+): train loss {LOSS}, val loss {LOSS}')
TOKENS = re.compile(r'tokens per iteration will be: ([\d,]+)')
OURS = re.compile(r'^platform: \w+, devices: \d')


def read_events(path):
    """What a run logged, in order: (iteration, 1, loss, ms, tokens/s) for an iteration, and
    (iteration, 0, validation loss) for an evaluation, which precedes it. nan: unknown."""
    try:
        if path.endswith('.jsonl') or is_dir(path):
            yield from events_of_metrics(read_metrics(path))
        else:
            with open_file(path, errors='replace') as f:
                yield from events_of_log(f)
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror or e}); give an out_dir of train_jax.py, '
                        "its metrics.jsonl, or a file with a training script's output") from e


def events_of_metrics(records):
    """The events of a metrics.jsonl, where null stands for a number that is not finite."""
    def number(x):
        try:
            return float(x)
        except (TypeError, ValueError, OverflowError):
            return math.nan
    for record in records:
        val_loss, *logged = [number(record.get(key))
                             for key in ('val_loss', 'loss', 'ms_per_iter', 'tokens_per_s')]
        if 'loss' in record:
            yield record['iter'], 1, *logged
        elif 'val_loss' in record:
            yield record['iter'], 0, val_loss


def events_of_log(lines):
    """The events of a training script's output."""
    tokens_per_iter, evaluated, ours = math.nan, None, False
    for line in lines:
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


def read_run(path, name):
    """Read a run. Raises UserError if the file has none.

    its, losses, seconds: arrays over logged iterations; evals, vals, eval_seconds: arrays over
    evaluations; ms, rate: medians, the latter in tokens/s.
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
    its, losses, ms, rates = np.array(logged, float).reshape(-1, 4).T
    evals, vals = np.array(evaluated, float).reshape(-1, 2).T
    run = SimpleNamespace(name=name, its=its, losses=losses, evals=evals, vals=vals,
                          ms=median(ms), rate=median(rates))
    # a line stands for all iterations since the line before; an unknown time counts as the median
    start = its[:1] - 1
    each = np.where(np.isnan(ms), run.ms, ms) / 1000
    run.seconds = np.cumsum(np.diff(its, prepend=start) * each)
    run.eval_seconds = (np.interp(evals - 1, [*start, *its], [*start * 0, *run.seconds])
                        if its.size else evals * math.nan)
    return run


def median(values):
    """Median of the known values, without the first five, which are slower, if others are known;
    nan if none is."""
    known = [part[~np.isnan(part)] for part in (values[5:], values)]
    return next((float(np.median(part)) for part in known if part.size), math.nan)


# -----------------------------------------------------------------------------
# the table

HEAD = ['run', 'last iteration', 'train loss, last', 'val loss, last', 'val loss, best',
        'ms/iter, median', 'tokens/s', 'time per iteration, first run = 1']


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


# -----------------------------------------------------------------------------
# the picture

# Wong, "Points of view: Color blindness", Nature Methods 8, 441 (2011), without its yellow, which
# is hard to see on white; the dashes tell the curves apart in greyscale
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
DASHES = ['-', '--', '-.', ':']


def smoothed(y, fraction):
    """Centered moving averages over a fraction of y; over fewer values near the ends, so that the
    steep start stays in place."""
    n, i = len(y), np.arange(len(y))
    before = np.minimum(int(n * fraction / 2), i)
    after = np.minimum(before, n - 1 - i)
    sums = np.concatenate([[0], np.cumsum(y)])
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def curves(run, fraction):
    """[(iterations, seconds, losses)] of training, smoothed, and of evaluations; finite losses
    only."""
    train, val = np.isfinite(run.losses), np.isfinite(run.vals)
    return [(run.its[train], run.seconds[train], smoothed(run.losses[train], fraction)),
            (run.evals[val], run.eval_seconds[val], run.vals[val])]


def mean_and_band(runs, fraction):
    """[(iterations, seconds, losses, lowest, highest)] of training and of evaluations: means over
    runs, where all of them have a finite loss."""
    for kind in zip(*(curves(run, fraction) for run in runs)):
        its = functools.reduce(np.intersect1d, [x for x, _, _ in kind])
        seconds, losses = (np.array([curve[i][np.isin(curve[0], its)] for curve in kind])
                           for i in (1, 2))
        yield its, seconds.mean(0), losses.mean(0), losses.min(0), losses.max(0)


def loss_limits(runs, fraction):
    """Limits of the loss axis: all losses but the first tenth of each curve."""
    late = np.concatenate([losses[len(losses) // 10:]
                           for run in runs for _, _, losses in curves(run, fraction)])
    if not late.size:
        return 0, 1
    margin = np.ptp(late) / 20 or 0.1
    return late.min() - margin, late.max() + margin


def draw_label(panels, runs, fraction, style):
    """Draw the mean of runs into panels (axes, element of a curve that is x, its unit); returns the
    legend's line."""
    train, val = mean_and_band(runs, fraction)
    for ax, x, unit in panels:
        ax.plot(train[x] / unit, train[2], **style, linewidth=1, alpha=0.6)
        line, = ax.plot(val[x] / unit, val[2], **style, linewidth=2, marker='o',
                        markevery=len(val[0]) // 15 + 1)
        for curve in (train, val):
            ax.fill_between(curve[x] / unit, *curve[3:], color=style['color'], alpha=0.2,
                            linewidth=0)
    return line


def draw(runs, fraction):
    """The picture, as matplotlib's Figure. Raises UserError if matplotlib is not installed."""
    Figure = optional_import('matplotlib.figure').Figure
    fig = Figure(figsize=(12, 6), dpi=120, layout='constrained')
    left, right = fig.subplots(1, 2, sharey=True)
    left.set(xlabel='iteration', ylabel='loss (nats per token)', ylim=loss_limits(runs, fraction))
    left.xaxis.set_major_formatter('{x:,.0f}')
    longest = max([run.seconds[-1] for run in runs if not math.isnan(run.ms)], default=0)
    name, unit = ('s', 1) if longest < 180 else ('min', 60) if longest < 7200 else ('h', 3600)
    right.set(xlabel=f'training time without evaluations ({name})')
    for ax in (left, right):
        ax.grid(visible=True, alpha=0.3)
    lines = {}
    for i, label in enumerate(dict.fromkeys(run.name for run in runs)):
        style = dict(color=COLORS[i % len(COLORS)], linestyle=DASHES[i % len(DASHES)])
        lines[label] = draw_label([(left, 0, 1), (right, 1, unit)],
                                  [run for run in runs if run.name == label], fraction, style)
    fig.legend(lines.values(), lines, loc='outside lower center', ncols=3, handlelength=4,
               title='with markers: validation loss; without: training loss'
               + ('; bands: lowest to highest' if len(runs) > len(lines) else ''))
    return fig


# -----------------------------------------------------------------------------
# the command line

def main():
    paths = [arg for arg in args if not arg.startswith('-')]
    names = labels.split(',') if labels else paths
    if not paths:
        raise UserError('no run to plot; give out_dirs or log files, as in: '
                        'python -m tools.plot out_jax train.log')
    if not 0 <= smooth <= 1:
        raise UserError(f'smooth is {smooth}; it must be from 0 to 1')
    if len(names) != len(paths):
        raise UserError(f'labels has {len(names)} names for {len(paths)} runs; '
                        'give one for each, with commas')
    runs = [read_run(path, name) for path, name in zip(paths, names)]
    print_table(HEAD, [table_row(run, runs[0]) for run in runs])
    if out:
        try:
            draw(runs, smooth).savefig(out)
        except (OSError, ValueError) as e:  # ValueError: not the ending of a picture's name
            raise UserError(f'cannot write {out} ({e}); choose another --out') from e
        print(f'{out} written')


if __name__ == '__main__':
    main()
