"""Words of a caption as the Penn Treebank writes them, in lower case and without punctuation.

Caption metrics are defined on such words. The COCO evaluation runs Stanford's Java tokenizer for them; these are the
same rules for English captions: clitics apart (do n't, it 's), abbreviations with their full stop, hyphenated words,
numbers and fractions whole, brackets as -lrb- and -rrb-. `tests/evaluation` compares the two.
"""

from __future__ import annotations

import re

_CLITIC = r"'(?:s|m|d|re|ve|ll)(?![\w'])"
_ABBREVIATION = (
    r"(?:mr|mrs|ms|messrs|drs?|profs?|st|jr|sr|vs|etc|inc|ltd|cos?|corp|bros|mt|ft|ave|blvd|rd|dept|univ|est|fig|al"
    r"|gen|gov|sens?|reps?|pres|hon|rev|lt|col|sgts?|capt|maj|adm|cmdr|nos?(?=\.\ ?\d)|art(?=\.\ ?\d)|pp?(?=\.\ ?\d)"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|sat(?=\.\ ?\d)"
    r"|ph\.d|[a-z](?:\.[a-z])*)\."
)
_TOKEN = re.compile(
    rf"""
    <[/!]?[a-z][^<>]*>                                       # a tag
  | (?:https?://|www\.)[^\s"<>]*[^\s"<>.,;:!?')\]}}]         # an address
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                              # e-mail
  | \d+/\d+(?:-[^\W_]+)+                                      # 1/4-inch
  | [+-]?(?:\d+(?:,\d+)+(?:\.\d+)?|\d+(?:[.:/]\d+)+|\.\d+)(?![\w])
  | (?<![\w])[+-]\d+(?![\w-])
  | '\d0s\b | 'n' | '(?:em|tis|twas|til|cause)(?!\w)
  | (?<![\w]){_ABBREVIATION}(?!\w)
  | y'(?=all\b)
  | n't(?!\w) | {_CLITIC}
  | [^\W_]+?(?=n't(?!\w)) | [^\W_]+?(?='n'[^\W_])
  | [^\W_]+(?:[-/_&.][^\W_]+|'(?!\d|n'|(?:s|m|d|re|ve|ll)(?!\w))[^\W_]+)+(?=n't(?!\w))?
  | [^\W_]+
  | \.{{3}} | [?!]+ | --+ | [^\w\s] | _+
    """,
    re.VERBOSE,
)
_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "d'ye": ("d'", "ye"),
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SAME = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "—": "--", "–": "--"})
_LEFT_OUT = frozenset(["'", '"', "''", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Punctuation that the COCO evaluation does not count; other marks stay words."""


def tokenize(caption: str) -> list[str]:
    """Split a caption into words.

    Args:
        caption: Any text; line breaks are blanks.

    Returns:
        Lower-case words without punctuation.
    """
    words: list[str] = []
    for token in _TOKEN.findall(caption.translate(_SAME).lower()):
        if token in _LEFT_OUT or set(token) == {"-"}:
            continue
        words += _SPLIT.get(token, (_BRACKETS.get(token, token),))
    return words
