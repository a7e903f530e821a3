"""Ending a run at the next step when a signal asks for it."""

import contextlib
import os
import signal
import threading

import jax
from jax._src.distributed import global_state  # no public name; Orbax uses it too


class StopRequest:
    """Remembers the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (the terminal was closed) of any
    process, so that all of them end at the same step; process 0 announces it at once.

    A second SIGINT or SIGTERM ends its process at once. SIGHUP never does, since a shell that ends
    sends it twice, and is ignored if the process was started so, as by nohup. A context manager: it
    restores the handlers.
    """

    def __init__(self):
        self.signum = None
        self.agreement = Agreement() if jax.distributed.is_initialized() else None
        self.hangup = getattr(signal, 'SIGHUP', None)  # Windows has none
        signals = [signal.SIGINT, signal.SIGTERM]
        if self.hangup and signal.getsignal(self.hangup) != signal.SIG_IGN:
            signals.append(self.hangup)
        # Python's handlers run in the main thread, which may be waiting for a device; the signals'
        # numbers arrive in this pipe at once
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.handlers = {signum: signal.signal(signum, self._remember) for signum in signals}
        self.wakeup_fd = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self.wakeup_fd)
        os.close(self.write_end)
        self.thread.join()  # it reads the pipe to its end
        if self.agreement and kind is None:  # after an error the others may be gone
            self.agreement.close()

    def _remember(self, signum, frame):
        if not self.agreement:
            self.signum = self.signum or signal.Signals(signum)

    def _listen(self):
        asked, pressed = False, 0
        while number := os.read(self.read_end, 1):
            signum = number[0]
            if signum not in self.handlers:
                continue
            pressed += signum != self.hangup
            if pressed > 1:
                os._exit(128 + signum)
            if not asked:
                self.agreement.request(signum) if self.agreement else announce(signum)
            asked = True
        os.close(self.read_end)

    def reached(self):
        """Whether to stop here. Several processes must ask equally often: they agree on a call."""
        if not self.agreement:
            return self.signum is not None
        reached = self.agreement.reached()
        self.signum = self.agreement.signum
        return reached

    @property
    def exit_code(self):
        """130 after Ctrl-C, as in a shell, else 0: SIGTERM is how schedulers end a job."""
        return 130 if self.signum == signal.SIGINT else 0


def announce(signum):
    again = '' if signum == getattr(signal, 'SIGHUP', None) else (
        '; press again to stop now, without saving')
    print(f'{signal.Signals(signum).name}: stopping after this step{again}', flush=True)


class Agreement:
    """How the processes of jax.distributed choose the call of reached() at which all of them stop.

    The request is a key in the coordinator's store. A thread of each process waits for it, blocks
    further calls of reached(), and publishes how many were answered. All stop at the first call
    that none of them has answered. JAX's preemption service does this for SIGTERM only, and a
    second late.
    """

    def __init__(self):
        self.signum, self.answered, self.last = None, 0, None
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._agree, daemon=True)
        self.thread.start()

    def reached(self):
        with self.lock:
            if self.last is not None and self.answered >= self.last:
                return True
            self.answered += 1
            return False

    def request(self, signum):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has asked
            global_state.client.key_value_set('stop', str(int(signum)))

    def close(self):
        """Leave: no process waits for this one's answer any more."""
        self.request(0)  # wakes the threads; nobody stops, as this process has answered every call
        self.thread.join()

    def _agree(self):
        # without a connection the main thread gets the same error
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            signum = int(wait_for('stop'))
            if signum:
                announce(signum)
            with self.lock:
                global_state.client.key_value_set(
                    f'answered/{global_state.process_id}', str(self.answered))
                self.last = max(int(wait_for(f'answered/{index}'))
                                for index in range(global_state.num_processes))
                self.signum = signal.Signals(signum) if signum else None


def wait_for(key):
    """The value of a key in the coordinator's store, as soon as a process has set it."""
    return global_state.client.blocking_key_value_get(key, 10 ** 11)  # ms, three years
