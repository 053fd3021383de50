"""Bad files: each is listed once with its reason, and their share has a limit."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pixelgrow.data.sources.base import BadFile, Source, bad_of, files_of, lost_in_shards, strays_of
from pixelgrow.distributed import Team
from pixelgrow.errors import UserError
from pixelgrow.writing import writing

log = logging.getLogger(__name__)
Row = dict[str, str]
WARNINGS = 5  # warnings of a stage at most; the list and the report have all files


class BadFiles:
    """Counts bad files by source, and lists them in a JSONL file, a line `{source, file, reason, fingerprint}` each.

    `limit`: the share of a source's samples that may be bad or lost; one more raises `UserError`.
    `path`: of the list; None: no list is written. It also holds the files that were passed over one by one
    (`strays_of`), which do not count.

    A run that is resumed goes on from its list. If a source's samples have changed, or the files that its index left
    out, the list holds another fingerprint for it, and its old lines are dropped: a file that was repaired or removed
    no longer counts.
    """

    def __init__(
        self, sources: Iterable[Source], limit: float = 0.01, path: str | os.PathLike[str] | None = None
    ) -> None:
        if not 0 <= limit <= 1:
            raise UserError(f"bad_limit: got {limit}, expected a share between 0 and 1; the default is 0.01")
        self.limit = limit
        self.path = Path(path) if path is not None else None
        self._sources = list(sources)
        self._states = [state_of(source) for source in self._sources]
        self._found: list[dict[str, str]] = [{} for _ in self._sources]
        self._listed: set[tuple[str, str]] = set()  # (fingerprint, file) of the list's first `_read` bytes
        self._read = self._warned = 0
        self._news: list[tuple[int, BadFile]] = []
        self._forget_what_changed()
        for number, source in enumerate(self._sources):
            strays = {stray.key: stray.reason for stray in strays_of(source)}
            rows = (row for row in self._rows() if row["fingerprint"] == self._states[number])
            listed = [BadFile(row["file"], row["reason"]) for row in rows if row["file"] not in strays]
            self._list(number, strays, warn=False)
            self.add(number, [*bad_of(source), *listed])

    def add(self, source: int, found: Iterable[BadFile]) -> None:
        """Count bad files of source number `source`. Raises `UserError` if there are now more than the limit allows."""
        new = {bad.key: bad.reason for bad in found if bad.key not in self._found[source]}
        if new:
            self._found[source] |= new
            self._news += [(source, BadFile(key, reason)) for key, reason in new.items()]
            self._list(source, new)
            check_share(self._sources[source], self._found[source], self.limit, self.path)

    @property
    def unshared(self) -> int:
        """How many files were added since the last `share`."""
        return len(self._news)

    def share(self, team: Team) -> None:
        """Add the files that the other processes have met since the last call to the account of the first one.

        Raises UserError in all of them if there are too many.
        """
        found = team.gather(self._news)
        self._news = []
        with team.together():
            for source, file in (one for other in found[1:] for one in other):
                if team.first:
                    self.add(source, [file])
        self._news = []

    def __len__(self) -> int:
        return sum(len(found) for found in self._found)

    def files(self) -> list[BadFile]:
        """All bad files so far."""
        return [BadFile(key, reason) for found in self._found for key, reason in found.items()]

    def report(self) -> str:
        """The counts in one line, for the end of a run."""
        if not len(self):
            return "no bad files"
        parts = [
            f"{len(found) + lost_in_shards(source)} of {files_of(source)} samples of {source.name}"
            for source, found in zip(self._sources, self._found, strict=True)
            if found
        ]
        where = f", listed in {self.path}" if self.path else ""
        return f"{len(self)} bad file{'s' if len(self) > 1 else ''} skipped ({'; '.join(parts)}){where}"

    def _warn(self, source: Source, rows: dict[str, str]) -> None:
        if self._warned == WARNINGS:
            return
        self._warned += 1
        key, reason = next(iter(rows.items()))
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        last = "; those that follow are counted, and reported at the end" if self._warned == WARNINGS else ""
        log.warning("%s: bad file %s (%s)%s%s", source.name, key, reason, more, last)

    def _rows(self, start: int = 0) -> list[Row]:
        """The lines of the list from byte `start` on, without a line that was not written whole."""
        rows: list[Row] = []
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                file.seek(start)
                text = file.read().decode(errors="replace")
            for line in text.splitlines():
                try:
                    row = json.loads(line)
                    rows.append({key: str(row[key]) for key in ("source", "file", "reason", "fingerprint")})
                except (ValueError, TypeError, KeyError):
                    log.warning("%s: a damaged line is dropped", self.path)
        return rows

    def _forget_what_changed(self) -> None:
        if self.path is None or not self.path.exists():
            return
        names = {source.name for source in self._sources}  # a list may hold other sources' files too
        kept = [row for row in self._rows() if row["fingerprint"] in self._states or row["source"] not in names]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if text == self.path.read_text(encoding="utf-8", errors="replace"):
            return  # other processes may be adding to it
        fresh = self.path.with_name(f"{self.path.name}.tmp")
        with writing(self.path):
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self.path)

    def _list(self, number: int, new: dict[str, str], warn: bool = True) -> None:
        source, state = self._sources[number], self._states[number]
        if self.path is not None:  # another loader of the same source may have added to the list
            self._listed |= {(row["fingerprint"], row["file"]) for row in self._rows(self._read)}
            self._read = self.path.stat().st_size if self.path.exists() else 0
        rows = {key: reason for key, reason in new.items() if (state, key) not in self._listed}
        if not rows:
            return
        if warn:
            self._warn(source, rows)
        if self.path is None:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(_lines(source.name, state, rows))


def state_of(source: Source) -> str:
    """A source's fingerprint, with a hash of the files that its index left out."""
    text = "\n".join(f"{bad.key}\0{bad.reason}" for bad in (*bad_of(source), *strays_of(source)))
    if not text:
        return source.fingerprint
    return f"{source.fingerprint}-{hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"


def write_list(path: Path, source: Source, files: Iterable[BadFile]) -> None:
    """Write the bad files of one source like a run's list, whole or not at all. Raises `UserError` if it cannot."""
    part = path.with_name(f".{path.name}.part")
    rows = {bad.key: bad.reason for bad in files}
    with writing(path):
        part.write_text("".join(_lines(source.name, state_of(source), rows)), encoding="utf-8")
        part.replace(path)


def _lines(name: str, fingerprint: str, found: Mapping[str, str]) -> Iterator[str]:
    for key, reason in found.items():
        yield json.dumps({"source": name, "file": key, "reason": reason, "fingerprint": fingerprint}) + "\n"


def check_share(source: Source, found: Mapping[str, str], limit: float, listed: Path | None = None) -> None:
    """Raise `UserError` if more than the share `limit` of a source's samples is bad or lost.

    `found`: the reason of each bad file. `listed`: the list that has them all.
    """
    lost = len(found) + lost_in_shards(source)
    if lost > limit * files_of(source):
        key, reason = next(iter(found.items()))
        where = f"all listed in {listed}" if listed else f"the first: {key}: {reason}; pixelgrow data --bad lists all"
        raise UserError(
            f"{source.name}: {lost} of {files_of(source)} samples are bad or lost, the limit is {limit:.3g} of them "
            f"({where}); repair or remove them, or raise bad_limit"
        )
