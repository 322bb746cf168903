"""Counts whether the documents speak to their reader: python docs/check_prose.py [FILE...]

Three measures of a document's prose stand for its voice: how often it says "you" or "we", how many semicolons it
needs, and how long its median sentence is. They find a page that has lost its reader. Whether a page is clear, a person
has to read.
"""

from __future__ import annotations

import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LEAST_READER, MOST_SEMICOLONS, MOST_SENTENCE = 8.0, 3.0, 18.0
MADE = ("configuration.md",)  # made from the help texts of the code

FENCE = re.compile(r"^[ ]*(```|~~~).*?^[ ]*\1[ ]*$\n?", flags=re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", flags=re.DOTALL)
LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()]*(?:\([^()]*\)[^()]*)*\)")
ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
READER = re.compile(r"\b(?:you|your|yours|yourself|we)\b", flags=re.IGNORECASE)
# a stop, what may close behind it, white space, and what a sentence may begin with
END = re.compile(r"(?<!\bal\.)(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<=[.!?])[\"')\]*_]*\s+(?=[\"'(\[*_]*[A-Z0-9])")


@dataclass(frozen=True)
class Counts:
    """What is counted in the prose of one document."""

    words: int
    reader: int  # "you", "your" or "we"
    semicolons: int
    sentence: float  # words of the median sentence

    @property
    def measures(self) -> list[tuple[str, float, str, float, bool]]:
        """Each measure: its name, its value, the words of its bound, the bound, and whether the value keeps it."""
        thousands = max(self.words, 1) / 1000
        reader, semicolons = self.reader / thousands, self.semicolons / thousands
        return [
            ("you/your/we per 1,000 words", reader, "at least", LEAST_READER, reader >= LEAST_READER),
            ("semicolons per 1,000 words", semicolons, "at most", MOST_SEMICOLONS, semicolons <= MOST_SEMICOLONS),
            ("words of the median sentence", self.sentence, "at most", MOST_SENTENCE, self.sentence <= MOST_SENTENCE),
        ]


def blocks(markdown: str) -> list[str]:
    """The paragraphs and list items of a document, without code, tables, headings and the targets of links.

    Inline code counts as one word, which may begin a sentence.
    """
    markdown = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", markdown), flags=re.DOTALL)
    made, inside, indented = [""], 0, False
    for line in markdown.splitlines():
        if not line.strip():
            made, indented = [*made, ""], False
            continue
        item, spaces = ITEM.match(line), len(line) - len(line.lstrip())
        # four spaces behind an empty line are code; within a list item four more than its text has
        indented = indented or (spaces >= inside + 4 and not made[-1])
        if item and not indented:
            inside = item.end()
        elif not spaces:
            inside = 0
        if indented or line.lstrip().startswith(("|", "#")):
            continue
        if item:
            made.append("")
        made[-1] += " " + (line[item.end() :] if item else line.strip())
    return [LINK.sub(r"\1", CODE.sub("Code", block)).strip() for block in made if block]


def count(markdown: str) -> Counts:
    """The counts of a document; a block without a stop at its end is a sentence, too."""
    prose = blocks(markdown)
    lengths = [words for block in prose for sentence in END.split(block) if (words := _words(sentence))]
    text = "\n".join(prose)
    return Counts(
        words=sum(lengths),
        reader=len(READER.findall(text)),
        semicolons=re.sub(r"&#?\w+;", "", text).count(";"),
        sentence=statistics.median(lengths) if lengths else 0.0,
    )


def misses(name: str, counts: Counts) -> list[str]:
    """One line for each measure that is out of its bound."""
    return [
        f"{name}: {measure}: {value:.1f}; expected {words} {bound:g}"
        for measure, value, words, bound, kept in counts.measures
        if not kept
    ]


def main(names: list[str]) -> int:
    """Print the counts of each file, then what is out of bounds; the exit code."""
    pages = [path for path in sorted((REPOSITORY / "docs").glob("**/*.md")) if path.name not in MADE]
    default = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "slurm" / "README.md", *pages]
    missed = []
    for path in [Path(name).resolve() for name in names] or default:
        name = str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)
        counts = count(path.read_text(encoding="utf-8"))
        values = ", ".join(f"{value:.1f} {measure}" for measure, value, *_ in counts.measures)
        print(f"{name}: {counts.words} words, {values}")
        missed += misses(name, counts)
    print("\n".join(missed), file=sys.stderr, end="\n" if missed else "")
    return 1 if missed else 0


def _words(text: str) -> int:
    return sum(any(sign.isalnum() for sign in word) for word in text.split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
