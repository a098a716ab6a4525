"""Keeping count of unreadable data: each item is named once, all are counted, and a policy says whether to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from mlhead._usage import UsageError
from mlhead.data.loading import BadSample

POLICIES = ("skip", "error")


class BadDataLog:
    """What could not be used, by name.

    Args:
        policy: "skip" goes on without the bad items after reporting them; "error" raises at the first.
        say: where a line for the user goes.
        file: a text file that gets every item, name, tab, reason, from `begin` on; None for none.
        goes_on: whether what is in the file already counts; it is not written again, and of the policy "error" still
            an error.
        shown: how many are shown to the user before only the count goes on.
    """

    def __init__(
        self,
        policy: str,
        say: Callable[[str], None],
        file: Path | None = None,
        *,
        goes_on: bool = True,
        shown: int = 20,
    ) -> None:
        self.policy, self.say, self.file, self.shown = policy, say, file, shown
        self.names: dict[str, str] = {}
        self._listed: dict[str, str] = {}
        self._waiting: list[BadSample] | None = []  # for the file, until `begin`
        if goes_on and file is not None and file.is_file():
            lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            self._listed = dict(line.split("\t", 1) for line in lines if "\t" in line)
            if policy != "error":
                self.names = dict(self._listed)

    def begin(self) -> None:
        """Writes the file; before, nothing of an earlier run is touched."""
        waiting, self._waiting = self._waiting, None
        if waiting:
            self._write(waiting)

    def _write(self, items: Iterable[BadSample]) -> None:
        if self.file is not None:
            # Names of files need not be UTF-8, and those in JSON may be no text at all.
            with self.file.open("ab") as out:
                new = (item for item in items if item.name not in self._listed)
                out.writelines(_bytes(f"{item.name}\t{item.reason}\n") for item in new)

    def add(self, items: Iterable[BadSample]) -> None:
        """Reports items not seen before.

        Raises:
            UsageError: there is one and the policy is "error".
        """
        new = [item for item in items if item.name not in self.names]
        if not new:
            return
        for item in new:
            self.names[item.name] = item.reason
            if len(self.names) <= self.shown:
                self.say(f"bad data: {item.name}: {item.reason}")
            elif len(self.names) == self.shown + 1:
                self.say(
                    f"bad data: more; all of them are in {self.file}" if self.file else "bad data: more, counted only"
                )
        if self._waiting is not None:
            self._waiting += new
        else:
            self._write(new)
        if self.policy == "error":
            rest = f" and {len(new) - 1} more" if len(new) > 1 else ""
            raise UsageError(f"bad data, and --on-bad-data is error: {new[0].name}: {new[0].reason}{rest}")

    def summary(self) -> str:
        """One line for the end of a run, or an empty string when nothing was bad."""
        if not self.names:
            return ""
        where = f"; listed in {self.file}" if self.file else ""
        return f"bad data: {len(self.names)} rows or images were left out{where}"


def _bytes(line: str) -> bytes:
    """A line with the bytes of file names as they are; what has no bytes at all is escaped."""
    try:
        return line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return line.encode("utf-8", "backslashreplace")
