"""What both kinds of a replica's pipeline are: threads around one engine, and calls that are open until answered."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from llmo.errors import BusyError, DeadlineError, JobFailed, LLMOError, UnreachableError
from llmo.serve.loaded import LoadedAdapters

_log = logging.getLogger("llmo.serve")


class Open(Protocol):
    """A call; `deadline` is in unix seconds, and it is `over` once nobody waits for it. `adapter` is the folder of what
    answers it, if it is not the model itself."""

    deadline: float
    adapter: str | None
    over: bool


class Closes(Protocol):
    """What the end of any engine is."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Open)
W = TypeVar("W")

_BROKEN_AFTER = 8  # runs of the engine in a row of which nothing came


class Lifecycle(ABC, Generic[C, W]):
    """From `start` to `close`; every call that was accepted is ended once, whatever happens.

    The engine belongs to one thread, which loads it, works with it until `_stopping`, and closes it. What it gives goes
    through `_work` to the thread that answers; None there is the end. `cancel`, `expire`, `load_adapter` and `drain`
    may be called from any thread, and so must be `_end`. `broken` says what makes the replica of no use.
    """

    def __init__(
        self,
        load: Callable[[], None],
        engine: Closes,
        adapters: LoadedAdapters,
        threads: Mapping[str, Callable[[], None]],
    ) -> None:
        """`load` loads the engine, and `adapters` has what it holds beside it; `threads` by name, those beside the
        engine's own."""
        self._load = load
        self._adapters = adapters
        self._owned = engine
        self._loader = ThreadPoolExecutor(1, "llmo-adapters")
        self._pending: dict[str, list[tuple[C, Callable[[], None]]]] = {}  # by what they wait to be loaded
        self._short = False  # of memory for what is to be loaded next
        adapters.busy = self._in_use
        self.broken: LLMOError | None = None
        self._changed = threading.Condition()
        self._calls: set[C] = set()
        self._work: SimpleQueue[W | None] = SimpleQueue()
        self._refusing = False
        self._stopping = False
        self._failures = 0
        self._loaded = threading.Event()
        self._load_error: BaseException | None = None
        self._threads = [
            threading.Thread(target=work, name=f"llmo-{name}", daemon=True)
            for name, work in (*threads.items(), ("engine", self._own_engine))
        ]

    @abstractmethod
    def _use_engine(self) -> None:
        """Return when it is time to stop."""

    @abstractmethod
    def _end(self, call: C, error: LLMOError | None) -> None:
        """Close a call, once: free what it holds, and tell the one who asked, if there is something to tell."""

    def start(self) -> None:
        """Load the engine, in the thread that will run it, and begin. Raises what loading raises."""
        for thread in self._threads:
            thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            self.close()
            raise self._load_error

    def cancel(self, call: C) -> None:
        """Nobody wants the answer any more: what waits leaves the queue, and nothing further is told."""
        self._end(call, None)

    def load_adapter(self, folder: str) -> None:
        """Have an adapter in the engine before it is asked for. Raises ModelError for one that does not fit, and
        BusyError where others that are in use leave it no room."""
        self._adapters.need(folder)

    def expire(self, now: float) -> None:
        """Answer every call that is late, whether it waits or runs; `now` in unix seconds. Beside it, adapters that
        nobody asked for in a long while are given back."""
        self._adapters.look()
        with self._changed:
            late = [call for call in self._calls if self._late(call, now)]
        for call in late:
            self._end(call, too_late())

    def drain(self, timeout: float) -> bool:
        """Refuse new calls and wait until the accepted ones are answered; False when some were not in time."""
        with self._changed:
            self._refusing = True
            return self._changed.wait_for(lambda: not self._calls, timeout)

    def close(self) -> None:
        """Stop the threads; calls that are still open are answered UnreachableError."""
        with self._changed:
            self._refusing = self._stopping = True
            self._changed.notify_all()
            left = list(self._calls)
        for call in left:
            self._end(call, UnreachableError("the replica stopped before it answered", hint="ask again"))
        self._work.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._loader.shutdown(cancel_futures=True)

    def _check_accepting(self) -> None:
        """Raises UnreachableError when the replica is leaving; to be asked with `_changed` held."""
        if self._refusing:
            raise UnreachableError("the replica is leaving", hint="ask again: another one takes over")

    @contextmanager
    def _in_use(self) -> Iterator[set[str]]:
        """The adapters of the open calls, but for those that wait to be loaded; no other call opens meanwhile."""
        with self._changed:
            waiting = {call for calls in self._pending.values() for call, _ in calls}
            yield {call.adapter for call in self._calls - waiting if call.adapter is not None}

    def _at_hand(self, call: C, again: Callable[[], None]) -> bool:
        """Whether what answers a call is loaded. If not, that is done beside the calls that need not wait for it, and
        then the call ends with what went wrong, or comes `again`. Nobody overtakes those who wait for memory, or they
        might for ever."""
        if call.adapter is None:
            return True
        with self._changed:
            if self._adapters.at_hand(call.adapter) and not self._short:
                return True
            waiting = self._pending.setdefault(call.adapter, [])
            waiting.append((call, again))
            self._changed.notify_all()
        if len(waiting) == 1:
            self._loader.submit(self._bring, call.adapter)
        return False

    def _bring(self, adapter: str) -> None:
        """Load it, as soon as those that leave it no memory are not in use any more."""
        wrong: LLMOError | None = None
        while self._wanted(adapter):
            try:
                self._adapters.need(adapter)
                break
            except BusyError:
                with self._changed:
                    self._short = True
                    self._changed.wait_for(lambda: not self._wanted(adapter) or self._adapters.may_make_room())
            except LLMOError as error:
                wrong = error
                break
        with self._changed:
            self._short = False
            waiting = self._pending.pop(adapter)
        for call, again in waiting:
            if wrong is None:
                again()
            else:
                self._end(call, wrong)

    def _wanted(self, adapter: str) -> bool:
        """Whether a call waits for it that is still open; they all end when the replica leaves."""
        with self._changed:
            return any(not call.over for call, _ in self._pending[adapter])

    def _late(self, call: C, now: float) -> bool:
        return call.deadline <= now

    def _ran(self, worked: bool, what: str) -> None:
        """Count a run of the engine that gave something or nothing; too many of the latter, and it fails at `what`."""
        self._failures = 0 if worked else self._failures + 1
        if self._failures >= _BROKEN_AFTER:
            self.broken = JobFailed(f"the engine fails {what}", hint="see the replica's log, then deploy again")

    def _loaded_engine(self) -> None:
        """What is to be known of the engine before the first call."""

    def _own_engine(self) -> None:
        try:
            self._load()
            self._loaded_engine()
        except BaseException as error:  # raised again by `start`, in the thread that asked
            self._load_error = error
            return
        finally:
            self._loaded.set()
        try:
            self._use_engine()
        except Exception as error:  # the border of a plugin's engine: without its thread the replica is of no use
            _log.exception("the engine's thread ended")
            self.broken = JobFailed(f"the engine failed: {error}", hint="see the replica's log, then deploy again")
        finally:
            self._owned.close()


def too_late() -> DeadlineError:
    return DeadlineError("the deadline passed before the answer was ready", hint="allow it more time")
