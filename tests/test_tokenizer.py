"""Text to ids and back; what a user types stays text; the audio has its place; a response has its
length."""

from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from diffa2_mini.config import ASSETS, SIZES
from diffa2_mini.errors import UserError
from diffa2_mini.published.tokenizer_json import read_tokenizer_json
from diffa2_mini.tokenizer import SPECIAL_TOKENS, Tokenizer

BYTES = Tokenizer({bytes([b]): b for b in range(256)})
TOY = Tokenizer.from_ranks(ASSETS / "toy.bpe")
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, TOY], ids=["bytes", "toy"])
GOLDEN = Path(__file__).parent / "golden"
STARTS = [0x00, 0x20, 0x370, 0x4E00, 0x1F300]  # control, Latin, Greek, Chinese, emoji


@TOKENIZERS
@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_special_token_typed_by_a_user_stays_text(tokenizer, special):
    text = f"say {special}{special} now"
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())
    assert tokenizer.spell(tokenizer.encode(text)) == text
    typed, plain = (Counter(tokenizer.prompt(text, text).ids) for text in (special, "hello"))
    assert all(typed[i] == plain[i] for i in tokenizer.special.values())
    assert tokenizer.response(special, 16).count(tokenizer.eot_id) == 1


def test_special_tokens_follow_the_ranks_in_order():
    assert [TOY.special[token] for token in SPECIAL_TOKENS] == list(
        range(TOY.vocab_size - 6, TOY.vocab_size))
    assert (TOY.eos_id, TOY.mask_id, TOY.eot_id) == tuple(TOY.vocab_size - i for i in (5, 4, 1))


@TOKENIZERS
def test_it_can_be_sent_to_another_process(tokenizer):
    again = ForkingPickler.loads(ForkingPickler.dumps(tokenizer))
    text = "<audio>. A. 12 one's  snake_case é\n\n日本"
    assert again.prompt("Be kind.", text) == tokenizer.prompt("Be kind.", text)
    assert again.spell(again.encode(text)) == tokenizer.spell(tokenizer.encode(text))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("tokenizer_*.json")),
                         ids=lambda path: path.stem)
def test_one_from_a_tokenizer_json_can_be_sent_to_another_process(path):
    test_it_can_be_sent_to_another_process(read_tokenizer_json(path))


@TOKENIZERS
@pytest.mark.parametrize("start", STARTS)
def test_any_unicode_text_comes_back(tokenizer, start):
    points = np.random.default_rng(start).integers(start, start + 0x60, 200)
    text = "".join(map(chr, points)) + " mixed A. 12 é\n\tend"
    assert tokenizer.spell(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text.strip()


@pytest.mark.parametrize("end", ["eot_id", "eos_id"])
def test_decode_stops_at_the_end_and_shows_masks(end):
    ids = [*TOY.encode("yes"), TOY.mask_id, getattr(TOY, end), *TOY.encode("never read")]
    assert TOY.decode(ids) == "yes░"


def test_the_prompt_is_the_chat_template():
    prompt = TOY.prompt("Be kind.", "Who sings?")
    assert TOY.spell(prompt.ids) == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThis is the audio: <audio>. Who sings?"
        "<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    specials = [TOY.spell([i]) for i in prompt.ids if i in TOY.special.values()]
    turn = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert specials == ["<|startoftext|>", *turn, *turn, *turn[:2]]


@TOKENIZERS
@pytest.mark.parametrize(
    "system", ["", "You are a helpful voice assistant.", "This is the audio: <audio>. A trap."])
@pytest.mark.parametrize("instruction", ["", "What is said?", "This is the audio: again", "日本語"])
def test_the_audio_goes_right_after_this_is_the_audio(tokenizer, system, instruction):
    prompt = tokenizer.prompt(system, instruction)
    before = tokenizer.spell(prompt.ids[:prompt.audio_at])
    after = tokenizer.spell(prompt.ids[prompt.audio_at:])
    assert before.endswith("<|start_header_id|>user<|end_header_id|>\n\nThis is the audio:")
    assert after.startswith(f" <audio>. {instruction}<|eot_id|>")


@pytest.mark.parametrize("n_bytes, multiple, length", [
    (0, 16, 16), (1, 16, 16), (14, 16, 16), (15, 16, 32), (16, 16, 32), (31, 16, 48), (30, 32, 32),
    (31, 32, 64)])
def test_a_response_is_answer_eot_and_at_least_one_eos_up_to_a_multiple(n_bytes, multiple, length):
    ids = BYTES.response("x" * n_bytes, multiple)
    assert len(ids) == length
    assert ids == [ord("x")] * n_bytes + [BYTES.eot_id] + [BYTES.eos_id] * (length - n_bytes - 1)
    assert ids[-1] == BYTES.eos_id


def test_the_shipped_vocabulary_fits_the_toy_model():
    assert TOY.vocab_size == SIZES["toy"][0].llada.vocab_size
    assert len(TOY.encode("This is the audio:")) < len("This is the audio:")  # it has merges


def test_a_missing_rank_file_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="rank file"):
        Tokenizer.from_ranks(tmp_path / "nowhere")
