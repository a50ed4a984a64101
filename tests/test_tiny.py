from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.errors import SettingError, UnknownFamily
from pilotfish.models import FAMILIES, identify, tiny_model, tiny_pair, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.text())
def test_the_tiny_tokenizer_gives_every_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_the_tiny_tokenizer_merges_words_splits_emoji_and_has_a_chat_template() -> None:
    assert TOKENIZER.tokenize("return the") == ["return", "Ġthe"]
    assert len(TOKENIZER.tokenize("💡")) == 4
    chat = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER(chat)["input_ids"][0] == TOKENIZER.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_decides_a_tiny_model_and_the_global_generator_is_left_alone(family: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (tiny_model(family, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert first.config.model_type == family
    assert identify(first, TOKENIZER, "") == identify(again, TOKENIZER, "")
    assert identify(first, TOKENIZER, "").weights != identify(other, TOKENIZER, "").weights
    assert first(torch.arange(12)[None]).logits.shape == (1, 12, len(TOKENIZER))


def test_a_tiny_model_may_have_a_vocabulary_small_enough_to_enumerate() -> None:
    model = tiny_model("llama", seed=0, num_layers=1, hidden=16, vocab_size=4)
    assert model(torch.tensor([[0, 3]])).logits.shape == (1, 2, 4)
    assert model.config.eos_token_id is None


def test_a_tiny_model_refuses_an_unknown_family_and_an_odd_width() -> None:
    with pytest.raises(UnknownFamily, match="known are llama"):
        tiny_model("mamba", seed=0)
    with pytest.raises(SettingError, match="hidden size 20 is not a multiple of 16"):
        tiny_model("llama", seed=0, hidden=20)


def test_the_tiny_draft_agrees_with_its_target_on_some_tokens_and_not_on_others() -> None:
    agreements = []
    for seed in range(4):
        pair = tiny_pair(seed=seed)
        ids = pair.tokenizer("def print the user", return_tensors="pt")["input_ids"]
        text = pair.target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
        assert pair.draft is not None
        agreements.append((pair.draft(text).logits[0, :-1].argmax(-1) == text[0, 1:])[ids.shape[1] - 1 :].double())
    assert 0.3 < torch.cat(agreements).mean() < 0.8
