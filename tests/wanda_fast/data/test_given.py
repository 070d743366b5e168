"""Calibration data from Python: strings, ids, arrays, datasets, batches, iterables of these."""

import json

import numpy
import pytest
import torch
from transformers import BatchEncoding

import wanda_fast
from tests.tiny_models import FAMILIES
from tests.wanda_fast.data.test_calibration import TOKENIZER, CharacterTokenizer
from wanda_fast.data.calibration import calibration_tokens
from wanda_fast.data.evaluation import evaluation_set
from wanda_fast.errors import CalibrationError

IDS = torch.arange(3, 67).view(4, 16)
TEXTS = ["abcdefgh" * 9, "ijklmnop" * 9, "short"]


def rows(column, values):
    return [{column: value, "url": "u"} for value in values]


IDS_IN_OTHER_FORMS = {
    "lists": IDS.tolist(),
    "numpy": IDS.numpy(),
    "numpy of uint16": IDS.numpy().astype(numpy.uint16),
    "list of tensors": list(IDS),
    "list of arrays": list(IDS.numpy()),
    "batch": BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    "batch of lists": BatchEncoding({"input_ids": IDS.tolist()}),
    "mapping": {"input_ids": IDS, "text": TEXTS},
    "loader": torch.utils.data.DataLoader(IDS, batch_size=3),
    "loader of tuples": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS), batch_size=3),
    "rows": rows("input_ids", IDS.tolist()),
    "batches": [{"input_ids": IDS[:3]}, BatchEncoding({"input_ids": IDS[3:]})],
}


@pytest.mark.parametrize("form", IDS_IN_OTHER_FORMS)
def test_token_ids_in_other_forms(form):
    data = IDS_IN_OTHER_FORMS[form]
    assert torch.equal(calibration_tokens(data, None, 99, 99, seed=0), IDS)
    assert torch.equal(evaluation_set(data, None, 32).windows.flatten(), IDS.flatten())


@pytest.fixture
def expected(tmp_path):
    """Windows of TEXTS as rows of a file."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return calibration_tokens(tmp_path / "texts.jsonl", TOKENIZER, 6, 16, seed=1)


TEXT_IN_OTHER_FORMS = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "numpy": lambda: numpy.array(TEXTS),
    "mapping": lambda: {"text": TEXTS},
    "rows": lambda: rows("sentence", TEXTS),
    "loader": lambda: torch.utils.data.DataLoader(TEXTS, batch_size=2),
    "loader of rows": lambda: torch.utils.data.DataLoader(rows("text", TEXTS), batch_size=2),
}


@pytest.mark.parametrize("form", TEXT_IN_OTHER_FORMS)
def test_text_in_other_forms(form, expected):
    data = TEXT_IN_OTHER_FORMS[form]
    assert torch.equal(calibration_tokens(data(), TOKENIZER, 6, 16, seed=1), expected)
    whole = torch.tensor([ord(character) for character in "\n\n".join(TEXTS)])
    evaluation = evaluation_set(data(), TOKENIZER, 16)
    assert torch.equal(evaluation.windows.flatten(), whole[: len(whole) // 16 * 16])
    assert evaluation.protocol.startswith("from Python, ")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset(streamed, expected):
    Dataset = pytest.importorskip("datasets").Dataset

    def of(columns):
        made = Dataset.from_dict(columns)
        return made.to_iterable_dataset() if streamed else made

    assert torch.equal(calibration_tokens(of({"text": TEXTS}), TOKENIZER, 6, 16, seed=1), expected)
    bodies = of({"text": TEXTS[::-1], "body": TEXTS})
    found = calibration_tokens(bodies, TOKENIZER, 6, 16, seed=1, text_column="body")
    assert torch.equal(found, expected)
    assert torch.equal(calibration_tokens(of({"input_ids": IDS.tolist()}), None, 9, 9, seed=0), IDS)


def test_a_dataset_of_tensors_and_its_splits():
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"input_ids": IDS.tolist(), "attention_mask": torch.ones(4, 16).tolist()}
    )
    assert torch.equal(calibration_tokens(made.with_format("torch"), None, 9, 9, seed=0), IDS)
    splits = datasets.DatasetDict({"train": made, "test": made})
    with pytest.raises(CalibrationError, match="the splits train, test: pass one"):
        calibration_tokens(splits, None, 9, 9, seed=0)


REFUSED = {
    "ragged ids": ([[5, 6, 7], [8, 9]], "rows of one length, got rows of 2 to 3 tokens"),
    "both": ([[5, 6, 7], "text"], "mixes token ids and text"),
    "padding": ({"input_ids": IDS, "attention_mask": (IDS > 9).long()}, "holds 7 padding tokens"),
    "fractions": (IDS.numpy() / 2, "must be integers"),
    "nothing": ([], "it holds no text"),
    "a number": (7, "dataset is of type int"),
    "bytes": (b"text", "dataset is of type bytes"),
    "no column of text": ({"body": TEXTS}, r"its columns \['body'\] hold none of text, sentence"),
    "a row of another kind": ([{"text": TEXTS[0]}, {"text": 7}], "'int'|int"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("read", [calibration_tokens, evaluation_set])
def test_other_data_is_refused_and_not_printed(name, read):
    data, said = REFUSED[name]
    numbers = (4, 16, 0) if read is calibration_tokens else (16,)
    with pytest.raises(CalibrationError, match=said) as caught:
        read(data, TOKENIZER, *numbers)
    assert len(str(caught.value)) < 200 and TEXTS[0] not in str(caught.value)


def test_strings_without_a_tokenizer():
    with pytest.raises(CalibrationError, match="dataset of 3 rows is text: pass a tokenizer"):
        calibration_tokens(TEXTS, None, 4, 16, seed=0)


def test_a_chat_from_python_gets_no_second_special_tokens():
    class Chats(CharacterTokenizer):
        chat_template = "a template"
        given = []

        def apply_chat_template(self, chat, tokenize):
            return "<s>" + chat[0]["content"]

        def __call__(self, text, **options):
            self.given.append((text[:3], options.get("add_special_tokens")))
            return super().__call__(text, **options)

    chats = [[{"role": "user", "content": text}] for text in TEXTS[:2]]
    for data in (chats, rows("messages", chats), {"messages": chats}):
        calibration_tokens(data, Chats(), 2, 16, seed=0)
        evaluation_set(data, Chats(), 16)
    assert set(Chats.given) == {("<s>", False)}


def test_a_document_is_tokenised_once(tmp_path):
    class Counting(CharacterTokenizer):
        texts = []

        def __call__(self, text, **options):
            self.texts.append(text)
            return super().__call__(text, **options)

    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    calibration_tokens(str(tmp_path), Counting(), 50, 16, seed=0)
    assert sorted(Counting.texts) == sorted(TEXTS)


def test_prune_takes_what_calibration_takes_and_its_report_names_it():
    model, numbers = FAMILIES["llama2"](), iter(IDS)
    report = wanda_fast.prune(model, dataset=IDS.tolist(), eval_dataset=numbers, seqlen=16)
    assert report.recipe["dataset"] == "list of 4" and "iterator" in report.recipe["eval_dataset"]
    assert report.calibration["shape"] == [4, 16]


def test_the_report_counts_half_surrogates():
    class Small(CharacterTokenizer):
        def __call__(self, text, **options):
            ids = super().__call__(text, **options).input_ids
            return BatchEncoding({"input_ids": ids.clamp(max=319)})

    words = dict(tokenizer=Small(), seqlen=16, nsamples=2)
    report = wanda_fast.prune(FAMILIES["llama2"](), dataset=["half \ud83d" * 9], **words)
    assert report.recipe["dataset"] == "list of 1"
    assert report.warnings == ["dataset: half surrogates replaced by U+FFFD: 9"]
