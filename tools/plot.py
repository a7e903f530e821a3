"""
Compare training runs of this port and of PyTorch nanoGPT: print a table, and plot their losses
against iterations and time. A run is an out_dir of train_jax.py, its metrics.jsonl, or a file with
the output of either project's training script. Runs with the same label, such as other seeds, are
one curve, their mean, in a band from the lowest to the highest. It reads no config files.
$ python -m tools.plot out-shakespeare-char ../nanoGPT/train.log
$ python -m tools.plot out-a1 out-a2 out-b --labels=a,a,b --out=sizes.png
$ python -m tools.plot out-a out-b --times=times.json --titles="The same loss,Less waiting"
"""

import functools
import json
import math
import re
import sys
from collections import Counter
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
times = '' # draw bars in place of the losses against time: a JSON file with a row
           # [name, time of the first label, time of the second, unit] for each pair of bars
titles = '' # of the two panels, with a comma
from configurator import configure
args = sys.argv[1:] if __name__ == '__main__' else []
# overrides from the command line; arguments without - are runs here, not config files
configure(globals(), [arg for arg in args if arg.startswith('-')])
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# reading runs

# the lines that train.py and train_jax.py print; a truncated line does not match
LOSS = r'(\d+\.\d{4}|nan|inf)'
ITER = re.compile(rf'iter (\d+): loss {LOSS}, time (\d+\.\d\d)ms')
STEP = re.compile(rf'step (\d+): train loss {LOSS}, val loss {LOSS}')
TOKENS = re.compile(r'tokens per iteration will be: ([\d,]+)')


def read_records(path):
    """The lines of a run's metrics.jsonl as dicts; the same from a training script's output."""
    try:
        if path.endswith('.jsonl') or is_dir(path):
            return read_metrics(path)
        with open_file(path, errors='replace') as f:
            return [*records_of_log(f)]
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror or e}); give an out_dir of train_jax.py, '
                        "its metrics.jsonl, or a file with a training script's output") from e


def records_of_log(lines):
    tokens_per_iter, evaluated = math.nan, None
    for line in lines:
        if found := ITER.search(line):
            it, loss, ms = int(found[1]), float(found[2]), float(found[3]) or math.nan
            if it == evaluated:
                ms = math.nan  # PyTorch nanoGPT's time includes the evaluation
            yield dict(iter=it, loss=loss, ms_per_iter=ms, tokens_per_s=tokens_per_iter * 1000 / ms)
        elif found := STEP.search(line):
            evaluated = int(found[1])
            yield dict(iter=evaluated, val_loss=float(found[3]))
        elif found := TOKENS.search(line):
            tokens_per_iter = int(found[1].replace(',', ''))


def read_run(path, name):
    """Read a run. Raises UserError if the file has none.

    its, losses, seconds: arrays over logged iterations. evals, vals, eval_seconds: arrays over
    evaluations. ms, rate: medians, of milliseconds and tokens/s. nan: unknown.
    """
    records = {}
    for record in read_records(path):
        key = record['iter'], 'loss' in record  # the evaluation comes before the iteration
        # a resumed run repeats iterations: the later ones in the file count
        while records and next(reversed(records)) >= key:
            records.popitem()
        records[key] = record
    if not records:
        raise UserError(f'no run in {path}: give an out_dir with a metrics.jsonl, or a file with '
                        'lines such as "iter 250: loss 2.4904, time 45.33ms"')

    def columns(kind, *names):
        return [np.array([record.get(name) for record in records.values() if kind in record], float)
                for name in names]
    its, losses, ms, rates = columns('loss', 'iter', 'loss', 'ms_per_iter', 'tokens_per_s')
    evals, vals = columns('val_loss', 'iter', 'val_loss')
    run = SimpleNamespace(name=name, its=its, losses=losses, evals=evals, vals=vals,
                          ms=median(ms), rate=median(rates))
    # a line counts for all iterations since the line before; an unknown time counts as the median
    start = its[:1] - 1
    each = np.where(np.isnan(ms), run.ms, ms) / 1000
    run.seconds = np.cumsum(np.diff(its, prepend=start) * each)
    run.eval_seconds = (np.interp(evals - 1, [*start, *its], [*start * 0, *run.seconds])
                        if its.size else evals * math.nan)
    return run


def median(values):
    """Median of the known values, without the first five, which are slower. nan if none is."""
    known = values[~np.isnan(values)]
    return float(np.median(known[5:] if known.size > 5 else known)) if known.size else math.nan


# -----------------------------------------------------------------------------
# the table

HEAD = ['run', 'last iteration', 'train loss, last', 'val loss, last', 'val loss, best',
        'ms/iter, median', 'tokens/s', 'time per iteration, first run = 1']


def table_row(run, first):
    """A run's cells in the table. first: the run to compare its time with."""
    def cell(text, x):
        return '-' if math.isnan(x) else text.format(x)

    def last(losses):
        return f'{losses[-1]:.4f}' if losses.size else '-'
    best = min(((val, it) for val, it in zip(run.vals, run.evals) if math.isfinite(val)),
               default=None)
    return [run.name, f'{max(*run.its[-1:], *run.evals[-1:], 0):.0f}', last(run.losses),
            last(run.vals), '{:.4f} at {:.0f}'.format(*best) if best else '-',
            cell('{:.2f}', run.ms), cell('{:,.0f}', run.rate), cell('{:.2f}', run.ms / first.ms)]


# -----------------------------------------------------------------------------
# the picture

DASHES = ['-', '--', '-.', ':']  # beside ten colors


def smoothed(y):
    """Centered moving averages, over fewer values near the ends."""
    i, half = np.arange(len(y)), int(len(y) * smooth / 2)
    first, last = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    sums = np.cumsum([0, *y])
    return (sums[last] - sums[first]) / (last - first)


def curves(run):
    """(training, evaluations): arrays of iterations, seconds, and losses that are finite."""
    train, val = np.isfinite(run.losses), np.isfinite(run.vals)
    return (np.array([run.its[train], run.seconds[train], smoothed(run.losses[train])]),
            np.array([run.evals[val], run.eval_seconds[val], run.vals[val]]))


def draw_losses(panels, runs, style, kinds):
    """Draw the mean of runs, in a band, into panels; returns the line for the legend.

    panels: (axes, row of a curve to use as x, its unit). kinds: 0 for training, 1 for evaluations.
    """
    for kind in kinds:
        each = [curves(run)[kind] for run in runs]
        its = functools.reduce(np.intersect1d, [curve[0] for curve in each])
        each = np.array([curve[:, np.isin(curve[0], its)] for curve in each])
        mean, losses = each.mean(0), each[:, 2]
        look = [dict(linewidth=1, alpha=0.6),
                dict(linewidth=2, marker='o', markevery=len(its) // 15 + 1)][kind]
        for ax, row, unit in panels:
            line, = ax.plot(mean[row] / unit, mean[2], **style, **look)
            ax.fill_between(mean[row] / unit, losses.min(0), losses.max(0), color=style['color'],
                            alpha=0.2, linewidth=0)
    return line


def draw_bars(axes, bars):
    """Draw pairs of horizontal bars into {unit: axes}. The second one also shows the ratio."""
    for unit, ax in axes.items():
        names, *pair = zip(*(row[:3] for row in bars if row[3] == unit))
        y, ratios = np.arange(len(names)), np.divide(*pair[::-1])
        texts = ([f'{t:g} {unit}' for t in pair[0]],
                 [f'{t:g} {unit} ({ratio:.2f}\u00d7)' for t, ratio in zip(pair[1], ratios)])
        for i in (0, 1):
            drawn = ax.barh(y + (i - 0.5) * 0.4, pair[i], 0.38, color=f'C{i}')
            ax.bar_label(drawn, texts[i], padding=3)
        ax.set_yticks(y, names, parse_math=False)
        ax.set(xticks=[], xmargin=0.3)
        ax.invert_yaxis()
        ax.spines[['top', 'right', 'bottom']].set_visible(False)


def draw_axes(fig, runs, bars):
    """Draw all but the losses; returns (the panels of draw_losses, the right panel)."""
    if bars:
        units = Counter(unit for *_, unit in bars)
        axes = fig.subplot_mosaic([['', unit] for unit in units], height_ratios=[*units.values()])
        left = axes.pop('')
        draw_bars(axes, bars)
        left.set(yscale='log', ylabel='validation loss (nats per token)')
        left.yaxis.set_major_formatter('{x:g}')
        left.yaxis.set_minor_formatter('{x:g}')
        return [(left, 0, 1)], axes[bars[0][3]]
    left, right = fig.subplots(1, 2, sharey=True)
    longest = max([run.seconds[-1] for run in runs if not math.isnan(run.ms)], default=0)
    name, unit = ('s', 1) if longest < 180 else ('min', 60) if longest < 7200 else ('h', 3600)
    right.set(xlabel=f'training time without evaluations ({name})')
    late = np.concatenate([curve[2, curve.shape[1] // 10:]
                           for run in runs for curve in curves(run)])
    if late.size:  # leave out the steep start
        margin = np.ptp(late) / 20 or 0.1
        left.set(ylabel='loss (nats per token)', ylim=(late.min() - margin, late.max() + margin))
    return [(left, 0, 1), (right, 1, unit)], right


def draw(runs, bars=()):
    """The picture, as matplotlib's Figure. Raises UserError if matplotlib is not installed.

    bars: (name, time, time, unit) to draw in place of the losses against time.
    """
    Figure = optional_import('matplotlib.figure').Figure
    fig = Figure(figsize=(12, 6), dpi=120, layout='constrained')
    panels, right = draw_axes(fig, runs, bars)
    left = panels[0][0]
    left.set_xlabel('iteration')
    left.xaxis.set_major_formatter('{x:,.0f}')
    for ax, *_ in panels:
        ax.grid(visible=True, alpha=0.3)
    for ax, title in zip((left, right), titles.split(',')):
        ax.set_title(title, fontsize='x-large')
    lines = {}
    for i, label in enumerate(dict.fromkeys(run.name for run in runs)):
        style = dict(color=f'C{i % 10}', linestyle=DASHES[i % 4])
        lines[label] = draw_losses(panels, [run for run in runs if run.name == label], style,
                                   [1] if bars else [0, 1])
    notes = ['with markers: validation loss; without: training loss'] * (not bars)
    notes += ['bands: lowest to highest'] * (len(runs) > len(lines))
    fig.legend(lines.values(), lines, loc='outside lower center', ncols=3, handlelength=4,
               title='; '.join(notes))
    return fig


# -----------------------------------------------------------------------------
# the command line

def read_bars(path):
    """The rows of a file for --times."""
    try:
        with open_file(path) as f:
            return [(name, float(a), float(b), str(unit)) for name, a, b, unit in json.load(f)]
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f'cannot read {path} ({e}); --times needs a JSON file such as '
                        '[["ten samples", 2.4, 68.6, "s"]]') from e


def main():
    paths = [arg for arg in args if not arg.startswith('-')]
    names = labels.split(',') if labels else paths
    if not paths:
        raise UserError('no run to plot; give out_dirs or log files, as in: '
                        'python -m tools.plot out_jax train.log')
    if len(names) != len(paths):
        raise UserError(f'--labels has {len(names)} names for {len(paths)} runs: give one for each')
    runs = [read_run(path, name) for path, name in zip(paths, names)]
    print_table(HEAD, [table_row(run, runs[0]) for run in runs], markdown=True)
    if out:
        fig = draw(runs, read_bars(times) if times else ())
        try:
            fig.savefig(out)
        except (OSError, ValueError) as e:  # ValueError: not the ending of a picture's name
            raise UserError(f'cannot write {out} ({e}); choose another --out') from e
        print(f'{out} written')


if __name__ == '__main__':
    main()
