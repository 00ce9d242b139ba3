"""Build the corpus of the embedded base model: simple English prose from public-domain books.

    python scripts/corpus.py --books DIR --out corpus/

``DIR`` holds ``*.jsonl.gz`` files of books, one object per line with ``author``, ``title``, ``text`` and ``year``;
``heldout.jsonl.gz`` is kept separate and never trained on. A *text* is one paragraph: quotes and dashes mapped to
ASCII, white space folded, short neighbours (dialogue) joined by a line break until they have 100 characters. A text
is kept if it is ASCII, 60 to 1,200 characters long, and at least ``--share`` of its words are among the
``--common`` most common words of the training books. Exact duplicates are dropped.

Writes ``train.jsonl`` (the texts), ``heldout.jsonl`` (every heldout paragraph of 100-400 ASCII characters, not
filtered by vocabulary: the benchmark), ``tokenizer.json`` and ``corpus.json`` (what was kept of each book).
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TO_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-", "\u2026": "..."}
)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
JOIN_BELOW = 100
MIN_CHARS, MAX_CHARS = 60, 1200


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def paragraphs(text: str) -> Iterator[str]:
    """White-space-folded paragraphs; headings (lines that start with #) end a run of joined neighbours."""
    for block in re.split(r"\n\s*\n", text.translate(TO_ASCII)):
        yield " ".join(block.split())


def texts(book: str) -> Iterator[str]:
    pending: list[str] = []
    for paragraph in paragraphs(book):
        usable = paragraph and paragraph.isascii() and not paragraph.startswith("#")
        if not usable:
            pending.clear()
            continue
        pending.append(paragraph)
        if sum(map(len, pending)) >= JOIN_BELOW:
            yield "\n".join(pending)
            pending.clear()


def read_books(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def train_tokenizer(corpus: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write_texts(path: Path, rows: list[str]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps({"text": row}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--common", type=int, default=12_000)
    parser.add_argument("--share", type=float, default=0.93)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    training_files = sorted(p for p in args.books.glob("*.jsonl.gz") if not p.name.startswith("heldout"))
    books = [book for path in training_files for book in read_books(path)]
    by_book = [[t for t in texts(book["text"]) if MIN_CHARS <= len(t) <= MAX_CHARS] for book in books]
    counts = collections.Counter(word for rows in by_book for row in rows for word in words(row))
    common = {word for word, _ in counts.most_common(args.common)}

    seen: set[str] = set()
    kept: list[str] = []
    manifest = []
    for book, rows in zip(books, by_book, strict=True):
        before = len(kept)
        for row in rows:
            row_words = words(row)
            simple = row_words and sum(w in common for w in row_words) >= args.share * len(row_words)
            if simple and row not in seen:
                seen.add(row)
                kept.append(row)
        manifest.append(
            {"author": book["author"], "title": book["title"], "year": book["year"], "texts": len(kept) - before}
        )

    heldout = [
        p
        for book in read_books(args.books / "heldout.jsonl.gz")
        for p in paragraphs(book["text"])
        if p.isascii() and 100 <= len(p) <= 400
    ]
    write_texts(args.out / "train.jsonl", kept)
    write_texts(args.out / "heldout.jsonl", heldout)
    train_tokenizer(kept, args.vocab_size).save(str(args.out / "tokenizer.json"))
    totals = {
        "books": len(books),
        "texts": len(kept),
        "characters": sum(map(len, kept)),
        "common_words": args.common,
        "share": args.share,
        "heldout_texts": len(heldout),
        "heldout_characters": sum(map(len, heldout)),
    }
    (args.out / "corpus.json").write_text(json.dumps({**totals, "by_book": manifest}, indent=1))
    print(json.dumps(totals))


if __name__ == "__main__":
    main()
