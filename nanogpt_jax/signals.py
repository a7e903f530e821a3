"""Ending a run at the next step when a signal asks for it."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Remembers the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (the terminal was closed), so that a
    run can end at the next step; a line says so at once.

    A second SIGINT or SIGTERM ends the process at once. SIGHUP never does, since a shell that ends
    sends it twice, and is left alone if the process was started to ignore it, as by nohup. Under
    jax.distributed, SIGTERM is left to JAX's own handler, by which all processes agree where to
    stop, and the others are forwarded as SIGTERM. A context manager: it restores the handlers.
    """

    def __init__(self):
        self.signum, self.times_asked = None, 0
        self.distributed = jax.distributed.is_initialized()
        self.hangup = getattr(signal, 'SIGHUP', None)  # Windows has none
        signals = [signal.SIGINT] + [signal.SIGTERM] * (not self.distributed)
        if self.hangup and signal.getsignal(self.hangup) != signal.SIG_IGN:
            signals.append(self.hangup)
        # Python runs its handlers between instructions of the main thread, which may be waiting for
        # a device. The numbers of the signals are written to this pipe at once
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.handlers = {signum: signal.signal(signum, self._remember) for signum in signals}
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._announce, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.write_end)
        self.thread.join()  # it reads the pipe to its end

    def _remember(self, signum, frame):
        if not self.distributed:
            self.signum = self.signum or signal.Signals(signum)

    def _announce(self):
        first, pressed = True, 0
        while number := os.read(self.read_end, 1):
            signum = number[0]
            if signum not in self.handlers:
                continue
            pressed += signum != self.hangup
            if pressed > 1:
                os._exit(128 + signum)
            if first:
                print(f'{signal.Signals(signum).name}: stopping after this step'
                      + '; press again to stop now, without saving' * pressed, flush=True)
                if self.distributed:
                    os.kill(os.getpid(), signal.SIGTERM)
            first = False
        os.close(self.read_end)

    def reached(self):
        """Whether to stop here. Several processes must ask equally often: they agree on a call."""
        self.times_asked += 1
        if multihost_utils.reached_preemption_sync_point(self.times_asked):
            self.signum = signal.SIGTERM
        return self.signum is not None

    @property
    def exit_code(self):
        """130 after Ctrl-C, as in a shell, else 0: SIGTERM is how schedulers end a job."""
        return 130 if self.signum == signal.SIGINT else 0
