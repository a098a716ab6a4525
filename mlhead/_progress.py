"""Progress for people: a bar on a terminal, now and then a plain line everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from mlhead._usage import require


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Counts from `start` to `total` and shows how far it is, the speed and the time left.

    Args:
        total: where counting ends.
        start: where it begins; work done before a resume does not enter the speed.
        label: what is going on.
        unit_size: images per count, for the speed.
        stream: by default stderr.
        every_s: seconds between plain lines.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        start: int = 0,
        unit_size: int = 1,
        stream: TextIO | None = None,
        every_s: float = 10.0,
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.total, self.label, self.count, self.start, self.unit_size = total, label, start, start, unit_size
        self.every_s = every_s
        self._began = self._said = time.monotonic()
        self._paused_s = 0.0
        self._note = ""
        self._bar = None
        if self.stream.isatty():
            tqdm = require("tqdm", "The progress bar").tqdm
            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {postfix}"
            self._bar = tqdm(
                total=total, initial=start, desc=label, file=self.stream, bar_format=layout, dynamic_ncols=True
            )

    @property
    def rate(self) -> float:
        """Images a second since the start, pauses left out."""
        return (self.count - self.start) * self.unit_size / max(1e-9, time.monotonic() - self._began - self._paused_s)

    def status(self) -> str:
        """The note, the speed and the time left."""
        left = duration((self.total - self.count) * self.unit_size / self.rate) if self.count > self.start else "?"
        return "  ".join(part for part in (self._note, f"{self.rate:,.0f} images/s", f"{left} left") if part)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Goes on by `count`; `note` replaces what is shown beside the speed."""
        self.count += count
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.set_postfix_str(self.status(), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._said >= self.every_s or self.count == self.total:
            self._said = time.monotonic()
            self.say(f"{self.label} {self.count}/{self.total}  {self.status()}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count for the speed."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - began

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
