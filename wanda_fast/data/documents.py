"""Rows to documents: the column that holds text, chats through the tokenizer's template, half surrogates."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Columns that hold text, or chats; the first one found is read.
TEXT_COLUMNS = ("text", "sentence", "content", "messages", "conversations")
# Keys of a message; ShareGPT's, and its speakers with the roles of templates.
ROLE_CONTENT, FROM_VALUE = ("role", "content"), ("from", "value")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
SPEAKERS |= {role: role for role in ("user", "assistant", "system", "tool")}
HALF_SURROGATE = re.compile("[\ud800-\udfff]")
# Names of columns in a message: no more than these, since keys may be data.
SHOWN_COLUMNS, SHOWN_CHARACTERS = 8, 30
LONGEST_REASON = 400


@dataclass
class Text:
    """One text, or many documents.

    Attributes:
        label: its name in reports and messages.
        special_tokens: whether the tokenizer adds its special tokens; chats have them from the template.
        notes: one sentence for each thing that was skipped or replaced.
    """

    label: str
    documents: list[str]
    special_tokens: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def is_one(self) -> bool:
        return len(self.documents) == 1

    def joined(self) -> "Text":
        """The documents as one, with an empty line between them."""
        return Text(self.label, ["\n\n".join(self.documents)], self.special_tokens, self.notes)

    def add_rows(self, rows: list[object], source: str, text_column: str | None, tokenizer: object) -> None:
        """Append the documents of `rows`: strings, chats, or mappings that hold one in a column.

        Raises: `ValueError` if a row holds something else, or if no row holds text.
        """
        column, values = _values(rows, text_column)
        filled = [(number, value) for number, value in enumerate(values, start=1) if value is not None]
        if not filled:
            raise ValueError("it holds no text")
        if skipped := len(values) - len(filled):
            self.notes.append(f"{source}: {skipped} of {len(values)} rows hold no {column or 'text'}")
        documents = [self._document(value, number, column, tokenizer) for number, value in filled]
        replaced = [_without_half_surrogates(document) for document in documents]
        self.documents += [document for document, _ in replaced]
        if count := sum(count for _, count in replaced):
            self.notes.append(f"{source}: half surrogates replaced by U+FFFD: {count}")

    def _document(self, value: object, number: int, column: str | None, tokenizer: object) -> str:
        if isinstance(value, str):
            return value
        where = f"row {number}" + (f"'s {column}" if column else "")
        if not is_chat(value):
            raise ValueError(f"{where} is of type {type(value).__name__}, neither text nor a chat")
        self.special_tokens = False
        return _rendered(value, where, tokenizer)


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages, each with role and content, or each with from and value."""
    return _has_messages(value, ROLE_CONTENT) or _has_messages(value, FROM_VALUE)


def _has_messages(value: object, keys: tuple[str, str]) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and message.keys() >= set(keys) for message in value)
    )


def find_column(names: list[str], text_column: str | None) -> str:
    """The column that holds text: `text_column`, or the first of TEXT_COLUMNS.

    Raises: `ValueError` if it is absent.
    """
    wanted = (text_column,) if text_column else TEXT_COLUMNS
    found = next((name for name in wanted if name in names), None)
    if found is None:
        shown = [str(name)[:SHOWN_CHARACTERS] for name in names[:SHOWN_COLUMNS]]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        raise ValueError(
            f"its columns {shown}{more} hold none of {', '.join(wanted)}: name one with --text_column"
        )
    return found


def _values(rows: list[object], text_column: str | None) -> tuple[str | None, list[object]]:
    """The column of text, if the rows are mappings, and its values; else the rows."""
    objects = [row for row in rows if isinstance(row, Mapping)]
    if not objects:
        return None, rows
    if len(objects) < len(rows):
        odd = next(number for number, row in enumerate(rows, 1) if not isinstance(row, Mapping))
        raise ValueError(f"row {odd} is of type {type(rows[odd - 1]).__name__}, other rows have columns")
    column = find_column(list(dict.fromkeys(name for row in objects for name in row)), text_column)
    return column, [row.get(column) for row in objects]


def _rendered(chat: list, where: str, tokenizer: object) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} is a chat, and the tokenizer has no chat template: name a column of text with "
            f"--text_column"
        )
    if not _has_messages(chat, ROLE_CONTENT):
        chat = [_with_role(message, f"{where}: message {number}") for number, message in enumerate(chat, 1)]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{where} does not fit the tokenizer's chat template: {reason(error)}") from error


def _with_role(message: Mapping, where: str) -> dict[str, str]:
    """A message of ShareGPT's form in that of chat templates."""
    speaker, value = message["from"], message["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"{where} is from none of {', '.join(SPEAKERS)}")
    if not isinstance(value, str):
        raise ValueError(f"{where} has a value of type {type(value).__name__}, not text")
    return {"role": SPEAKERS[speaker], "content": value}


def _without_half_surrogates(text: str) -> tuple[str, int]:
    """The text with U+FFFD in place of each half surrogate, and their number. No tokenizer takes them."""
    try:
        text.encode()  # far faster than a search, and nearly all text passes
        return text, 0
    except UnicodeEncodeError:
        return HALF_SURROGATE.subn("\ufffd", text)


def reason(error: Exception) -> str:
    """The first line of an error's message, cut, or its type: a message may quote what it could not read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LONGEST_REASON] if lines else type(error).__name__
