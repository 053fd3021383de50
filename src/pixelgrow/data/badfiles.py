"""The account of bad files: each listed once, with its reason, and a limit on their share."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pixelgrow.data.sources import BadFile, Source, bad_of, files_of
from pixelgrow.errors import UserError

log = logging.getLogger(__name__)


class BadFiles:
    """Counts bad files by source and lists them in a JSONL file, one `{source, file, reason}` a line.

    `limit`: the share of a source's distinct files that may be bad; one file more raises `UserError`.
    `path`: the list, added to and never repeated in, also by a run that resumes; None lists nothing.
    """

    def __init__(
        self, sources: Iterable[Source], limit: float = 0.01, path: str | os.PathLike[str] | None = None
    ) -> None:
        if not 0 <= limit <= 1:
            raise UserError(f"bad_limit: got {limit}, expected a share between 0 and 1; the default is 0.01")
        self.limit = limit
        self.path = Path(path) if path is not None else None
        self._sources = list(sources)
        self._found: list[dict[str, str]] = [{} for _ in self._sources]
        self._listed: set[tuple[str, str]] = set()
        self._read_list()
        for number, source in enumerate(self._sources):
            self.add(number, bad_of(source))

    def add(self, source: int, found: Iterable[BadFile]) -> None:
        """Take note of bad files of source number `source`. Raises `UserError` once they are more than the limit."""
        new = []
        for bad in found:
            if bad.key not in self._found[source]:
                self._found[source][bad.key] = bad.reason
                new.append(bad)
        if new:
            self._list(self._sources[source].name, new)
            self._check(source)

    def __len__(self) -> int:
        return sum(len(found) for found in self._found)

    def files(self) -> list[BadFile]:
        """All bad files so far."""
        return [BadFile(key, reason) for found in self._found for key, reason in found.items()]

    def report(self) -> str:
        """One line for the end of a run."""
        if not len(self):
            return "no bad files"
        parts = [
            f"{len(found)} of {files_of(source)} in {source.name}"
            for source, found in zip(self._sources, self._found, strict=True)
            if found
        ]
        where = f", listed in {self.path}" if self.path else ""
        return f"{len(self)} bad file{'s' if len(self) > 1 else ''} skipped ({'; '.join(parts)}){where}"

    def _check(self, number: int) -> None:
        source, found = self._sources[number], self._found[number]
        if len(found) > self.limit * files_of(source):
            key, reason = next(iter(found.items()))
            where = f"all listed in {self.path}" if self.path else f"the first: {key}: {reason}"
            raise UserError(
                f"{source.name}: {len(found)} of {files_of(source)} files are bad, the limit is {self.limit:.3g} of "
                f"them ({where}); repair or remove them, or raise bad_limit"
            )

    def _read_list(self) -> None:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                self._listed.add((row["source"], row["file"]))
            except (ValueError, TypeError, KeyError):
                log.warning("%s: a line cut off in writing is ignored", self.path)

    def _list(self, name: str, found: list[BadFile]) -> None:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        log.warning("%s: bad file %s (%s)%s", name, found[0].key, found[0].reason, more)
        if self.path is None:
            return
        self._read_list()  # another loader (held-out data, say) may list the same source
        rows = [bad for bad in found if (name, bad.key) not in self._listed]
        if not rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for bad in rows:
                self._listed.add((name, bad.key))
                file.write(json.dumps({"source": name, "file": bad.key, "reason": bad.reason}) + "\n")
