"""Other drafters, and no drafter: what is read instead, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import HIDDEN, Models, engine, expected, finished, generate, running, seeded_bank, tap_of, write_settings
from safetensors.torch import save_file
from transformers import LlamaConfig

from pilotfish.actions import Policy, Rule, write_policy
from pilotfish.errors import BankMismatch, SettingError
from pilotfish.heads import Form, Head, HeadBank
from pilotfish.models import identify_folder
from pilotfish.vllm.track import AFTER_HOLE, FIRST, LAST, NOT_READ

TEXT = "The cat and the dog return to the house. def f(x): return x == 1. "


def make_eagle(models: Models) -> tuple[Path, HeadBank]:
    """One block that reads the target's state beside the next token; and a head on what it returns."""
    folder, random = models.folder / "eagle", torch.Generator().manual_seed(9)
    folder.mkdir(exist_ok=True)
    config = LlamaConfig.from_pretrained(models.folder / "draft")
    config.num_hidden_layers = 1
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    models.tokenizer.save_pretrained(folder)
    block = {name: value.clone() for name, value in models.draft.model.layers[0].state_dict().items()}
    tensors = {f"layers.0.{name}": value for name, value in block.items() if name != "input_layernorm.weight"}
    tensors["fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, generator=random) / (2 * HIDDEN) ** 0.5
    tensors["embed_tokens.weight"] = models.target.model.embed_tokens.weight.detach().clone()
    save_file(tensors, folder / "model.safetensors")
    form = Form(window=4)
    weight = torch.randn(form.num_channels, HIDDEN, generator=random) / HIDDEN**0.5
    (site,) = seeded_bank(models.draft, models.tokenizer, "draft").heads[-1].sites
    head = Head("eagle", (site,), weight, torch.randn(2, generator=random), form)
    bank = HeadBank([head], identify_folder(folder, "eagle"))
    bank.save(models.folder / "bank-eagle")
    return folder, bank


@pytest.fixture(scope="module")
def eagle(models: Models) -> Iterator[Any]:
    folder, _ = make_eagle(models)
    settings = write_settings(models.folder, 'banks = ["bank-eagle"]\n', "eagle.toml")
    spec = {"method": "eagle", "model": str(folder), "num_speculative_tokens": 2}
    with engine(models, settings, speculative_config=spec, max_num_batched_tokens=128) as llm:
        yield llm


def test_states_in_bfloat16_are_read_by_loops_as_by_tensor_operations(models):
    settings = write_settings(models.folder, 'banks = ["bank-draft"]\n', "bfloat16.toml")
    with engine(models, settings, dtype="bfloat16") as llm:
        tap, found = tap_of(llm), []
        for is_loop in (True, False):
            llm.reset_prefix_cache()
            if not is_loop:
                tap._steps, tap._scorer = None, None
            record = finished(generate(llm, [TEXT], max_tokens=24)[0][0])
            found.append((record.generation.tokens[-1].id, running(record)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)


def test_an_eagle_drafter_has_no_state_of_the_first_token_and_one_of_every_other(eagle):
    eagle.reset_prefix_cache()
    for (completion,) in generate(eagle, [TEXT, "def f"], max_tokens=16):
        record = finished(completion)
        size = len(record.generation.tokens)
        assert record.counts == {FIRST: 1, "": size - 1}
        assert running(record)[0].isnan().all() and not running(record)[1:].isnan().any()


def test_an_eagle_drafter_s_cached_prefix_has_the_scores_of_the_fresh_one(eagle):
    eagle.reset_prefix_cache()
    prompt = list(range(7, 107))
    ((first,),) = generate(eagle, [prompt], max_tokens=1)
    ((again,),) = generate(eagle, [[*prompt, 9, 8, 7]], max_tokens=1)
    one, other = running(finished(first)), running(finished(again))
    torch.testing.assert_close(one[1:100], other[1:100], atol=1e-4, rtol=0)
    assert finished(again).counts == finished(first).counts | {"": 103}


def test_where_a_prompt_is_cut_vllm_gives_an_eagle_drafter_a_wrong_token_and_what_follows_is_unscored(eagle):
    """In the V1 runner's padded batches the last row of a chunk reads the prompt's last token in place of the next."""
    eagle.reset_prefix_cache()
    prompt = list(range(3, 143))
    ((cut,),) = generate(eagle, [prompt], max_tokens=2)
    ((short,),) = generate(eagle, [prompt[:100]], max_tokens=1)
    found = running(finished(cut))
    torch.testing.assert_close(found[1:100], running(finished(short))[1:100], atol=1e-4, rtol=0)
    assert not found[1:128].isnan().any() and found[128:].isnan().all()
    assert finished(cut).counts == {FIRST: 1, "": 127, NOT_READ: 1, AFTER_HOLE: 13}


@pytest.fixture(scope="module")
def ngrams(models: Models) -> Iterator[Any]:
    settings = write_settings(models.folder, 'banks = ["bank-target"]\n', "target.toml")
    spec = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(models, settings, speculative_config=spec) as llm:
        yield llm


def test_without_a_drafter_the_target_is_read_and_the_last_token_is_not(models, ngrams):
    for (completion,) in generate(ngrams, [TEXT, "def f def f def f"], max_tokens=24):
        record = finished(completion)
        size = len(record.generation.tokens)
        assert record.counts == {LAST: 1, "": size - 1}
        found, wanted = running(record), expected(models, record, reader="target")
        torch.testing.assert_close(found[:-1], wanted[:-1], atol=1e-4, rtol=0)
        assert {score.reader for token in record.generation.tokens for score in token.scores.values()} == {"target"}


def test_the_target_s_cached_prefix_is_scored_too(models, ngrams):
    ngrams.reset_prefix_cache()
    prompt = list(range(7, 87))
    generate(ngrams, [prompt], max_tokens=1)
    ((again,),) = generate(ngrams, [[*prompt, 9, 8, 7]], max_tokens=4)
    record = finished(again)
    assert record.counts == {LAST: 1, "": 86}
    torch.testing.assert_close(running(record)[:-1], expected(models, record, reader="target")[:-1], atol=1e-4, rtol=0)


def refused(models: Models, text: str, **changes: Any) -> Any:
    return engine(models, write_settings(models.folder, text, "refused.toml"), **changes)


NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def plan_of(models: Models, text: str, **changes: Any) -> dict[str, Any]:
    """What the plugin makes of a configuration, without starting an engine."""
    import vllm.engine.arg_utils as arguments
    from kit import options

    from pilotfish.vllm.plan import make_plan
    from pilotfish.vllm.settings import read_settings

    given = {name: value for name, value in options(models, **changes).items() if value is not None}
    create = arguments.EngineArgs.create_engine_config
    config = getattr(create, "__wrapped__", create)(arguments.EngineArgs(**given))
    return make_plan(read_settings(write_settings(models.folder, text, "planned.toml")), config).as_dict()


def test_a_bank_of_another_drafter_is_refused(models):
    with pytest.raises(BankMismatch, match="was made for target"):
        plan_of(models, 'banks = ["bank-target"]\n')


def test_a_draft_that_is_not_there_is_refused(models):
    with pytest.raises(SettingError, match="method is 'ngram', which runs no model"):
        plan_of(models, 'banks = ["bank-target"]\nreader = "draft"\n', speculative_config=NGRAMS)


def test_a_gate_without_a_drafter_is_refused(models):
    write_policy(models.folder / "gate.toml", Policy(rules=(Rule(metric="last", action="stop", threshold=0.5),)))
    with pytest.raises(SettingError, match="speculative_config"):
        plan_of(models, 'banks = ["bank-target"]\npolicy = "gate.toml"\n', speculative_config=NGRAMS)


def test_a_model_without_a_bank_is_refused(models):
    with pytest.raises(SettingError, match="no bank ships for"):
        plan_of(models, "")


def test_settings_with_an_unknown_key_are_refused(models):
    with pytest.raises(SettingError, match="unknown key 'bank'"):
        plan_of(models, 'bank = "bank-draft"\n')


def test_an_engine_that_cannot_be_monitored_does_not_start(models):
    with pytest.raises(BankMismatch), refused(models, 'banks = ["bank-target"]\n'):
        pass


def test_the_plan_goes_to_workers_as_plain_json(models):
    plan = plan_of(models, 'banks = ["bank-draft"]\n')
    assert json.loads(json.dumps(plan))["reader"] == "draft" and plan["shift"] == 0
