"""Make text from files, file names and libraries harmless for terminals, logs and CI runners.

Somebody else has chosen the names in a checkpoint. A name may hold control characters that a
terminal obeys, a line that a CI runner takes for a command, or five megabytes of nothing.
"""

from __future__ import annotations

import re

__all__ = [
    "LONGEST_NAME",
    "LONGEST_VALUE",
    "escape_controls",
    "harmless",
    "one_line",
    "shorten",
    "shorten_message",
]

LONGEST_NAME = 500  # characters of a name in a table or a list
LONGEST_VALUE = 4000  # of a value in JSON, of a message, and of a printed line

# GitHub's runner obeys `::name …::` at the start of a line, behind blanks too, and `##[name …]`
# anywhere in it (TryParseV2 and TryParse of https://github.com/actions/runner,
# src/Runner.Common/ActionCommand.cs). The agent of Azure Pipelines obeys `##vso[…]` anywhere
# (Command.TryParse of https://github.com/microsoft/azure-pipelines-agent), TeamCity
# `##teamcity[…]`. Each loses its meaning with a blank before its last character.
_COMMAND = re.compile(r"^([ \t]*:)(?=:)|(##\w{0,20})(?=\[)", re.MULTILINE)
_LONG_WORD = re.compile(rf"\S{{{LONGEST_NAME + 1},}}")


def escape_controls(text: str, keep: str = "") -> str:
    """Write characters that are not printable as escapes such as ``\\x1b``, but those in ``keep``.

    Python's ``str.isprintable`` is false for C0 and C1 controls, DEL, bidirectional controls and
    other format characters, separators of lines and paragraphs, blanks other than the ASCII one,
    and lone surrogates.
    """
    if text.isprintable():  # nearly all texts are
        return text
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1]
        for character in text
    )


def shorten(text: str, limit: int = LONGEST_NAME) -> str:
    """Leave out the middle of a text of more than ``limit`` characters, and say how much that is."""
    if len(text) <= limit:
        return text
    mark = f"…({len(text) - limit:,} more characters)…"
    head = max(0, limit - len(mark)) // 2
    return f"{text[:head]}{mark}{text[len(text) - head :] if head else ''}"


def one_line(name: object) -> str:
    """Shorten a name or value from a file, and escape line breaks and all other controls."""
    return escape_controls(shorten(str(name)))


def shorten_message(message: str) -> str:
    """Bound the size of a message.

    Long words in it are shortened first, so that the text around them can be read.
    """
    # This bounds the work of the next line, which looks at every word.
    message = shorten(message, 50 * LONGEST_VALUE)
    return shorten(_LONG_WORD.sub(lambda match: shorten(match[0]), message), LONGEST_VALUE)


def harmless(text: str) -> str:
    """Make text safe for a terminal or a CI log.

    It keeps no control characters but line breaks and tabs, no commands and no endless lines.

    The result for the beginning of a text is always the beginning of the result for the whole text.
    So a stream may pass text on piece by piece.
    """
    cut = "\n".join(
        line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}…" for line in text.split("\n")
    )
    return _COMMAND.sub(r"\1\2 ", escape_controls(cut, keep="\n\t"))
