"""Calibration windows equal the published code's, and are the same for the same seed."""

import json
import random
from pydoc_data.topics import topics

import pytest
import torch

from wanda_fast.data.calibration import calibration_tokens, digest
from wanda_fast.data.evaluation import evaluation_set
from wanda_fast.data.text import calibration_text, evaluation_text


class CharacterTokenizer:
    """One token per character."""

    def __call__(self, text, **_options):
        self.input_ids = torch.tensor([[ord(character) for character in text]])
        return self


TOKENIZER = CharacterTokenizer()


@pytest.fixture
def alphabet(tmp_path):
    file = tmp_path / "alphabet.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    return str(file)


def test_windows_of_one_text_are_drawn_as_published(alphabet):
    ids = torch.tensor([97 + i % 26 for i in range(1000)])
    random.seed(7)
    expected = []
    for _ in range(5):
        i = random.randint(0, 1000 - 64 - 1)
        expected.append(ids[i : i + 64])
    assert torch.equal(calibration_tokens(alphabet, TOKENIZER, 5, 64, seed=7), torch.stack(expected))


def test_windows_of_documents_are_drawn_as_published(tmp_path):
    lengths = [10, 200, 30, 500, 65, 64, 900]
    documents = [chr(97 + i) * length for i, length in enumerate(lengths)]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    random.seed(3)
    expected = []
    for _ in range(6):
        while True:
            i = random.randint(0, len(documents) - 1)
            if len(documents[i]) > 64:
                break
        j = random.randint(0, len(documents[i]) - 64 - 1)
        expected.append(torch.tensor([ord(character) for character in documents[i][j : j + 64]]))
    assert torch.equal(calibration_tokens(str(file), TOKENIZER, 6, 64, seed=3), torch.stack(expected))


def test_documents_that_are_all_short_are_packed_with_a_warning(tmp_path, caplog):
    file = tmp_path / "short.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(100)))
    ids = calibration_tokens(str(file), TOKENIZER, 3, 64, seed=0)
    assert ids.shape == (3, 64) and "packed" in caplog.text


def test_the_seed_changes_the_windows_and_repeats_them(alphabet):
    first, again, other = (calibration_tokens(alphabet, TOKENIZER, 4, 32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and digest(first) == digest(again)
    assert not torch.equal(first, other) and digest(first) != digest(other)
    assert digest(first) != digest(first.view(8, 16))


def test_the_callers_random_state_is_untouched(alphabet):
    random.seed(5)
    expected = random.random()
    random.seed(5)
    calibration_tokens(alphabet, TOKENIZER, 2, 32, seed=0)
    assert random.random() == expected


def test_token_ids_are_used_unchanged():
    ids = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert torch.equal(calibration_tokens(ids, None, 99, 99, seed=0), ids.long())


def test_pydoc_is_split_for_calibration_and_evaluation():
    calibration, evaluation = calibration_text("pydoc").documents[0], evaluation_text("pydoc").documents[0]
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    assert calibration + evaluation == whole
    assert len(calibration) == len(whole) * 4 // 5 and len(whole) > 400_000


def test_a_folder_and_a_parquet_file_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"sentence": ["two", "three"]}), tmp_path / "b.parquet")
    (tmp_path / "a.txt").write_text("one")
    assert calibration_text(str(tmp_path)).documents == ["one", "two", "three"]
    assert calibration_text(str(tmp_path / "b.parquet")).documents == ["two", "three"]
    assert evaluation_text(str(tmp_path)).documents == ["one\n\ntwo\n\nthree"]


def test_evaluation_windows_do_not_overlap_and_name_their_protocol(alphabet):
    evaluation = evaluation_set(alphabet, TOKENIZER, seqlen=300)
    assert torch.equal(evaluation.windows.flatten(), torch.tensor([97 + i % 26 for i in range(900)]))
    assert evaluation.protocol == f"{alphabet}, 3 windows of 300, 900 tokens"
    assert evaluation_set(alphabet, TOKENIZER, seqlen=300, max_windows=2).windows.shape == (2, 300)
