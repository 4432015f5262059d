"""Trains a tokeniser on the user's own text: WordPiece for encoders, byte-level BPE for models that write, or one
entry an item. The same texts make the same tokeniser, in any order and on any machine."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmo.errors import DataError, SpecError

PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
END, FILL = "<|endoftext|>", "<|pad|>"
LEAST_WORDS = 200
SMALLEST, LARGEST = 512, 16_384  # entries that are chosen by how much text there is
PER_ROOT = 10
# A word, or one character of a script that puts no spaces between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def wordpiece(texts: Sequence[str], size: int | None, *, cased: bool) -> Tokenizer:
    """WordPiece as BERT has it (Devlin et al. 2019), with its five special tokens; accents stay.

    `size` None: by the number of words. Raises DataError for too little text, SpecError for a size it does not give.
    """
    normalizer = normalizers.BertNormalizer(lowercase=not cased, strip_accents=False)
    wanted = size or size_for(texts)
    letters, within = _alphabet((normalizer.normalize_str(text) for text in texts), wanted // 2)
    special = [PAD, UNKNOWN, CLS, SEP, MASK]
    trainer = trainers.WordPieceTrainer(
        vocab_size=wanted,
        # It numbers pieces within words in the order of a hash table, and pairs that are as common by their numbers;
        # and it cuts a large alphabet at random where counts are equal. So it is told both.
        special_tokens=[*special, *within],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece({}, unk_token=UNKNOWN))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    _train(learner, trainer, texts, size)
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, learner.pre_tokenizer
    tokenizer.add_special_tokens(special)
    ids = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ids
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def byte_bpe(texts: Sequence[str], size: int | None) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): no text is unknown to it. Raises as `wordpiece`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size or size_for(texts),
        special_tokens=[AddedToken(token, special=True) for token in (FILL, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _train(tokenizer, trainer, texts, size)
    return tokenizer


def items(sequences: Iterable[str], size: int | None) -> Tokenizer:
    """One entry an item, the commonest first, of sequences with spaces between items. Raises SpecError for a size that
    leaves some of them out, or asks for more than there are."""
    counts = Counter(item for sequence in sequences for item in sequence.split())
    entries = [PAD, UNKNOWN, *sorted(counts.keys() - {PAD, UNKNOWN}, key=lambda item: (-counts[item], item))]
    if size is not None and size != len(entries):
        raise SpecError(
            f"a vocabulary of {size} was asked for, and there are {len(counts)} items",
            hint="leave vocabulary out: each item of the training rows is an entry",
        )
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def size_for(texts: Iterable[str]) -> int:
    """Entries for so much text: ten times the root of its words (vocabularies grow like that: Heaps 1978), in bounds.

    Raises DataError for too little text.
    """
    words = sum(len(_WORD.findall(text)) for text in texts)
    if words < LEAST_WORDS:
        raise DataError(
            f"the training rows hold {words} words, too few to make a tokeniser of (it takes {LEAST_WORDS})",
            hint="give more text, or start from a model that knows the language: model: package:NAME or hf:NAME",
        )
    return min(LARGEST, max(SMALLEST, round(PER_ROOT * math.sqrt(words) / 64) * 64))


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer, texts: Sequence[str], told: int | None) -> None:
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if told is not None and found < told:
        raise SpecError(
            f"a vocabulary of {told} was asked for, and the training rows give no more than {found} entries",
            hint="leave vocabulary out to have it chosen, ask for no more than that, or give more text",
        )


def _alphabet(texts: Iterable[str], room: int) -> tuple[list[str], list[str]]:
    """The commonest characters, and those of them that may stand within a word, as pieces; `room` for both."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    letters: list[str] = []
    within: list[str] = []
    for letter in sorted(counts, key=lambda letter: (-counts[letter], letter)):
        if len(letters) + len(within) >= room:
            break
        if not letter.isspace():
            letters.append(letter)
            within += [f"##{letter}"] if _joins(letter) else []
    return letters, within


def _joins(letter: str) -> bool:
    """Whether BERT's division into words leaves a character together with the one before it."""
    apart = unicodedata.category(letter)[0] == "P" or (letter.isascii() and not letter.isalnum())
    return not apart and not "\u3400" <= letter <= "\u9fff"
