"""A background thread, which writes the files of an epoch while the next one trains."""

import signal
import threading
from collections.abc import Callable
from typing import Self

from resnet_fast.common.files import signals_wait


class Background:
    """Runs one call at a time on a thread.

        with Background() as background:
            background.start(write_files, then=report)  # waits for the previous call, if any
            ...                                         # `report` runs in this thread, in the next method called

    However the block ends, it waits for the call. An error of the call is raised by `start`, by `finish` or at the end
    of the block. If SIGTERM would end the process at once, it does so after the call.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.then: Callable[[], object] | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.finish()
        finally:
            if signal.getsignal(signal.SIGTERM) == self._terminate:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def start(self, call: Callable[[], object], then: Callable[[], object]) -> None:
        """Run `call` on the background thread; `then` follows in the thread that waits for it."""
        with signals_wait():
            self.finish()
            self.then = then
            self.thread = threading.Thread(target=self._run, args=(call,), name="resnet_fast files")
            self.thread.start()

    def poll(self) -> None:
        """Run `then` if the call has ended without an error; do not wait."""
        if self.thread is not None and not self.thread.is_alive() and self.error is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the call, then run its `then`; SIGINT and SIGTERM take effect after the wait.

        Raises:
            BaseException: the error that the call raised.
        """
        if self.thread is None:
            return
        with signals_wait():
            self.thread.join()
        self.thread, then, self.then, error, self.error = None, self.then, None, self.error, None
        if error is not None:
            raise error
        assert then is not None
        then()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            self.error = error

    def _terminate(self, number: int, frame: object) -> None:
        if self.thread is not None:
            self.thread.join()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
