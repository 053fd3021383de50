"""Metadata files, row by row: metadata.jsonl, metadata.csv, metadata.parquet.

The rows of a text file stay on the disk: `rows` says where each begins and how long it is, `again` reads one of them
once more. Those of a parquet file, which has no such places, are kept in memory.
"""

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.captions import CAPTION_KEYS
from pixelgrow.data.sources.files import open_regular, read_regular
from pixelgrow.data.sources.index import Strings
from pixelgrow.errors import UserError

FILE_NAME = "file_name"
COLUMNS = f"{FILE_NAME} and one of {', '.join(CAPTION_KEYS)}"
_MAX_LINE = 1 << 20  # bytes
_BOM = b"\xef\xbb\xbf"
Values = Mapping[str, object]


@dataclass(frozen=True)
class Row:
    """A row of a metadata file: its `number` (line from 1), where it is, and its values, or what is wrong with it.

    `start`, `length`: what `again` needs to read it once more. `lines`: how many lines it takes.
    """

    number: int
    start: int
    length: int
    values: Values | None
    fault: str = ""
    lines: int = 1


class Table(ABC):
    """A metadata file at `path`."""

    example = ""  # of a row, for messages

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """All rows that are not blank. Raises UserError if the file cannot be read as a whole."""

    @abstractmethod
    def again(self, start: int, length: int) -> Values:
        """The values of a row that `rows` had without a fault. Raises `BadImage` if it is none any more."""

    def _open(self) -> BinaryIO:
        try:
            file = open_regular(self.path)
        except BadImage as error:
            raise UserError(f"{self.path}: {error.reason}; expected a file of rows with {COLUMNS}") from None
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            file.close()
            raise UserError(f"{self.path}: it is UTF-16; expected UTF-8: save it so")
        file.seek(0)
        return file


class JsonLines(Table):
    """One JSON object a line."""

    example = 'one {"file_name": "a.jpg", "text": "a caption"} per line'

    def rows(self) -> Iterator[Row]:
        with self._open() as file:
            for number, start, _, line in _lines(file):
                try:
                    yield Row(number, start, len(line), self._parse(line))
                except BadImage as error:
                    yield Row(number, start, len(line), None, error.reason)

    def again(self, start: int, length: int) -> Values:
        return self._parse(read_regular(self.path, start, length))

    @staticmethod
    def _parse(line: bytes) -> Values:
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            raise BadImage("line is not UTF-8") from None
        except (ValueError, RecursionError):
            raise BadImage("line is not JSON") from None
        if not isinstance(row, dict):
            raise BadImage("line is not a JSON object")
        return row


class Csv(Table):
    """Comma-separated values with a header, quoted like a spreadsheet's; its header may also use semicolons or tabs."""

    example = "a header line file_name,text and one line per image"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._delimiter, self._header = self._columns()

    def _columns(self) -> tuple[str, list[str]]:
        with self._open() as file:
            first = file.readline(_MAX_LINE).removeprefix(_BOM).decode(errors="replace")
        for delimiter in ",;\t":
            header = [name.strip() for name in _cells(first, delimiter)]
            if FILE_NAME in header:
                return delimiter, header
        got = ", ".join(_cells(first, ","))[:200] or "none"
        raise UserError(f"{self.path}: its columns are {got}; expected {COLUMNS} in its first line")

    def rows(self) -> Iterator[Row]:
        with self._open() as file:
            number = end = 0  # of the line that the reader took last

            def lines() -> Iterator[str]:
                nonlocal number, end
                for at, _, stop, line in _lines(file, blank=True):
                    number, end = at, stop
                    yield line.decode("utf-8", "surrogateescape")

            reader = csv.reader(lines(), delimiter=self._delimiter, strict=True)
            next(reader)  # the header
            while True:
                before, start = number, end
                values, fault = None, ""
                try:
                    cells = next(reader)
                    if not cells:
                        continue  # a blank line
                    values = self._values(cells)
                except StopIteration:
                    return
                except csv.Error as error:
                    fault = f"line is not CSV ({error})"
                except BadImage as error:
                    fault = error.reason
                yield Row(before + 1, start, end - start, values, fault, number - before)

    def _values(self, cells: list[str]) -> Values:
        if len(cells) > len(self._header):
            raise BadImage(f"{len(cells)} cells in {len(self._header)} columns: put a caption with commas into quotes")
        try:
            "".join(cells).encode()
        except UnicodeEncodeError:
            raise BadImage("line is not UTF-8") from None
        return dict(zip(self._header, cells, strict=False))

    def again(self, start: int, length: int) -> Values:
        text = read_regular(self.path, start, length).decode("utf-8", "surrogateescape")
        try:
            cells = next(csv.reader([text], delimiter=self._delimiter, strict=True), [])
        except csv.Error as error:
            raise BadImage(f"line is not CSV ({error})") from None
        return self._values(cells)


class Parquet(Table):
    """A parquet file, read with pyarrow."""

    example = f"the columns {COLUMNS}"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._kept = Strings()

    def rows(self) -> Iterator[Row]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                f"{self.path}: parquet files are read with pyarrow, which is not installed: pip install "
                "'pixelgrow[parquet]', or save it as metadata.csv"
            ) from None
        with self._open() as file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
                names = table.schema_arrow.names
                if FILE_NAME not in names:
                    raise UserError(f"{self.path}: its columns are {', '.join(names)[:200]}; expected {COLUMNS}")
                columns = [name for name in (FILE_NAME, *CAPTION_KEYS) if name in names]
                for batch in table.iter_batches(batch_size=4096, columns=columns):
                    for values in batch.to_pylist():
                        number = len(self._kept)
                        self._kept.append(json.dumps(values, default=str).encode())
                        yield Row(number + 1, number, 0, values)
            except (pyarrow.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{self.path}: it cannot be read as parquet ({reason}); download or write it anew"
                ) from None

    def again(self, start: int, length: int) -> Values:
        values: Values = json.loads(self._kept[start])
        return values


KINDS: dict[str, type[Table]] = {"metadata.jsonl": JsonLines, "metadata.csv": Csv, "metadata.parquet": Parquet}


def table_in(folder: str) -> str | None:
    """The name of a folder's metadata file, in any case of letters; None without one. Raises UserError for two."""
    found = sorted(name for name in os.listdir(folder) if name.lower() in KINDS)
    if len(found) > 1:
        raise UserError(f"{folder}: it has {' and '.join(found)}; expected one of them: rename or remove the other")
    return found[0] if found else None


def open_table(path: str) -> Table:
    """The metadata file at `path`. Raises UserError."""
    return KINDS[os.path.basename(path).lower()](path)


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _lines(file: BinaryIO, blank: bool = False) -> Iterator[tuple[int, int, int, bytes]]:
    """(number from 1, byte offsets of its start and end, line) of each line that is not blank, or of all.

    A line of more than 1 MiB, longer than a row can be, is cut there; a byte order mark is skipped.
    """
    number, start = 0, 0
    while line := file.readline(_MAX_LINE):
        number += 1
        piece, end = line, start + len(line)
        while len(piece) == _MAX_LINE and not piece.endswith(b"\n"):
            piece = file.readline(_MAX_LINE)
            end += len(piece)
        if not start and line.startswith(_BOM):
            line, start = line[len(_BOM) :], len(_BOM)
        if blank or line.strip():
            yield number, start, end, line
        start = end
