"""Mistakes in a command line, which typer finds, in one line of the house's form: where, what is wrong, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pixelgrow.errors import UserError


def is_usage_error(error: Exception) -> bool:
    """Whether it is one of typer's, or of the click that older ones of typer stand on: they share no class."""
    return hasattr(error, "format_message") and hasattr(error, "ctx")


def in_one_line(error: Any, words: Sequence[str]) -> str:
    """The mistake that a usage error stands for, and what to do; `words`: the command line."""
    path = error.ctx.command_path.split()[1:] if error.ctx else list(words[:1])
    where = f"{' '.join(path)}: " if path else ""
    help_ = f"see {' '.join(['pixelgrow', *path])} --help"
    message = str(error.message).rstrip(".")
    if option := getattr(error, "option_name", ""):
        if hasattr(error, "possibilities"):
            near = " or ".join(error.possibilities or [])
            return f"{where}there is no option {option}; " + (f"did you mean {near}?" if near else help_)
        return f"{where}{option} {message.partition(' ')[2].partition(' ')[2]}; {help_}"
    if parameter := getattr(error, "param", None):
        name = " / ".join(parameter.opts) if parameter.param_type_name == "option" else str(parameter.name).upper()
        if not message:
            said = (getattr(parameter, "help", None) or "").rstrip(".")
            return f"{where}{name} is missing{said and f' ({said})'}; {help_}"
        return f"{where}{name}: {message[0].lower()}{message[1:]}; {help_}"
    verbs = sorted(getattr(error.ctx.command, "commands", {})) if error.ctx else []
    if verbs and (unknown := re.match(r"No such command '(.*?)'", message)):
        near = " or ".join(get_close_matches(unknown[1], verbs))
        return f"{where}there is no verb {unknown[1]!r}; " + (f"did you mean {near}?" if near else _one_of(verbs))
    if verbs and message.startswith("Missing command"):
        return f"{where}a verb is missing; {_one_of(verbs)}"
    if extra := re.match(r"Got unexpected extra argument\S* \((.*)\)$", message):
        return f"{where}unexpected {extra[1]!r}; put text of several words in quotes, or {help_}"
    return f"{where}{message[0].lower()}{message[1:]}; {help_}"


def check_filled(words: Sequence[str]) -> None:
    """UserError for a word of the command line that is empty, as a variable of the shell that is not set leaves it.

    Prompts may be empty.
    """
    prompts = ("--prompt", "--from", "--to")
    for number, word in enumerate(words):
        option = words[number - 1] if number and words[number - 1].startswith("-") else ""
        if word.startswith("--") and word.endswith("="):
            option, word = word[:-1], ""
        prompt = option in prompts or (words[0] == "sample" and number > 1 and not option)
        if not word and not prompt:
            raise UserError(
                f"{words[0]}: {option or f'argument {number}'} is empty: expected a value; is a variable not set?"
            )


def _one_of(verbs: list[str]) -> str:
    return f"expected one of {', '.join(verbs)}"
