"""Legacy encodings are told apart, and what a file says arrives intact."""

from __future__ import annotations

import pytest

from llmo.data.encoding import detect

TEXTS = [
    ("utf-8", "plain"),
    ("utf-8", "naïve café 中文 😀"),
    ("utf-8-sig", "naïve café"),
    ("utf-16", "naïve café 中文"),
    ("utf-16-le", "text,label with enough plain words to see the pattern"),
    ("utf-32", "naïve"),
    ("cp1252", "The firm paid £100m for it"),
    ("cp1252", "“Hello” – she said"),
    ("cp1252", "Le garçon a mangé des pâtes à la crème près de l'hôtel"),
    ("cp1252", "Die größeren Häuser übertreffen"),
    ("cp1252", "coração não são lições"),
    ("cp1250", "Zażółć gęślą jaźń, wszystko będzie dobrze"),
    ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy"),
    ("cp1251", "Привет, как дела? Сегодня хорошая погода"),
    ("koi8_r", "Привет, как дела? Сегодня хорошая погода"),
    ("cp1253", "Καλημέρα σας, πώς είστε σήμερα;"),
    ("cp1254", "Bugün hava çok güzel, dışarı çıkıp yürüyüş yapacağız şimdi"),
    ("cp1255", "שלום מה שלומך היום"),
    ("cp1256", "مرحبا كيف حالك اليوم"),
    ("cp874", "สวัสดีครับ วันนี้อากาศดีมาก"),
    ("gb18030", "今天的天气非常好，我们决定去公园散步。"),
    ("gb18030", "手机很好用"),
    ("cp950", "今天的天氣非常好，我們決定去公園散步。"),
    ("cp932", "今日はとても天気がいいので、公園に行きましょう。"),
    ("euc_jp", "今日はとても天気がいいので、公園に行きましょう。"),
    ("cp949", "오늘은 날씨가 매우 좋아서 공원에 가기로 했습니다."),
]


@pytest.mark.parametrize(("codec", "text"), TEXTS)
def test_detected(tmp_path, codec, text):
    path = tmp_path / "a"
    path.write_bytes(f"text,label\n{text},a\n".encode(codec))
    found = detect(path, "auto", "a")
    assert path.read_bytes().decode(found.codec, found.errors) == f"text,label\n{text},a\n"


@pytest.mark.parametrize(("codec", "text"), TEXTS)
def test_imported_from_csv_and_from_folders(tmp_path, import_, codec, text):
    (tmp_path / "a.csv").write_bytes(f"text\tlabel\n{text}\ta\nother\tb\n".encode(codec))
    assert text in import_(tmp_path / "a.csv").texts()
    for label, content in (("a", text), ("b", "other")):
        (tmp_path / "d" / label).mkdir(parents=True)
        (tmp_path / "d" / label / "1.txt").write_bytes(content.encode(codec))
    assert text in import_(tmp_path / "d").texts()


def test_a_stray_byte_does_not_turn_a_utf8_file_into_another(tmp_path, import_):
    rows = "".join(f"café numéro {i} à côté,{'ab'[i % 2]}\n" for i in range(40)).encode()
    (tmp_path / "a.csv").write_bytes(b"text,label\n" + rows + b"paid \xa35,a\n")
    got = import_(tmp_path / "a.csv", clean={"drop_duplicates": "none"})
    assert "café numéro 7 à côté" in got.texts()
    assert "paid £5" in got.texts()
    assert got.info["encodings"] == {"utf-8 with stray bytes": 1}


def test_each_file_of_a_folder_has_its_own(tmp_path, import_):
    for label, codec in (("a", "utf-8"), ("b", "latin-1")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.txt").write_bytes(f"{label} £1,400".encode(codec))
    got = import_(tmp_path)
    assert sorted(got.texts()) == ["a £1,400", "b £1,400"]
    assert got.info["encodings"] == {"utf-8": 1, "cp1252": 1}


def test_a_character_across_the_edge_of_a_block(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * ((1 << 20) - 1) + "é".encode() + b"y")
    assert detect(path, "auto", "a").name == "utf-8"
