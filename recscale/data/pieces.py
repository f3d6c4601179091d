"""Pieces of code sequences, as SentencePiece finds them: codes that occur together often become one piece (2306.08121).

Each code at its place becomes a character, the codes of an item a word, and a word counts as often as its item occurs
in training. Merging the most frequent neighbours first (byte-pair encoding) gives a vocabulary of pieces: popular items
get a piece of their own, rare ones are spelt with pieces that they share. The unigram trainer of the package is no use
here: it looks for its first candidates by bytes, and finds almost none among characters that begin alike.

Needs the package sentencepiece, which only this kind of table does: pip install 'recscale[pieces]'.
"""

import importlib
import io
import itertools
from typing import Any

import numpy as np

FIRST, LAST = 0xF0000, 0x10FFFD  # characters for private use; a few at the end of a plane are none
_PLANE, _PER_PLANE = 0x10000, 0xFFFE
PRECISION = 64  # the vocabulary is sought to this share of the rows


def learn(codes_VQ: np.ndarray, count_V: np.ndarray, rows: int) -> np.ndarray:
    """Pieces 1..rows of every item [num_items + 1, Q], 0 after the last; the same arguments give the same pieces.

    codes_VQ: integers [num_items + 1, Q], row 0 padding (zeros in the result). count_V: [num_items + 1], training
    events of each item, which alone decide what is merged. rows: the pieces that items are spelt with, at most: the
    vocabulary itself is larger, since a piece that only ever stands inside others needs no row. Every code that occurs
    in the catalogue is a piece, so that an item without training events is spelt too. Raises ValueError where rows are
    fewer than those codes, where nothing was counted, and where sentencepiece is missing.
    """
    package = _package()
    words = _words(codes_VQ[1:])
    characters = sorted(set("".join(words)))
    if len(characters) > rows:
        raise ValueError(
            f"table.kind = 'pieces': table.rows = {rows}, but the catalogue's codes have {len(characters)} values "
            "together and each is a piece: expected at least as many rows, or codes with fewer values"
        )
    counts = dict.fromkeys(words, 0)
    for word, count in zip(words, count_V[1:].tolist(), strict=True):
        counts[word] += int(count)
    seen = sorted((word, count) for word, count in counts.items() if count)
    if not seen:
        raise ValueError(
            "table.kind = 'pieces': no item has a training event, so there is nothing to learn pieces from"
        )
    spelt = _spelt(package, seen, characters, list(counts), rows)
    row_of = {piece: row for row, piece in enumerate(sorted(set(itertools.chain.from_iterable(spelt))), 1)}
    ids_of = dict(zip(counts, spelt, strict=True))
    found = np.zeros(codes_VQ.shape, np.min_scalar_type(rows))
    for item, word in enumerate(words, 1):
        found[item, : len(ids_of[word])] = [row_of[piece] for piece in ids_of[word]]
    return found


def _package() -> Any:
    try:
        return importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ValueError(
            f"table.kind = 'pieces' needs the package sentencepiece ({error}): pip install 'recscale[pieces]'"
        ) from None


def _words(codes_VQ: np.ndarray) -> list[str]:
    """One character per code and place, never the same at two places."""
    width = int(codes_VQ.max()) + 1
    number = codes_VQ.astype(np.int64) + width * np.arange(codes_VQ.shape[1])
    point = FIRST + number // _PER_PLANE * _PLANE + number % _PER_PLANE
    if point.max() > LAST:
        raise ValueError(
            f"table.kind = 'pieces': {codes_VQ.shape[1]} codes of {width} values: expected {2 * _PER_PLANE:,} together"
        )
    return ["".join(map(chr, row)) for row in point.tolist()]


def _spelt(
    package: Any, seen: list[tuple[str, int]], characters: list[str], words: list[str], rows: int
) -> list[list[int]]:
    """The pieces of each word in the largest vocabulary of which the words use `rows` pieces at most, by bisection."""
    low, high = rows, 2 * rows
    spelt = _trained(package, seen, characters, rows).encode(words)
    while high - low > max(1, rows // PRECISION):
        size = (low + high) // 2
        tried = _trained(package, seen, characters, size).encode(words)
        if len(set(itertools.chain.from_iterable(tried))) <= rows:
            spelt, low = tried, size
        else:
            high = size
    return spelt


def _trained(package: Any, seen: list[tuple[str, int]], characters: list[str], size: int) -> Any:
    """A processor of at most `size` pieces with ids 1..size; 0 is the unknown one, which no word needs."""
    made = io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{word}\t{count}" for word, count in seen]),
        model_writer=made,
        input_format="tsv",
        model_type="bpe",
        vocab_size=size + 1,
        hard_vocab_limit=False,
        required_chars="".join(characters),
        character_coverage=1.0,
        max_sentencepiece_length=len(seen[0][0]),
        max_sentence_length=4 * len(seen[0][0]) + 64,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_whitespace=False,
        split_by_number=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return package.SentencePieceProcessor(model_proto=made.getvalue())
