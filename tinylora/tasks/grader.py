"""Grading in worker processes with a wall-clock limit: what hangs, crashes or eats memory costs one completion.

A thread of ours stands before each process, hands it one completion at a time and kills it when it is late. Processes start
when there is work for them, so a run that never needs them has none, and grading goes on while the model generates.
"""

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from tinylora.errors import InputError
from tinylora.tasks.grading import LONGEST_TEXT, Verdict, grade

LIMIT = 1.5  # seconds of wall-clock time for one completion; the slowest gold answer of our sets takes 0.5 against itself
START_LIMIT = 120.0  # seconds for a process to come up; it imports sympy


class GraderPool:
    """Up to `workers` processes, as many as there has been work for at once. A context manager; close() ends them."""

    def __init__(self, workers: int | None = None, limit: float = LIMIT, command: Sequence[str] | None = None) -> None:
        self.limit = limit
        # -P: the worker's folder stays off its path, where a file of it may have the name of a library's
        self.command = list(command or (sys.executable, "-P", str(Path(__file__).with_name("grader_worker.py"))))
        self.most = workers or max(1, min(8, (os.cpu_count() or 2) - 1))
        self.jobs: queue.SimpleQueue[tuple[dict[str, Any], Future[Verdict]] | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.processes: dict[int, _Process] = {}  # by thread number

    def submit(self, text: str, gold: str | Sequence[str], answer_format: str, tolerance: float = 0.0) -> "Future[Verdict]":
        """The verdict to come. It never raises, except InputError where no process can be started at all."""
        future: Future[Verdict] = Future()
        text = text[-LONGEST_TEXT:]
        self.jobs.put(({"text": text, "gold": gold, "answer_format": answer_format, "tolerance": tolerance}, future))
        if len(self.threads) < self.most and self.jobs.qsize() > 0:
            number = len(self.threads)
            self.threads.append(threading.Thread(target=self._serve, args=(number,), name=f"grader-{number}", daemon=True))
            self.threads[-1].start()
        return future

    def close(self) -> None:
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()
        self.threads = []

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(self, number: int) -> None:
        while (job := self.jobs.get()) is not None:
            request, future = job
            try:
                future.set_result(self._one(number, json.dumps(request)))
            except BaseException as error:  # the future carries it to whoever asked; this thread goes on
                future.set_exception(error)
            else:
                with contextlib.suppress(InputError):  # the next completion would meet it again, and has somebody to tell
                    self._process(number)  # a replacement comes up before there is work for it
        if number in self.processes:
            self.processes.pop(number).end()

    def _process(self, number: int) -> "_Process":
        if number not in self.processes:
            self.processes[number] = _Process(self.command)
        return self.processes[number]

    def _one(self, number: int, request: str) -> Verdict:
        for _attempt in range(2):  # a process that dies may have been killed from outside: that is not the completion's fault
            process = self._process(number)
            answer = process.ask(request, self.limit)
            if answer is not None and answer != "":
                return Verdict(**json.loads(answer))
            self.processes.pop(number).end()
            if answer is None:
                return _gave_up("timeout")
        return _gave_up("crash")


def _gave_up(why: str) -> Verdict:
    return Verdict({"strict": None, "flexible": None}, {"strict": False, "flexible": False}, why)


class _Process:
    """One worker process and its two pipes."""

    def __init__(self, command: list[str]) -> None:
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a Ctrl-C in the terminal is for the run, which ends its step first
            )
            self.buffer = b""
            if self._line(START_LIMIT) != "ready":
                self.end()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise InputError(f"the grader's process does not start: {said[-1] if said else 'it says nothing'}")

    def ask(self, request: str, limit: float) -> str | None:
        """The answer's line; None where it is late, "" where the process has died."""
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return ""
        return self._line(limit)

    def _line(self, limit: float) -> str | None:
        assert self.process.stdout is not None
        deadline, out = time.monotonic() + limit, self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                return None
            piece = os.read(out, 1 << 16)
            if not piece:
                return ""
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was still to be flushed has no reader
                pipe.close()


def gold_answers(row: dict[str, Any]) -> list[str]:
    """Of a row of a known set: the one that was read when the set was."""
    return [row["answer"]]


class Grader:
    """Verdicts on completions: in worker processes, or here for rows whose answers are plain numbers after "####"."""

    def __init__(
        self, answer_format: str, pool: GraderPool | None, golds: Callable[[dict[str, Any]], list[str]] = gold_answers
    ) -> None:
        """`golds`: the gold answers of a row, any of which is right."""
        self.answer_format, self.pool, self.golds = answer_format, pool, golds

    def submit(self, text: str, row: dict[str, Any]) -> "Future[Verdict]":
        """The verdict to come on a completion of this row, which has gold answers."""
        gold, tolerance = self.golds(row), float(row.get("tolerance", 0.0))
        if self.pool is not None:
            return self.pool.submit(text, gold, self.answer_format, tolerance)
        future: Future[Verdict] = Future()
        future.set_result(grade(text, gold, self.answer_format, tolerance))
        return future

    def grade(self, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Verdict | None]:
        """Of each; None where the row has no gold answer."""
        futures = [self.submit(text, row) if self.golds(row) else None for text, row in zip(texts, rows, strict=True)]
        return [None if future is None else future.result() for future in futures]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
