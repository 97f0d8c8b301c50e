"""Prompts of many lengths: our own, and HumanEval's where a copy of it is at hand."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
#: where larger data may lie; nothing of it is needed
SHARED = Path(os.environ.get("DS_SHARED", REPOSITORY.parent / "shared"))

#: lengths in tokens, block borders of 16 and 32 among them
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 333, 512, 777, 1200, 2000)

CHATS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "What is 7 times 6?",
    "Translate 'good morning' into German.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes in two steps.",
    "Explain what a socket is, briefly. 😀",
    "Was ist die Hauptstadt von Österreich?",
    "Write a haiku about rain.",
    "Count from one to five.",
    "Why is the sky blue?",
)


def long_text() -> str:
    """Enough English for the longest prompt."""
    return (REPOSITORY / "LICENSE").read_text()


def human_eval(count: int) -> list[str]:
    """The first prompts of HumanEval, or none where it is not at hand."""
    path = SHARED / "data" / "prompts" / "HumanEval.jsonl.gz"
    if not path.is_file():
        return []
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["prompt"] for line, _ in zip(lines, range(count), strict=False)]
