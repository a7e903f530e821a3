"""
What a run reports: nanoGPT's line for each step, metrics.jsonl in out_dir, Weights & Biases, and,
on a terminal, the time left and progress bars.
"""

import contextlib
import math
import sys
import time
from datetime import timedelta

from nanogpt_jax.errors import UserError, optional_import, report_user_error

BAR_DELAY = 3  # seconds before a progress bar appears


# -----------------------------------------------------------------------------
# steps

class NonFiniteError(UserError):
    """The loss, a gradient or the weights are not finite."""


def check_finite(iter_num, numbers, describe_valid=None):
    """Raise NonFiniteError if one of a step's metrics, or of other named scalars, is not finite.

    Waits for the device. In float16 an overflow only skips the step, unless it has halved the loss
    scale to less than 1 already. describe_valid: returns text about the last valid checkpoint, for
    the error message.
    """
    if float(numbers.get('loss_scale', 0)) >= 1:
        return
    wrong = [f'{name} is {float(x)}' for name, x in numbers.items() if not math.isfinite(x)]
    if wrong:
        checkpoint = f'; {describe_valid()}' if describe_valid else ''
        raise NonFiniteError(
            f'{" and ".join(wrong)} at iteration {iter_num}, not a finite number{checkpoint}. '
            'Try a smaller --learning_rate, a larger --warmup_iters, a --grad_clip of 1.0, '
            'or --dtype=float32')


class StepLog:
    """Prints nanoGPT's line for a step, and writes it to metrics.jsonl, one step late.

    Reading a loss waits for the device, so a step's line is printed once the next step is queued.
    max_iters: the last iteration. eval_interval: iterations between evaluations. tokens_per_iter:
    tokens of an optimizer step. estimate_mfu: seconds per iteration to MFU, a fraction. schedule:
    iteration to learning rate. metrics_file: a MetricsFile or None. describe_valid: see
    check_finite.
    """

    def __init__(self, start_iter, max_iters, eval_interval, tokens_per_iter, estimate_mfu,
                 schedule, metrics_file, describe_valid):
        self.start_iter, self.last_logged = start_iter, start_iter - 1
        self.max_iters, self.eval_interval = max_iters, eval_interval
        self.start_time = time.time()
        self.tokens_per_iter, self.estimate_mfu = tokens_per_iter, estimate_mfu
        self.schedule, self.metrics_file = schedule, metrics_file
        self.describe_valid = describe_valid
        # nan throughout if the devices' peak is not known
        self.running_mfu = -1.0 if math.isfinite(estimate_mfu(1.0)) else math.nan
        self.last_step = {}  # of the last printed step: grad_norm and, in float16, loss_scale
        self.pending = None  # (iteration, metrics, end) of a step that is not printed yet
        self.train_time, self.resumed_at = 0.0, self.start_time
        self.pause_time = 0.0  # of the last pause
        self.estimated = False  # whether the time left has been printed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.metrics_file:
            self.metrics_file.upload()

    def queue(self, iter_num, metrics):
        """Remember the metrics of a step, arrays on the device, for the next flush."""
        # a CPU may compute a step before the call that starts it returns: it ended by now, not when
        # it is printed
        ended = time.time() if metrics['loss'].is_ready() else None
        self.pending = iter_num, metrics, ended

    def pause(self):
        """Stop the clock: evaluations and checkpoints do not count as training time."""
        self.paused_at = time.time()
        self.train_time += self.paused_at - self.resumed_at

    def resume(self):
        self.resumed_at = time.time()
        self.pause_time = self.resumed_at - self.paused_at

    def flush(self):
        """Print the pending step, if any. Raises NonFiniteError if its loss is not finite."""
        if not self.pending:
            return
        it, metrics, ended = self.pending
        loss = float(metrics['loss'])
        now = ended or time.time()
        dt = (self.train_time + now - self.resumed_at) / (it - self.last_logged)
        self.pending, self.last_logged, self.train_time, self.resumed_at = None, it, 0.0, now
        if it - self.start_iter >= 5:  # the first iterations are slower
            mfu = self.estimate_mfu(dt)
            first = self.running_mfu == -1.0
            self.running_mfu = mfu if first else 0.9 * self.running_mfu + 0.1 * mfu
        print(f'iter {it}: loss {loss:.4f}, time {dt * 1000:.2f}ms, '
              f'mfu {self.running_mfu * 100:.2f}%')
        self.last_step = {name: float(x) for name, x in metrics.items() if name != 'loss'}
        if self.metrics_file:
            self.metrics_file.write(
                iter=it, tokens=(it + 1) * self.tokens_per_iter, loss=loss,
                lr=float(self.schedule(it)), **self.last_step, ms_per_iter=dt * 1000,
                tokens_per_s=self.tokens_per_iter / dt,
                mfu=self.running_mfu if self.running_mfu >= 0 else math.nan)
        check_finite(it, metrics, self.describe_valid)
        if it - self.start_iter >= 2 and not self.estimated:  # the first one is slower
            evaluations = self.max_iters // self.eval_interval - it // self.eval_interval
            self._print_time_left(dt * (self.max_iters - it) + self.pause_time * evaluations)

    def evaluated(self, iter_num, losses):
        """Write the losses of an evaluation to metrics.jsonl, and print the time left.

        Raises NonFiniteError if the validation loss is not finite.
        """
        if self.metrics_file:
            self.metrics_file.write(iter=iter_num, tokens=iter_num * self.tokens_per_iter,
                                    train_loss=losses['train'], val_loss=losses['val'],
                                    lr=float(self.schedule(iter_num)))
            self.metrics_file.upload()
        if iter_num > self.start_iter:
            per_iter = (time.time() - self.start_time) / (iter_num - self.start_iter)
            self._print_time_left(per_iter * (self.max_iters + 1 - iter_num))
        check_finite(iter_num, {'validation loss': losses['val']}, self.describe_valid)

    def _print_time_left(self, seconds):
        self.estimated = True
        if sys.stdout.isatty() and round(seconds) > 0:
            print(time_left(seconds))


# -----------------------------------------------------------------------------
# Weights & Biases

@contextlib.contextmanager
def wandb_explained():
    """The package wandb, for a with block in which its errors become UserErrors."""
    try:
        wandb = optional_import('wandb')
    except UserError as e:
        raise UserError(f'{e}, or give --wandb_log=False') from e
    try:
        yield wandb
    except wandb.errors.Error as e:
        sys.excepthook = report_user_error  # wandb's own prints a traceback
        raise UserError(f'Weights & Biases cannot be used ({e}): run `wandb login`, or set '
                        'WANDB_MODE=offline to keep the log here, or give --wandb_log=False'
                        ) from e


def check_wandb():
    """Raise UserError if start_wandb will find no key: now, not after the model is built.

    On a terminal wandb asks for the key.
    """
    with wandb_explained() as wandb:
        if wandb.setup().settings.mode not in ('offline', 'dryrun', 'disabled'):
            wandb.login(verify=False)


def start_wandb(project, name, config, run_id):
    """(the package wandb, the run's id). run_id: of the run to continue, or None."""
    with wandb_explained() as wandb:
        run = wandb.init(project=project, name=name, config=config, id=run_id, resume='allow')

        def fail(*error):  # wandb's own hook prints a traceback, of a user's mistake too
            wandb.finish(exit_code=1)
            report_user_error(*error)
        sys.excepthook = fail
        return wandb, run.id


# -----------------------------------------------------------------------------
# for a terminal

def time_left(seconds):
    """As text, how long N seconds are and when they are over."""
    at = time.strftime('%a %H:%M', time.localtime(time.time() + seconds))
    return f'{timedelta(seconds=round(seconds))} left, done at about {at}'


def progress(items, description, n_batches):
    """The items, each as large a part of n_batches, with a progress bar of the batches on a
    terminal if they take long (and tqdm is installed)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(total=n_batches, desc=description, unit=' batches', delay=BAR_DELAY, leave=False,
              disable=not sys.stdout.isatty()) as bar:
        for k, item in enumerate(items, start=1):
            yield item
            bar.update(n_batches * k // len(items) - bar.n)
