import pytest
from conftest import SAMPLE, run_script
from transformers import AutoTokenizer

from lmscripts.errors import UserError
from lmscripts.pretraining import check_tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "character"])
def test_type_of_a_fast_tokenizer_is_seen(kind, tmp_path):
    arguments = ["--input_file", SAMPLE / "english.txt", "--model_dir", tmp_path / "tokenizer", "--vocab_size", "600"]
    run_script("train_tokenizer.py", *arguments, "--word_tokenizer", "whitespace", "--tokenizer_type", kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    check_tokenizer(tokenizer, tokenizer_type=kind, mecab_dic=None)
    with pytest.raises(UserError, match=f"bpe.*{kind}"):
        check_tokenizer(tokenizer, tokenizer_type="bpe", mecab_dic=None)
    with pytest.raises(UserError, match="ipadic"):
        check_tokenizer(tokenizer, tokenizer_type=kind, mecab_dic="ipadic")


def test_type_of_a_japanese_tokenizer_is_seen(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    check_tokenizer(tokenizer, tokenizer_type="wordpiece", mecab_dic="ipadic")
    with pytest.raises(UserError, match=r"unigram.*wordpiece"):
        check_tokenizer(tokenizer, tokenizer_type="unigram", mecab_dic=None)
