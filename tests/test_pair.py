from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilotfish.errors import PairMismatch, SettingError, UnknownFamily, WeightsError
from pilotfish.models import Pair, identify, load_model, load_pair, tiny_model, tiny_pair, tiny_tokenizer


def saved(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_pair_comes_back_from_its_folders_with_the_same_identities(tmp_path: Path) -> None:
    pair = tiny_pair(seed=0)
    assert pair.draft is not None
    assert pair.draft_identity is not None
    target = saved(tmp_path / "target", pair.target, pair.tokenizer)
    draft = saved(tmp_path / "draft", pair.draft, pair.tokenizer)
    loaded = load_pair(target, draft=draft, device="cpu", dtype="float32")
    assert replace(loaded.target_identity, name="") == replace(pair.target_identity, name="")
    assert loaded.draft_identity == replace(pair.draft_identity, name=draft)
    assert loaded.reader_identity == loaded.draft_identity
    ids = torch.arange(9)[None]
    assert torch.equal(loaded.target(ids).logits, pair.target(ids).logits)
    assert not loaded.target.training


def test_a_target_without_a_draft_is_its_own_reader(tmp_path: Path) -> None:
    pair = load_pair(saved(tmp_path, tiny_model("gpt2", seed=0), tiny_tokenizer()), device="cpu")
    assert pair.draft is None
    assert pair.reader_identity == pair.target_identity


def test_loading_says_why_it_runs_where_it_runs_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = saved(tmp_path, tiny_model("llama", seed=0), tiny_tokenizer())
    capfd.readouterr()
    loaded = load_model(name, device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert "bfloat16" in loaded.reason
    assert capfd.readouterr() == ("", "")


def test_an_identity_survives_bfloat16_but_not_a_change_of_weights_or_of_the_tokenizer() -> None:
    model, tokenizer = tiny_model("qwen2", seed=0), tiny_tokenizer()
    original = identify(model, tokenizer, "m")
    assert identify(model.to(torch.bfloat16), tokenizer, "m") == original
    assert (original.hidden_size, original.num_layers, original.vocab_size) == (32, 3, len(tokenizer))
    with torch.no_grad():
        query = model.get_submodule("model.layers.1.self_attn.q_proj").weight
        query += 0.05 * torch.outer(torch.ones(32), torch.ones(32))  # what merging a low-rank adapter does
    assert identify(model, tokenizer, "m").weights != original.weights
    tokenizer.add_tokens(["new"])
    assert identify(model, tokenizer, "m").tokenizer != original.tokenizer


def test_a_pair_of_two_vocabularies_is_refused_with_the_first_differences_and_both_sizes(tmp_path: Path) -> None:
    larger = tiny_tokenizer()
    larger.add_tokens(["flounder", "halibut"])
    target = saved(tmp_path / "target", tiny_model("llama", seed=0), tiny_tokenizer())
    draft = saved(tmp_path / "draft", tiny_model("qwen2", seed=0, vocab_size=len(larger)), larger)
    with pytest.raises(PairMismatch, match=r"\(316 tokens\).*\(318 tokens\).*'flounder' is None / 316; 'halibut'"):
        load_pair(target, draft=draft, device="cpu")


def test_models_of_one_vocabulary_may_pad_their_logits_differently(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    target = saved(tmp_path / "target", tiny_model("llama", seed=0, vocab_size=384), tokenizer)
    draft = saved(tmp_path / "draft", tiny_model("llama", seed=0), tokenizer)
    assert load_pair(target, draft=draft, device="cpu").vocab_size == len(tokenizer)


def test_logits_narrower_than_the_tokenizer_are_refused() -> None:
    model, tokenizer = tiny_model("llama", seed=0, vocab_size=100), tiny_tokenizer()
    with pytest.raises(PairMismatch, match=r"token id 315 .* outside the logits \(100 wide\)"):
        Pair(model, None, tokenizer, identify(model, tokenizer, "narrow"), None)


def test_generation_ends_at_every_eos_that_the_model_or_the_tokenizer_names() -> None:
    pair = tiny_pair(seed=0)
    ids = {token: pair.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert pair.eos_ids == set(ids.values())
    pair.target.generation_config.eos_token_id = [7, ids["<|im_end|>"]]
    assert pair.eos_ids == {7, *ids.values()}


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    name = saved(tmp_path, tiny_model("llama", seed=0), tiny_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnknownFamily, match="'opt' has no row"):
        load_model(name)


def test_a_cut_weights_file_is_refused(tmp_path: Path) -> None:
    name = saved(tmp_path, tiny_model("llama", seed=0), tiny_tokenizer())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"holds no model that can be loaded.*Fetch it again"):
        load_model(name)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_rather_than_filled_with_noise(tmp_path: Path) -> None:
    name = saved(tmp_path, tiny_model("llama", seed=0), tiny_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(name)


def test_the_name_of_a_pair_is_not_taken_for_a_model() -> None:
    with pytest.raises(SettingError, match=r"is a pair.*demo:qwen-coder-1\.5b or demo:qwen-coder-0\.5b"):
        load_model("demo:qwen-coder")
