"""Merges are learned from the most frequent pairs, and come back from their file."""

from collections import Counter

from data.bpe import count_words, save_ranks, train_bpe
from diffa2_mini.tokenizer import Tokenizer


def test_training_merges_the_most_frequent_pair_counted_over_words():
    ranks = train_bpe(Counter({"ab": 3, "bc": 2, "xbc": 2, "cab": 0}), n_merges=2)
    assert list(ranks)[256:] == [b"bc", b"ab"]  # 4 times, 3 times
    assert Tokenizer(ranks).encode("bcab") == [256, 257]


def test_training_builds_on_its_own_merges_and_ends_when_nothing_is_left():
    ranks = train_bpe(Counter({"aaab": 1}), n_merges=10)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    assert list(ranks.values()) == list(range(259))


def test_ties_go_to_the_smallest_pair():
    assert train_bpe(Counter({"zz": 2, "ba": 2, "bb": 2}), n_merges=1)[b"ba"] == 256


def test_words_cover_the_text_and_the_letter_of_a_choice_is_one():
    text = "Which one?\nA. a dog\nB.  12 cats\n"
    words = count_words(text)
    assert words["A."] == words["B."] == words[" dog"] == words[" 12"] == 1 and words["\n"] == 3
    assert sum(len(word) * n for word, n in words.items()) == len(text)


def test_a_rank_file_comes_back(tmp_path):
    ranks = train_bpe(count_words("the cat the hat"), n_merges=5)
    save_ranks(ranks, tmp_path / "ranks")
    assert Tokenizer.from_ranks(tmp_path / "ranks").merges._mergeable_ranks == ranks
