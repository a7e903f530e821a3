"""Signals that end a run at the next step."""

import contextlib
import os
import signal
import threading

import jax
from jax._src.distributed import global_state  # no public name; Orbax uses it too

HANGUP = getattr(signal, 'SIGHUP', None)  # Windows has none


class StopRequest:
    """Remembers the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (a closed terminal) of any process, so
    that all of them end at the same step. Process 0 announces it at once.

    A second SIGINT or SIGTERM ends its process at once. SIGHUP never does, since a shell that ends
    sends it twice; under nohup it is ignored. As a context manager it restores the handlers.

    Several processes agree on a call of reached(). A signal becomes a key in the coordinator's
    store. A thread of each process waits for this key, blocks further calls, and publishes how many
    it has answered. All stop at the first call that no process has answered. JAX's preemption
    service does this for SIGTERM only, and a second late.
    """

    def __init__(self):
        self.signum, self.answered, self.last = None, 0, None
        self.lock, self.client = threading.Lock(), global_state.client  # None for one process
        signals = [signal.SIGINT, signal.SIGTERM]
        if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
            signals.append(HANGUP)
        # Python's handlers run in the main thread, which may be waiting for a device. This pipe
        # gets the number of each signal at once
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.handlers = {signum: signal.signal(signum, self._remember) for signum in signals}
        self.wakeup_fd = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        if self.client:
            self.agreement = threading.Thread(target=self._agree, daemon=True)
            self.agreement.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self.wakeup_fd)
        os.close(self.write_end)
        self.listener.join()  # it reads the pipe to its end
        if self.client and kind is None:  # after an error the others may be gone
            self._request(0)  # ends the threads of all processes
            self.agreement.join()

    def reached(self):
        """Whether to stop here. Several processes must call this equally often."""
        with self.lock:
            if self.last is not None and self.answered >= self.last:
                return True
            self.answered += 1
            return False

    @property
    def exit_code(self):
        """130 after Ctrl-C, as in a shell, else 0: SIGTERM is how schedulers end a job."""
        return 130 if self.signum == signal.SIGINT else 0

    def _remember(self, signum, frame):
        if not self.client and not self.signum:
            self.signum, self.last = signal.Signals(signum), 0

    def _listen(self):
        asked, pressed = False, 0
        while number := os.read(self.read_end, 1):
            signum = number[0]
            if signum not in self.handlers:
                continue
            pressed += signum != HANGUP
            if pressed > 1:
                os._exit(128 + signum)
            if not asked:
                self._request(signum) if self.client else announce(signum)
            asked = True
        os.close(self.read_end)

    def _request(self, signum):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has asked
            self.client.key_value_set('stop', str(int(signum)))

    def _agree(self):
        # if the connection is lost, the main thread gets the same error
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            signum = int(self._wait_for('stop'))
            if signum:
                announce(signum)
            with self.lock:
                self.client.key_value_set(f'answered/{global_state.process_id}', str(self.answered))
                self.last = max(int(self._wait_for(f'answered/{index}'))
                                for index in range(global_state.num_processes))
                self.signum = signal.Signals(signum) if signum else None

    def _wait_for(self, key):
        """The value of a key in the coordinator's store, once a process has set it."""
        return self.client.blocking_key_value_get(key, 10 ** 11)  # ms, three years


def announce(signum):
    again = '' if signum == HANGUP else '; press again to stop now, without saving'
    print(f'{signal.Signals(signum).name}: stopping after this step{again}', flush=True)
