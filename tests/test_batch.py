"""A batch on a tiny pair: each of its streams gives what it gives alone, whatever happens to the others."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import hooks_of, seeded_bank
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedded import ids_of

from pilotfish.actions import Policy, Rule
from pilotfish.core import Site
from pilotfish.engines import (
    Batch,
    Drafting,
    EmbeddedEngine,
    Generation,
    GenerationStream,
    Request,
    Sampling,
    TokenEvent,
    generate_together,
)
from pilotfish.engines.reader import CachedModel
from pilotfish.errors import GenerationError, SettingError
from pilotfish.heads import HeadBank
from pilotfish.models import Pair, tiny_model, tiny_pair
from pilotfish.taps import Add, Edit, ProjectionGate, When

PROMPTS = ("def add(a, b):", "x", "Return the user to the system, and the assistant is\n  to print it", "é 💡 of")
GREEDY, RANDOM = Sampling(), Sampling(temperature=1.0)
SITE = Site(1, "resid_post")
RULES = {
    "observe": Policy(),
    "hold": Policy(hold=True),
    **{
        action: Policy(rules=(Rule(metric="wide", action=action, threshold=0.6, scope="answer", **options),))
        for action, options in {
            "flag": {},
            "stop": {},
            "redact": {},
            "resample": {"tries": 3},
            "defer": {"release": 0.4},
            "steer": {"edit": "push", "release": 0.4},
            "escalate": {},
        }.items()
    },
    "look ahead": Policy(rules=(Rule(metric="narrow", action="hold", threshold=0.5, look_ahead=True),)),
    "second signal": Policy(rules=(Rule(metric="signal.divergence", threshold=0.3, scope="answer"),)),
}


def engine_of(pair, banks, drafting=None, family_seed=3) -> EmbeddedEngine:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(family_seed))
    push = Edit(SITE, Add(vector, 0.5), When(phase="generation"))
    gated = Edit(Site(0, "attn_out"), Add(vector, 0.2), When(gate=ProjectionGate(Site(0, "resid_pre"), vector, 0.1)))
    edits, judge = {"push": [push, gated]}, lambda *_: 0.0
    return EmbeddedEngine(pair, banks, drafting=drafting, edits=edits, judge=judge, score_limit_s=60.0)


def assert_same(found: Generation, alone: Generation) -> None:
    """Tokens and all that is decided from them, exactly; scores within float32's rounding."""
    assert ids_of(found) == ids_of(alone)
    assert found.answer == alone.answer
    assert found.finish_reason == alone.finish_reason
    assert found.attempts == alone.attempts
    assert found.notes == alone.notes
    for ours, theirs in zip(found.tokens, alone.tokens, strict=True):
        same = ("origin", "round", "is_emitted", "is_redacted", "is_deferred", "edits")
        assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
        assert_same_scores(ours.scores, theirs.scores)
        assert (ours.signals is None) == (theirs.signals is None)
        if ours.signals is not None:
            assert_same_scores(ours.signals.scores(), theirs.signals.scores())
    said = [[(v.position, v.metric, v.action, v.rule) for v in each.verdicts] for each in (found, alone)]
    assert said[0] == said[1]
    shape = [
        [(r.number, r.start, [(d.id, d.is_accepted) for d in r.drafted]) for r in g.rounds] for g in (found, alone)
    ]
    assert shape[0] == shape[1]


def assert_same_scores(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for metric, score in ours.items():
        other = theirs[metric]
        assert (score.state, score.reader, score.reason) == (other.state, other.reader, other.reason)
        for kind in ("value", "running"):
            assert getattr(score, kind) == pytest.approx(getattr(other, kind), abs=2e-5)


asked = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 12),
        "sampling": st.sampled_from([GREEDY, RANDOM, Sampling(temperature=0.8, top_p=0.9)]),
        "policy": st.sampled_from(list(RULES.values())),
        "seed": st.integers(0, 1000),
        "stop": st.lists(st.text(min_size=1, max_size=2), max_size=1).map(tuple),
        "signals": st.booleans(),
        "flush": st.booleans(),
    }
)
prompts = st.text(min_size=1, max_size=40).filter(lambda text: text.strip())


@given(
    rows=st.lists(st.tuples(prompts, asked), min_size=2, max_size=4),
    drafting=st.sampled_from([Drafting(length=0), Drafting(length=3), Drafting(), Drafting(step_cost=0.2)]),
    max_streams=st.integers(1, 4),
)
@settings(max_examples=5, deadline=None)
def test_each_stream_gives_what_it_gives_alone_whatever_joins_and_leaves(pair, bank, rows, drafting, max_streams):
    engine = engine_of(pair, [bank], drafting)
    requests = [Request(**options) for _, options in rows]
    together = generate_together(engine, [prompt for prompt, _ in rows], requests, max_streams=max_streams)
    for (prompt, _), request, found in zip(rows, requests, together, strict=True):
        assert_same(found, engine.generate(prompt, request))


FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_decoded_together_as_alone(family):
    base = tiny_pair(seed=0)
    target, draft = (tiny_model(family, seed=0) for _ in range(2))
    with torch.no_grad():
        for index, weight in enumerate(draft.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
    pair = Pair(target, draft, base.tokenizer, base.target_identity, base.draft_identity)
    engine = EmbeddedEngine(pair, [seeded_bank(pair, reader="draft")], drafting=Drafting(length=3))
    prompts = [PROMPTS[1], "word " * 20]  # the second is longer than a sliding window
    for prompt, found in zip(prompts, generate_together(engine, prompts, Request(max_new_tokens=8)), strict=True):
        assert_same(found, engine.generate(prompt, Request(max_new_tokens=8)))


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "sampled"])
def test_each_policy_does_among_all_others_what_it_does_alone(pair, bank, sampling):
    engine = engine_of(pair, [bank], Drafting(length=3))
    asked = [Request(max_new_tokens=14, policy=policy, sampling=sampling) for policy in RULES.values()]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(RULES))]
    together = dict(zip(RULES, generate_together(engine, prompts, asked), strict=True))
    for prompt, request, found in zip(prompts, asked, together.values(), strict=True):
        assert_same(found, engine.generate(prompt, request))
    done = {name for name, found in together.items() if name in {verdict.action for verdict in found.verdicts}}
    assert done == {"flag", "stop", "redact", "resample", "defer", "steer", "escalate"}


def test_a_long_prompt_is_read_a_chunk_a_round_while_others_go_on(pair, windowed, monkeypatch):
    monkeypatch.setattr("pilotfish.engines.reader.CHUNK", 16)
    engine = EmbeddedEngine(pair, [windowed])
    batch, streams = Batch(), [engine.stream(text, Request(max_new_tokens=14)) for text in ("x", "word " * 30)]
    for stream in streams:
        batch.join(stream)
    order = [each.stream for each in everything(batch) if any(isinstance(e, TokenEvent) for e in each.events)]
    assert order.index(streams[1]) >= 5  # of the short one's tokens, several left before
    for stream, prompt in zip(streams, ("x", "word " * 30), strict=True):
        assert_same(stream.generation, engine.generate(prompt, Request(max_new_tokens=14)))


def test_prompts_of_more_tokens_than_one_pass_takes_are_read_in_several(pair, bank, monkeypatch):
    monkeypatch.setattr("pilotfish.engines.batch.MOST_TOKENS", 40)
    sizes = []
    hook = pair.target.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append((*args, kwargs.get("input_ids"))[0].shape[1]), with_kwargs=True
    )
    try:
        found = generate_together(EmbeddedEngine(pair, [bank]), ["word " * 6] * 4, Request(max_new_tokens=4))
    finally:
        hook.remove()
    assert max(sizes) <= 2 * found[0].num_prompt_tokens
    assert len({each.answer for each in found}) == 1


def everything(batch: Batch) -> list:
    found = []
    while len(batch):
        found += batch.step()
    return found


# What goes wrong in one stream stays there.


class BreaksOnce(HeadBank):
    """A bank whose matmul goes wrong at one call, which is one stream's."""

    def break_at(self, call: int, what: str) -> BreaksOnce:
        self.calls_left, self.what = call, what
        return self

    def channels(self, features):
        found = super().channels(features)
        self.calls_left -= 1
        if self.calls_left != -1:
            return found
        if self.what == "raise":
            raise RuntimeError("injected")
        if self.what == "slow":
            self.clock.seconds += 100.0
            return found
        return found[:0] if self.what == "shape" else found * torch.nan


class Clock:
    """Stands still but for what is slow."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("action", "what"),
    [
        ("observe", "raise"),
        ("flag", "nan"),
        ("hold", "shape"),
        ("stop", "nan"),
        ("redact", "raise"),
        ("resample", "nan"),
        ("defer", "shape"),
        ("steer", "raise"),
        *(
            (action, "slow")
            for action in ("observe", "flag", "hold", "stop", "redact", "resample", "defer", "steer", "escalate")
        ),
    ],
)
def test_a_head_that_fails_on_one_stream_lets_nothing_out_there_and_leaves_the_others_scored(
    pair, action, what, monkeypatch
):
    clock = Clock()
    monkeypatch.setattr("pilotfish.engines.reader.time", clock)
    whole = seeded_bank(pair, reader="draft")
    request = Request(max_new_tokens=6, policy=RULES[action])
    alone = [engine_of(pair, [whole]).generate(prompt, request) for prompt in PROMPTS[:3]]
    broken = BreaksOnce(whole.heads, pair.draft_identity, thresholds=whole.thresholds).break_at(4, what)
    broken.clock = clock
    found = generate_together(engine_of(pair, [broken]), PROMPTS[:3], request)
    hit = [len(each.misses()) for each in found]
    assert sorted(hit) == [0, 0, 1]
    for ours, theirs, is_hit in zip(found, alone, hit, strict=True):
        if not is_hit:
            assert_same(ours, theirs)
        elif action in {"observe", "flag"}:
            assert ids_of(ours) == ids_of(theirs)
        else:
            assert ours.finish_reason == "content_filter"
            assert not any(token.is_emitted and token.scores["wide"].value is None for token in ours.committed)


def test_logits_that_are_not_finite_end_one_stream_alone(pair, bank):
    engine = EmbeddedEngine(pair, [bank], edits={"push": [Edit(SITE, Add(torch.full((32,), 3e38), 1e38))]})
    steer = Policy(rules=(Rule(metric="wide", action="steer", edit="push", threshold=0.0),))
    batch, sound = Batch(), [engine.stream(prompt, Request(max_new_tokens=12)) for prompt in PROMPTS[:2]]
    wild = engine.stream(PROMPTS[2], Request(max_new_tokens=12, policy=steer))
    for stream in (sound[0], wild, sound[1]):
        batch.join(stream)
    ended = {each.stream: each.error for each in everything(batch) if each.is_over}
    assert isinstance(ended[wild], GenerationError)
    assert "logits at position" in str(ended[wild])
    assert ended[sound[0]] is ended[sound[1]] is None
    for stream, prompt in zip(sound, PROMPTS, strict=False):
        assert_same(stream.generation, engine.generate(prompt, Request(max_new_tokens=12)))


def test_a_pass_that_fails_as_a_whole_is_made_again_for_each(pair, bank, monkeypatch):
    """A row index that the batch lacks: the edit fails one stream, packed or alone."""
    push = Edit(SITE, Add(torch.ones(32)), When(rows=(1,)))
    engine = EmbeddedEngine(pair, [bank], edits={"push": [push]})
    steer = Policy(rules=(Rule(metric="wide", action="steer", edit="push", threshold=0.0),))
    batch = Batch()
    streams = [engine.stream(PROMPTS[0], Request(max_new_tokens=12, policy=policy)) for policy in (Policy(), steer)]
    for stream in streams:
        batch.join(stream)
    ended = {each.stream: each.error for each in everything(batch) if each.is_over}
    assert "outside the batch" in str(ended[streams[1]])
    assert_same(streams[0].generation, engine.generate(PROMPTS[0], Request(max_new_tokens=12)))


def test_a_failing_layer_leaves_no_half_pass_in_any_cache(pair, bank):
    engine = EmbeddedEngine(pair, [bank], drafting=Drafting(length=3))
    calls = iter(range(1000))

    def fail(*_: object) -> None:
        if next(calls) == 4:
            raise RuntimeError("injected")

    hook = pair.target.base_model.layers[1].register_forward_pre_hook(fail)
    try:
        found = generate_together(engine, PROMPTS[:3], Request(max_new_tokens=12))
    finally:
        hook.remove()
    for prompt, each in zip(PROMPTS, found, strict=False):
        assert_same(each, engine.generate(prompt, Request(max_new_tokens=12)))


# Joining and leaving.


def test_a_stream_that_leaves_frees_its_caches_and_touches_no_other(pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    batch, streams = Batch(), [engine.stream(prompt, Request(max_new_tokens=10)) for prompt in PROMPTS[:3]]
    for stream in streams:
        batch.join(stream)
    while len(streams[1].generation.committed) < 5:
        batch.step()
    caches = [weakref.ref(each.cache) for each in models_of(streams[1])]
    batch.leave(streams[1])
    batch.leave(streams[1])  # no harm
    gc.collect()
    assert [cache() for cache in caches] == [None, None]
    assert len(batch) == 2
    everything(batch)
    assert streams[1].generation.finish_reason is None
    for index in (0, 2):
        assert_same(streams[index].generation, engine.generate(PROMPTS[index], Request(max_new_tokens=10)))


def models_of(stream: GenerationStream) -> list[CachedModel]:
    loop = stream.steps.gi_frame.f_locals["self"]
    return [loop._target, loop._draft]


def test_when_all_have_ended_the_model_is_as_it_was(pair, bank):
    before = (pair.target.config._attn_implementation, hooks_of(pair.target), hooks_of(pair.draft))
    generate_together(engine_of(pair, [bank]), PROMPTS, Request(max_new_tokens=4, policy=RULES["steer"]))
    assert (pair.target.config._attn_implementation, hooks_of(pair.target), hooks_of(pair.draft)) == before


def test_what_a_batch_refuses_it_says_how_to_mend(pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    with pytest.raises(SettingError, match="17 streams is not allowed; give 1 to 16"):
        Batch(max_streams=17)
    batch = Batch(max_streams=1)
    batch.join(engine.stream("x"))
    assert batch.is_full
    with pytest.raises(SettingError, match="join again once one has ended"):
        batch.join(engine.stream("x"))
    batch = Batch()
    batch.join(engine.stream("x"))
    with pytest.raises(SettingError, match="give each engine a batch of its own"):
        batch.join(EmbeddedEngine(pair).stream("x"))
    with pytest.raises(SettingError, match="0 s for scores is not allowed; give a positive number"):
        EmbeddedEngine(pair, [bank], score_limit_s=0.0)
    with pytest.raises(SettingError, match="2 prompts came with 1 requests"):
        generate_together(engine, ["x", "y"], [Request()])
