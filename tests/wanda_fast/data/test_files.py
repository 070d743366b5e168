"""Local files of text: formats, compressions, encodings, folders, columns, chats."""

import codecs
import gzip
import json
import logging

import pytest

from wanda_fast.data.files import read_files
from wanda_fast.data.text import calibration_text, evaluation_text
from wanda_fast.errors import CalibrationError, MissingDependencyError

WORDS = ["first word", "second ümlaut", "third line\nof two"]
ROWS = [{"text": text, "url": "u"} for text in WORDS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
SECRET = "the calibration text itself "


class Chats:
    """A tokenizer with a chat template."""

    chat_template = "a template"

    def apply_chat_template(self, chat, tokenize):
        assert not tokenize
        if chat[0]["role"] != "user":
            raise ValueError("roles must begin with user\nmore")
        return "".join(f"<{message['role']}>{message['content']}" for message in chat)


def read(file, content, **options):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return calibration_text(str(file), **options)


FORMATS = {
    "c4-train.00000-of-01024.json": LINES.encode(),
    "c4-train.00000-of-01024.json.gz": gzip.compress(LINES.encode()),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "ROWS.JSONL": LINES.encode(),
    "ROWS.JSON.GZ": gzip.compress(LINES.encode()),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "strings.json": json.dumps(WORDS).encode(),
    "mark.jsonl": codecs.BOM_UTF8 + LINES.encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16be.jsonl": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "utf16.json.gz": gzip.compress(LINES.encode("utf-16")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_in_every_format(name, tmp_path):
    assert read(tmp_path / name, FORMATS[name]).documents == WORDS


@pytest.mark.parametrize("name", ["PLAIN.TXT", "mark.txt", "utf16.raw", "plain.txt.gz"])
def test_the_same_text_in_every_encoding(name, tmp_path):
    encoding = {"mark": "utf-8-sig", "utf16": "utf-16"}.get(name.split(".")[0], "utf-8")
    content = WORDS[1].encode(encoding)
    content = gzip.compress(content) if name.endswith("gz") else content
    assert read(tmp_path / name, content).documents == [WORDS[1]]


def test_one_object_is_one_row(tmp_path):
    assert read(tmp_path / "one.json", json.dumps(ROWS[0], indent=2)).documents == WORDS[:1]


def test_zstandard(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as stream:
        stream.write(LINES.encode())
    assert calibration_text(str(tmp_path / "rows.jsonl.zst")).documents == WORDS


def test_a_package_that_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name in ("rows.jsonl.zst", "rows.parquet"):
        with pytest.raises(MissingDependencyError, match=f"{name} needs pyarrow"):
            read(tmp_path / name, b"")


def test_hidden_files_and_folders_named_like_files_are_passed_over(tmp_path):
    for name in (
        "train.jsonl/part-0.txt",
        "b.TXT",
        "._b.txt",
        ".cache/c.txt",
        "__MACOSX/._d.txt",
        "_SUCCESS",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() if name[0] not in "._" else b"\x00\x05\x16\x07\xff\xb0")
    assert calibration_text(str(tmp_path)).documents == ["b.TXT", "train.jsonl/part-0.txt"]
    assert evaluation_text(str(tmp_path)).documents == ["b.TXT\n\ntrain.jsonl/part-0.txt"]


def test_json_files_that_describe_others_are_passed_over_with_a_note(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text(LINES)
    text = calibration_text(str(tmp_path))
    assert (
        text.documents == WORDS
        and ".json files not read, because it holds other files of text: 1" in text.notes[0]
    )
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "dataset_info.json").write_text(LINES)
    assert calibration_text(str(tmp_path)).documents == WORDS


def test_rows_without_text_are_counted(tmp_path):
    rows = [{"content": "short"}, *ROWS, {"text": None}]
    text = read(tmp_path / "mixed.jsonl", "\n".join(map(json.dumps, rows)))
    assert text.documents == WORDS and text.notes == [f"{text.label}: 2 of 5 rows hold no text"]


def test_a_column_by_name(tmp_path):
    lines = "\n".join(json.dumps({"text": "other", "body": text}) for text in WORDS)
    assert read(tmp_path / "a.jsonl", lines, text_column="body").documents == WORDS
    with pytest.raises(
        CalibrationError, match=r"columns \['text', 'body'\] hold none of bodi: .*--text_column"
    ):
        read(tmp_path / "a.jsonl", lines, text_column="bodi")
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": WORDS, "body": WORDS[::-1]}), tmp_path / "a.parquet")
    assert calibration_text(str(tmp_path / "a.parquet"), text_column="body").documents == WORDS[::-1]


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_arrow_files(form, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [*WORDS, None], "n": [1, 2, 3, 4]})
    with getattr(pyarrow.ipc, form)(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    text = calibration_text(str(tmp_path / "rows.arrow"))
    assert text.documents == WORDS and text.notes == [f"{text.label}: 1 of 4 rows hold no text"]
    content = (tmp_path / "rows.arrow").read_bytes()
    for broken in (content[: len(content) // 2], content[:9], b"", b"ARROW1", b"plain"):
        with pytest.raises(CalibrationError, match=r"rows\.arrow cannot be read: \w+"):
            read(tmp_path / "rows.arrow", broken)


def test_a_dataset_that_was_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [*WORDS, "dropped"]})
    rows.select([2, 0]).save_to_disk(tmp_path / "train")
    data = tmp_path / "train" / "data-00000-of-00001.arrow"
    (tmp_path / "train" / "cache-1234.arrow").write_bytes(data.read_bytes())
    assert calibration_text(str(tmp_path / "train")).documents == [WORDS[2], WORDS[0]]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "all")
    with pytest.raises(CalibrationError, match=r"several splits \(dataset_dict\.json\): name the folder"):
        calibration_text(str(tmp_path / "all"))
    assert calibration_text(str(tmp_path / "all" / "test")).documents == [*WORDS, "dropped"]


def test_half_surrogates_are_replaced_and_counted(tmp_path):
    content = r'{"text": "a \ud83d b \ude00\ud83d"}' + "\n" + r'{"text": "\ud83d\ude00 whole"}'
    text = read(tmp_path / "half.jsonl", content)
    assert text.documents == ["a \ufffd b \ufffd\ufffd", "\U0001f600 whole"]
    assert text.notes == [f"{text.label}: half surrogates replaced by U+FFFD: 3"]


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


@pytest.mark.parametrize("column", ["messages", "turns"])
def test_chats_are_rendered_by_the_tokenizers_template(column, tmp_path):
    lines = json.dumps({"id": 1, column: CHAT})
    wanted = None if column == "messages" else column
    text = read(tmp_path / "chat.jsonl", lines, text_column=wanted, tokenizer=Chats())
    assert text.documents == ["<user>hello<assistant>good day"] and not text.special_tokens
    assert not text.joined().special_tokens


SHAREGPT = [
    {"from": "human", "value": "hello", "weight": None},
    {"from": "gpt", "value": "good day"},
    {"from": "tool", "value": "7"},
    {"from": "user", "value": "so"},
    {"from": "chatgpt", "value": "yes"},
]


def test_chats_of_sharegpt_have_the_templates_roles(tmp_path):
    lines = json.dumps({"id": 1, "conversations": SHAREGPT})
    text = read(tmp_path / "chat.jsonl", lines, tokenizer=Chats())
    assert text.documents == ["<user>hello<assistant>good day<tool>7<user>so<assistant>yes"]
    assert not text.special_tokens
    same = [{"conversations": SHAREGPT}, {"conversations": CHAT}]
    both = read(tmp_path / "both.json", json.dumps(same), tokenizer=Chats())
    assert both.documents == [text.documents[0], "<user>hello<assistant>good day"]


REFUSED = {
    "speaker": (
        {"conversations": [SHAREGPT[0], {"from": SECRET * 9, "value": SECRET}]},
        "row 1's conversations: message 2 is from none of human, gpt, chatgpt, user, assistant, system, tool",
    ),
    "speaker's type": ({"conversations": [{"from": [SECRET], "value": SECRET}]}, "message 1 is from none of"),
    "value": (
        {"conversations": [{"from": "human", "value": [SECRET]}]},
        "row 1's conversations: message 1 has a value of type list, not text",
    ),
    "two forms": ({"conversations": [SHAREGPT[0], CHAT[1]]}, "neither text nor a chat"),
    "first speaker": (
        {"conversations": [{"from": "system", "value": SECRET}]},
        "template: roles must begin with user",
    ),
    "parts": ({"content": [{"type": "text", "text": SECRET * 99}]}, "row 1's content is of type list"),
    "roles": ({"messages": [{"role": "system", "content": SECRET}]}, "template: roles must begin with user"),
    "keys": ({SECRET * 99 + str(i): 1 for i in range(99)}, "and 91 more hold none of text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_message_does_not_print_the_data(name, tmp_path):
    row, said = REFUSED[name]
    with pytest.raises(CalibrationError) as caught:
        read(tmp_path / "rows.jsonl", json.dumps(row), tokenizer=Chats())
    message = str(caught.value).replace(str(tmp_path), "")
    assert said in message and len(message) < 600 and SECRET * 2 not in message and "\n" not in message


def test_text_in_place_of_a_name_is_not_printed():
    with pytest.raises(CalibrationError, match="dataset of 28000 characters is neither wikitext2"):
        calibration_text(SECRET * 1000)


def test_a_chat_without_a_template(tmp_path):
    with pytest.raises(CalibrationError, match="row 1's messages is a chat, and the tokenizer has no chat"):
        read(tmp_path / "chat.jsonl", json.dumps({"messages": CHAT}), tokenizer=object())


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08\x00", gzip.compress(LINES.encode())[:-9], b"plain"],
    ids=["header", "truncated", "plain"],
)
def test_a_broken_archive(content, tmp_path):
    with pytest.raises(CalibrationError, match=r"rows\.jsonl\.gz cannot be read: \w+"):
        read(tmp_path / "rows.jsonl.gz", content)


def test_a_broken_line_is_named_by_its_number(tmp_path):
    with pytest.raises(CalibrationError, match="line 3 is not JSON: Expecting value at column 9"):
        read(tmp_path / "rows.json", LINES[: LINES.index("third") - 1].rstrip())


def test_notes_are_logged(tmp_path, caplog):
    from tests.wanda_fast.data.test_calibration import TOKENIZER
    from wanda_fast.data.calibration import calibration_tokens

    (tmp_path / "half.jsonl").write_text(r'{"text": "a long text with \ud83d in it"}')
    with caplog.at_level(logging.WARNING):
        ids = calibration_tokens(str(tmp_path / "half.jsonl"), TOKENIZER, 2, 8, seed=0)
    assert ids.shape == (2, 8) and "half surrogates replaced by U+FFFD: 1" in caplog.text
    assert read_files(tmp_path, None, None).documents == ["a long text with \ufffd in it"]
