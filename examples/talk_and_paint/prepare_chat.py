"""Make `data/` beside this file: the captions of examples/emoji as what a user says to a chat model.

    python examples/talk_and_paint/prepare_chat.py

{train,val}.jsonl    {"image", "text"}: every picture with "Please draw a red heart.", and every third with another
                     sentence that asks for it
{train,val}-words.jsonl    {"text"}: what words should answer, half of it about the same things
small.jsonl          one request for every fourth picture of training: for comparisons
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
EMOJI = HERE.parent / "emoji" / "data" / "emoji"
FIRST = "Please draw {}."
"""Every picture has this one."""
ASKS = (
    "Draw {}.",
    "Can you draw {} for me?",
    "Please paint {}.",
    "I would like a picture of {}.",
    "Show me a picture of {}.",
    "Could you paint {}, please?",
)
OTHER_EVERY = 3
"""One picture of so many has one of these sentences too, in turn."""
QUESTIONS = (
    "What is {}?",
    "Tell me about {}.",
    "Write one sentence about {}.",
    "Where could I see {}?",
    "Write a short poem about {}.",
    "How would you describe {} in words?",
)
OTHERS = (
    "Hello!", "How are you?", "What is your name?", "What is the capital of France?", "Thank you very much.",
    "What is two and two?", "Who wrote Hamlet?", "Why is the sky blue?", "Translate good morning into French.",
    "Give me a recipe for pancakes.", "What should I read next?", "Explain gravity to a child.",
    "List three colours.", "Which is larger, the sun or the moon?", "Write a haiku.", "Tell me a joke.",
    "How do I boil an egg?", "What day comes after Monday?", "Please help me with my homework.",
    "Who was the first person on the moon?", "Good night!", "What can you do?", "Summarise this text.",
    "What is a picture?", "How do people learn to draw?", "Who painted the Mona Lisa?",
)  # fmt: skip
EVERY = 7
"""One question for so many captions."""
SMALL_EVERY = 4
"""Small is one picture of so many."""


def named(caption: str) -> str:
    """A caption as part of a sentence: "red heart" -> "a red heart", "flag: Japan" -> "the flag of Japan"."""
    kind, _, place = caption.partition(": ")
    if kind == "flag" and place:
        return f"the flag of {place}"
    return f"{'an' if caption[0].lower() in 'aeiou' else 'a'} {caption}"


def requests(captions: list[str]) -> list[list[str]]:
    """The sentences for each caption."""
    out = [[FIRST.format(named(c))] for c in captions]
    for i in range(0, len(captions), OTHER_EVERY):
        out[i].append(ASKS[i // OTHER_EVERY % len(ASKS)].format(named(captions[i])))
    return out


def questions(captions: list[str]) -> list[str]:
    """What words should answer."""
    chosen = captions[::EVERY]
    return [QUESTIONS[i % len(QUESTIONS)].format(named(c)) for i, c in enumerate(chosen)]


def write(name: str, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / "data" / name).write_text(text, encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


def main() -> None:
    """Write the five files."""
    (HERE / "data").mkdir(exist_ok=True)
    for split, start in (("train", 0), ("val", 1)):
        lines = (EMOJI / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        captions = [row["text"] for row in rows]
        asked = list(zip(rows, requests(captions), strict=True))
        write(f"{split}.jsonl", [{"image": r["image"], "text": t} for r, texts in asked for t in texts])
        if split == "train":
            small = asked[::SMALL_EVERY]
            write("small.jsonl", [{"image": r["image"], "text": texts[0]} for r, texts in small])
        # Every other one of those that are about nothing in particular is for validation.
        spoken = [*questions(captions), *(OTHERS[start::2] * (10 if split == "train" else 1))]
        write(f"{split}-words.jsonl", [{"text": text} for text in spoken])


if __name__ == "__main__":
    main()
