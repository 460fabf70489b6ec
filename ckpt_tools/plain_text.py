"""Text from files, file names and libraries, made harmless for terminals, logs and CI runners.

A name in a checkpoint is somebody else's: it may hold control characters that a terminal obeys, a line that a CI runner
takes for a command, or five megabytes of nothing.
"""

from __future__ import annotations

import re

__all__ = ["LONGEST_NAME", "LONGEST_VALUE", "escape_controls", "harmless", "one_line", "shorten", "shorten_message"]

LONGEST_NAME = 500  # characters of a name in a table or a list
LONGEST_VALUE = 4000  # of a value in JSON, of a message, and of a printed line

# GitHub's runner obeys `::name …::` at the start of a line, behind blanks too, and `##[name …]` anywhere in it
# (TryParseV2 and TryParse of https://github.com/actions/runner, src/Runner.Common/ActionCommand.cs). The agent of Azure
# Pipelines obeys `##vso[…]` anywhere (Command.TryParse of https://github.com/microsoft/azure-pipelines-agent), TeamCity
# `##teamcity[…]`. Each loses its meaning with a blank before its last character.
_COMMAND = re.compile(r"^([ \t]*:)(?=:)|(##\w{0,20})(?=\[)", re.MULTILINE)
_LONG_WORD = re.compile(rf"\S{{{LONGEST_NAME + 1},}}")


def escape_controls(text: str, keep: str = "") -> str:
    """Write every character that is not printable as an escape such as ``\\x1b``, except those in ``keep``.

    Python's ``str.isprintable`` is false for C0 and C1 controls, DEL, bidirectional controls and other format
    characters, separators of lines and paragraphs, blanks other than the ASCII one, and lone surrogates.
    """
    if text.isprintable():  # nearly all texts are
        return text
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1] for character in text
    )


def shorten(text: str, most: int = LONGEST_NAME) -> str:
    """Leave out the middle of a text that has more than ``most`` characters, and say how many were left out."""
    if len(text) <= most:
        return text
    mark = f"…({len(text) - most:,} more characters)…"
    head = max(0, most - len(mark)) // 2
    return f"{text[:head]}{mark}{text[len(text) - head :] if head else ''}"


def one_line(name: object) -> str:
    """A name or value from a file as part of a line: shortened, with escapes for line breaks and all controls."""
    return escape_controls(shorten(str(name)))


def shorten_message(message: str) -> str:
    """A message of bounded size: long names in it are shortened first, so that what is around them can be read."""
    message = shorten(message, 50 * LONGEST_VALUE)
    return shorten(_LONG_WORD.sub(lambda match: shorten(match[0]), message), LONGEST_VALUE)


def harmless(text: str) -> str:
    """Text for a terminal or a CI log: no control characters but line breaks and tabs, no commands, no endless lines.

    The result for the beginning of a text is always the beginning of the result for the whole text. So a stream may
    pass on what it is given piece by piece.
    """
    cut = "\n".join(line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}…" for line in text.split("\n"))
    return _COMMAND.sub(r"\1\2 ", escape_controls(cut, keep="\n\t"))
