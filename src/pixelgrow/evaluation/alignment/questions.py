"""Published files of questions: DSG's, GenEval 2's, Gecko's and GeckoNum's.

Only the files' forms are known here. None of the files come with the package.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.nouns import NUMBERS, number, plural, singular
from pixelgrow.writing import reading

MOST = 5  # objects of one kind in a counting task, as in arXiv 2405.16759


class Question(NamedTuple):
    """A question about an image, and the answer that an image true to its prompt gives.

    kind: what it is about, in the file's words. parents: ids of questions of the same prompt that must be answered yes
    for this one to count. noun: of a question of how many there are, what is counted, in the singular.
    """

    id: str
    text: str
    answer: str
    kind: str
    parents: tuple[str, ...] = ()
    noun: str = ""


class Item(NamedTuple):
    """A prompt with its questions. id: the file's, or the row's number from 0."""

    prompt: str
    questions: tuple[Question, ...]
    id: str


def load_questions(path: str | Path, form: str) -> list[Item]:
    """The prompts of a file with their questions, in the file's order.

    form: one of FORMS.
    - `dsg`: the CSV of DSG-1k (Cho et al., arXiv 2310.18235), also of DPG-Bench: one question a row, with the columns
      item_id, text, proposition_id, dependency, category_broad and question_natural_language; `dependency` holds ids of
      the same item's questions with commas between them, or 0. All answers are yes. A question that depends on itself
      does so on nothing: the published file has such rows.
    - `geneval2`: the JSON lines of GenEval 2 (arXiv 2512.16853): prompt, vqa_list of [question, answer], skills.
    - `gecko`: the prompts.csv of Gecko (Wiles et al., arXiv 2404.16820), of which the rows of att/count are read, or of
      GeckoNum (Kajic et al., arXiv 2406.14774; it has a column `entities`), of which the rows of exact numbers are
      read. The question is GeckoNum's: "How many <noun> are in the image?". Prompts that ask for more than 5 of a kind
      are left out, as the greedy-growing paper does.

    Raises UserError, with the line, if the file cannot be read or is not of the form.
    """
    if form not in FORMS:
        raise UserError(f"questions: got form {form!r}, expected one of {', '.join(FORMS)}; name the file's form")
    path = Path(path)
    with reading(path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; expected a text file; save it as UTF-8") from error
    items = FORMS[form](path, text)
    if not items:
        raise UserError(f"{path}: got no questions, expected at least one of form {form}; check the file and its form")
    return items


def _rows(path: Path, text: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV with a header, each with its place in the file; every one of `columns` is there and filled."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        got = reader.fieldnames or []
        if missing := [c for c in columns if c not in got]:
            raise UserError(
                f"{path}: no column {', '.join(missing)}; got {', '.join(got) or 'an empty file'}; expected "
                f"{', '.join(columns)} in the first line; check the file and its form"
            )
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            values = {c: (row[c] or "").strip() for c in columns}
            if empty := [c for c in columns if not values[c]]:
                raise UserError(f"{place}: nothing in column {', '.join(empty)}; expected text; correct the line")
            yield place, values
    except csv.Error as error:
        raise UserError(f"{path}, after line {reader.line_num}: not CSV ({error}); correct the line") from error


# --- DSG --------------------------------------------------------------------------------------------------------------

_DSG = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")


def _dsg(path: Path, text: str) -> list[Item]:
    prompts: dict[str, str] = {}
    questions: dict[str, dict[str, Question]] = {}
    places: dict[tuple[str, str], str] = {}
    for place, row in _rows(path, text, _DSG):
        item, prompt, name, dependency, kind, asked = (row[c] for c in _DSG)
        if prompts.setdefault(item, prompt) != prompt:
            raise UserError(
                f"{place}: item_id {item!r} has another text than above; expected one text an item; correct the line"
            )
        mine = questions.setdefault(item, {})
        if name in mine:
            raise UserError(
                f"{place}: proposition_id {name} of {item!r} is there already; expected one line for each; correct it"
            )
        parents = dict.fromkeys(p.strip() for p in dependency.split(","))
        mine[name] = Question(name, asked, "yes", kind, tuple(p for p in parents if p not in ("0", "", name)))
        places[item, name] = place
    for item, mine in questions.items():
        for question in mine.values():
            if unknown := [p for p in question.parents if p not in mine]:
                raise UserError(
                    f"{places[item, question.id]}: question {question.id} of {item!r} depends on {unknown[0]}, which "
                    f"is no proposition_id of the item; expected some of {', '.join(mine)}, or 0; correct the line"
                )
        if cycle := _cycle(mine):
            raise UserError(
                f"{places[item, cycle[0]]}: questions {' -> '.join(cycle)} of {item!r} depend on each other in a "
                "circle; expected parents first; correct the column dependency"
            )
    return [Item(prompt, tuple(questions[item].values()), item) for item, prompt in prompts.items()]


def _cycle(questions: dict[str, Question]) -> list[str]:
    """A circle of dependencies, its first question again at its end; empty if there is none."""
    done: set[str] = set()
    for start in questions:
        path = [start]  # from a question to a parent, to its parent, ...
        left = [list(questions[start].parents)]
        while path:
            if path[-1] in done or not left[-1]:
                done.add(path.pop())
                left.pop()
            elif (parent := left[-1].pop()) in path:
                return [*path[path.index(parent) :], parent]
            else:
                path.append(parent)
                left.append(list(questions[parent].parents))
    return []


# --- GenEval 2 --------------------------------------------------------------------------------------------------------


def _geneval2(path: Path, text: str) -> list[Item]:
    items: list[Item] = []
    for i, line in enumerate(text.split("\n"), 1):  # JSON may hold other ends of lines
        if line.strip():
            items.append(_geneval2_item(f"{path}, line {i}", line, str(len(items))))
    return items


def _geneval2_item(place: str, line: str, name: str) -> Item:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); expected one prompt a line; correct the line") from error
    prompt = values.get("prompt") if isinstance(values, dict) else None
    pairs, skills = (values.get(k) if isinstance(values, dict) else None for k in ("vqa_list", "skills"))
    if not (isinstance(prompt, str) and prompt.strip() and isinstance(pairs, list) and pairs):
        raise UserError(f"{place}: no prompt or no vqa_list; expected both, and skills; check the file and its form")
    if not (isinstance(skills, list) and len(skills) == len(pairs) and all(isinstance(s, str) for s in skills)):
        raise UserError(f"{place}: skills do not match the {len(pairs)} questions of vqa_list; expected one for each")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)):
            raise UserError(
                f"{place}: vqa_list holds {json.dumps(pair)}; expected [question, answer]; correct the line"
            )
    return Item(
        prompt,
        tuple(Question(str(n), q, a, kind) for n, ((q, a), kind) in enumerate(zip(pairs, skills, strict=True), 1)),
        name,
    )


# --- Gecko and GeckoNum -----------------------------------------------------------------------------------------------

_GECKO = ("prompt", "dataset_id", "prompt_id")
_GECKONUM = ("prompt", "dataset_id", "entities", "prompt_type")
_EXACT = (  # GeckoNum's first task, exact numbers
    *("numeric_simple", "numeric_sentence", "2-additive", "3-additive"),
    *("attribute-color", "2-additive-color", "attribute-spatial"),
)
_PART = re.compile(rf"(\d+|{'|'.join(NUMBERS)}) (\D+)", re.IGNORECASE)  # "4 baobabs"


def _gecko(path: Path, text: str) -> list[Item]:
    entities = "entities" in text.partition("\n")[0]
    items = []
    for place, row in _rows(path, text, _GECKONUM if entities else _GECKO):
        if entities:
            exact, kind = row["prompt_type"] in _EXACT, row["prompt_type"]
            counts = _entities(place, row["entities"]) if exact else {}
        else:
            task, _, kind = row["dataset_id"].partition(":")
            counts = _counted(row["prompt"]) if task == "att/count" else {}
        if counts and max(counts.values()) <= MOST:
            asked = (
                Question(str(n), f"How many {plural(noun)} are in the image?", str(count), kind, (), noun)
                for n, (noun, count) in enumerate(counts.items(), 1)
            )
            items.append(Item(row["prompt"], tuple(asked), row["dataset_id" if entities else "prompt_id"]))
    return items


def _entities(place: str, cell: str) -> dict[str, int]:
    """What GeckoNum's "cat:3, manatee:1" counts."""
    counts: dict[str, int] = {}
    for part in cell.split(","):
        noun, _, count = part.strip().partition(":")
        if not noun or not count.isdecimal() or not int(count):
            raise UserError(
                f"{place}: entities {cell!r}; expected noun:number, with commas between them; correct the line"
            )
        counts[noun] = counts.get(noun, 0) + int(count)
    return counts


def _counted(prompt: str) -> dict[str, int]:
    """What a prompt like Gecko's "five burgers, 2 flies and one bonsai." counts; nothing if it is no such list."""
    counts: dict[str, int] = {}
    for part in re.split(r", (?:and )?| and ", prompt.strip().rstrip(".")):
        match = _PART.fullmatch(part)
        if match is None:
            return {}
        count = number(match[1]) or 0
        noun = singular(match[2]) if count > 1 else match[2]
        counts[noun] = counts.get(noun, 0) + count
    return counts


FORMS: dict[str, Callable[[Path, str], list[Item]]] = {"dsg": _dsg, "geneval2": _geneval2, "gecko": _gecko}
