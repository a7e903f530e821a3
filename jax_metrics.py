"""
What a run tells beside its log lines: metrics.jsonl in its out_dir, the time left, and progress bars. The last two are for a
terminal alone.
"""

import json
import math
import os
import sys
import time
from datetime import timedelta

METRICS = 'metrics.jsonl'
BAR_AFTER = 3  # seconds without one


class Metrics:
    """out_dir/metrics.jsonl: one JSON object a line, each written when it is known, for pandas.read_json(path, lines=True).

    A run that goes on with iteration start_iter keeps the lines before it, and does the others again. What another run has left
    there is renamed to metrics-<time>.jsonl.
    """

    def __init__(self, out_dir, start_iter):
        self.path = os.path.join(out_dir, METRICS)
        try:
            if start_iter > 0:
                kept = [line for line in read_metrics(out_dir) if line['iter'] < start_iter]
                with open(self.path + '.tmp', 'w', encoding='utf-8') as f:
                    f.writelines(json.dumps(line) + '\n' for line in kept)
                os.replace(self.path + '.tmp', self.path)
            elif os.path.exists(self.path):
                os.replace(self.path, os.path.join(out_dir, f'metrics-{time.time_ns()}.jsonl'))
            self.file = open(self.path, 'a', encoding='utf-8', buffering=1)  # line by line
        except OSError as e:
            self._give_up(e)

    def write(self, **values):
        """Add a line; numbers that are not finite become null, which JSON has for them."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()}) + '\n')
        except OSError as e:
            self._give_up(e)

    def _give_up(self, error):
        print(f'WARNING: {self.path} cannot be written and ends here ({error}); the run goes on')
        self.file = None


def read_metrics(out_dir):
    """The lines of metrics.jsonl as dicts, without what a crash has cut off; none where there is no such file."""
    try:
        with open(os.path.join(out_dir, METRICS), encoding='utf-8', errors='replace') as f:
            lines = f.readlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get('iter'), int):
            found.append(values)
    return found


def time_left(seconds):
    """In words, for a terminal: how long so many seconds are, and when they are over. None elsewhere."""
    if not sys.stdout.isatty():
        return None
    at = time.strftime('%a %H:%M', time.localtime(time.time() + seconds))
    return f'{timedelta(seconds=round(seconds))} left, done at about {at}'


def progress(parts, what):
    """The parts, one after the other; on a terminal, where they take long, with a bar (if tqdm is installed)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return parts
    return tqdm(parts, desc=what, delay=BAR_AFTER, leave=False, disable=not sys.stdout.isatty())
