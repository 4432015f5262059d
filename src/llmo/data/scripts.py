"""Scores how well bytes read as text in each legacy encoding, by the letters that its languages use most."""

from __future__ import annotations

import codecs
import re

_SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家"
    "种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实，。、“”！？：；（）日月新市"
)
_TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家"
    "種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實，。、「」！？：；（）日月新市"
)
_KANA = "".join(map(chr, range(0x3041, 0x3097))) + "".join(map(chr, range(0x30A1, 0x30FB))) + "ー、。「」"
_HANGUL = (
    "이다는의에가을를은한하고도로지어기사그자서아시나리인대니라으해있수면들일정전보제부원게과상동었습요주여스국만안것장"
    "우구공소조화경세성신유생문관학비민"
)
_CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфёїієґ"
_WESTERN = "éèêëàâáäãåæçñóòôöõøùûúüßíìîïýœÉÈÀÁÂÄÖÜÅÆØÇÑÓÚ£€–—‘’“”•…°§«»©®™½¿¡ªº´·\xa0"
_CENTRAL = "ąćęłńóśźżáčďéěíňřšťúůýžőűöüäăâîşţôĺľŕĄĆĘŁŃŚŹŻČĎĚŇŘŠŤŮŽŐŰÁÉÍÓÖÜ–—„”“’…§«»\xa0"
_TURKISH = "ıİşŞğĞçÇöÖüÜâîû–—‘’“”…\xa0"
_LETTERS = {
    # Ties go to the first: isolated accents are Western unless another encoding explains them better.
    "cp1252": _WESTERN,
    "cp1250": _CENTRAL,
    "cp1254": _TURKISH,
    "cp1251": _CYRILLIC,
    "koi8_r": _CYRILLIC,
    "cp866": _CYRILLIC,
    "cp1253": "αοιετσνηυρπκμλςωάέίόήύώδγχθβφξζψ",
    "cp1255": "יוהלאתרמבשנעםדחקפגצטזכןסךףץ",
    "cp1256": "اليمنوترببعدفسحكقهةشجصأإضطخغزثذىئءؤآظ،",
    "cp874": "านรอกเงมยลวดทสตะปบคหแจพชขใไโผธถซณพศษ่้ีิัุูำ์ึื็",
    "gb18030": _SIMPLIFIED,
    "cp950": _TRADITIONAL,
    "cp932": _KANA,
    "euc_jp": _KANA,
    "cp949": _HANGUL,
}
_SETS = {codec: frozenset(letters) for codec, letters in _LETTERS.items()}
_COMMONEST = {codec: frozenset(letters[:10]) for codec, letters in _LETTERS.items()}
_LATIN = ("cp1252", "cp1250", "cp1254")
_MULTIBYTE = ("gb18030", "cp950", "cp932", "euc_jp", "cp949")
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_APOSTROPHES = "’‘´·"


def ranked(sample: bytes) -> list[tuple[str, float]]:
    """Codecs that can read the sample, best first, each with a score from 0 to 1; above 0.5 is convincing."""
    scores = []
    for codec in _LETTERS:
        text = _text(sample, codec)
        if text is not None:
            scores.append((codec, _score(text, codec)))
    return sorted(scores, key=lambda pair: -pair[1])


def _text(sample: bytes, codec: str) -> str | None:
    errors = "replace" if codec == "cp1252" else "strict"  # five bytes are undefined in it, and common files have them
    try:
        return codecs.getincrementaldecoder(codec)(errors).decode(sample)  # the sample may end within a character
    except UnicodeDecodeError:
        return None


def _score(text: str, codec: str) -> float:
    frequent = _SETS[codec]
    places = [m.start() for m in _FOREIGN.finditer(text)]
    if not places:
        return 0.0
    if codec in _LATIN:
        return sum(_latin_weight(text, at, frequent) for at in places) / len(places)
    if codec in _MULTIBYTE:
        # The hundred commonest characters make up two fifths of East Asian text, and of noise next to nothing.
        return min(1.0, 4 * sum(text[at] in frequent for at in places) / len(places))
    common = _COMMONEST[codec]
    return sum(_weight(text, at, frequent, common) for at in places) / len(places)


def _weight(text: str, at: int, frequent: frozenset[str], common: frozenset[str]) -> float:
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if any(c.isascii() and c.isalpha() for c in (before, after)):
        return 0.0  # no language writes half a word in Latin letters
    return 1.0 if text[at] in common else 0.6 if text[at] in frequent else 0.0


def _latin_weight(text: str, at: int, frequent: frozenset[str]) -> float:
    char = text[at]
    if char not in frequent:
        return 0.0
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if not char.isalpha() and char not in _APOSTROPHES and before.isalpha() and after.isalpha():
        return 0.0  # a sign inside a word is a letter of another encoding
    beside = sum(c.isalpha() and not c.isascii() for c in (before, after))
    return (1.0, 0.8, 0.2)[beside] if char.isalpha() else 1.0
