"""Steering as a client of the server asks for it: what is allowed, what it does, and to whom it does nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace

import openai
import pytest
import torch
from conftest import seeded_bank
from server_kit import FLAG_ALL, held, serving, until

from pilotfish.actions import Policy, Rule
from pilotfish.cli import main
from pilotfish.core import Site
from pilotfish.engines import EmbeddedEngine, Generation, Request, generate_together
from pilotfish.errors import DirectionMismatch, SettingError
from pilotfish.models import tiny_pair
from pilotfish.server import EmbeddedBackend, ServerSettings
from pilotfish.server.access import ApiError
from pilotfish.server.steer_routes import checked
from pilotfish.server.steer_schemas import GateIn, SteerIn
from pilotfish.server.steering import AllowList
from pilotfish.steering import Direction, DirectionCard, save_directions
from pilotfish.taps import Ablate, Add, Edit, When, edited

MID, LATE = Site(1, "resid_post"), Site(2, "resid_post")
PROMPT = "hello"


def direction(pair, name="cheerful", site=MID, *, dose=6.0, kind="add", seed=1) -> Direction:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    card = DirectionCard(name=name, identity=pair.target_identity, method="imported", notes="from a test")
    return Direction(site=site, vector=vector, card=card).with_dose(dose, kind)


@pytest.fixture(scope="module")
def engine(pair, bank):
    return EmbeddedEngine(pair, [bank])


@pytest.fixture(scope="module")
def served(pair):
    """Three calibrated doses, one of them negative and one of an ablation."""
    return [
        direction(pair),
        direction(pair, "calm", LATE, dose=-4.0, seed=2),
        direction(pair, "flat", dose=2.0, kind="ablate", seed=3),
    ]


@pytest.fixture(scope="module")
def server(engine, served, tmp_path_factory):
    backend = EmbeddedBackend(engine, directions=served, max_dose=1.5)
    with serving(backend, tmp_path_factory.mktemp("steering"), ServerSettings(port=0)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def ask(client, engine, *steer, max_tokens=12, **more):
    return client.chat.completions.create(
        model=engine.pair.target_identity.name,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"steer": list(steer), "monitor": {"tokens": False}},
        **more,
    )


def alone(engine, one: Direction, dose: float, phase="generation", policy=None) -> Generation:
    """What the engine gives by itself with the edit written out by hand."""
    edits = {one.card.name: [Edit(one.site, Add(one.vector, dose), When(phase=phase))]}
    return engine.generate(PROMPT, Request(max_new_tokens=12, edits=edits, policy=policy or Policy()))


def said(reply) -> dict:
    (found,) = reply.choices[0].monitor["steering"]
    return found


def test_the_list_says_what_may_be_steered_along_and_how_far(client, served):
    found = client.get("/steer/directions", cast_to=object)["directions"]
    assert [(each["name"], each["site"], each["dose"], each["max_dose"]) for each in found] == [
        ("cheerful", "1.resid_post", 6.0, 9.0),
        ("calm", "2.resid_post", -4.0, -6.0),
        ("flat", "1.resid_post", 2.0, 3.0),
    ]
    assert [each["card"]["kind"] for each in found] == ["add", "add", "ablate"]
    assert found[0]["card"]["notes"] == "from a test"
    assert found[0]["card"]["identity"] == asdict(served[0].card.identity)
    assert found[0]["sha256"] != found[1]["sha256"]


@pytest.mark.parametrize(("scope", "dose"), [("generation", None), ("prompt", 9.0), ("both", 2.5)])
def test_an_answer_is_that_of_the_edit_by_hand(client, engine, served, scope, dose):
    plain = engine.generate(PROMPT, Request(max_new_tokens=12)).answer
    reply = ask(client, engine, {"name": "cheerful", "scope": scope} | ({"dose": dose} if dose else {}))
    expected = alone(engine, served[0], dose or 6.0, scope)
    assert reply.choices[0].message.content == expected.answer != plain
    assert said(reply)["dose"] == (dose or 6.0)
    assert said(reply)["num_tokens"] == reply.usage.completion_tokens


def test_a_dose_does_what_it_was_calibrated_for(client, engine, served):
    """Adding two times the vector is another thing than mirroring the activation on it."""
    ablated = {"flat": [Edit(MID, Ablate(served[2].vector, 2.0), When(phase="generation"))]}
    expected = engine.generate(PROMPT, Request(max_new_tokens=12, edits=ablated)).answer
    reply = ask(client, engine, {"name": "flat"})
    assert reply.choices[0].message.content == expected != alone(engine, served[2], 2.0).answer
    assert (said(reply)["kind"], said(reply)["dose"]) == ("ablate", 2.0)


def test_a_streamed_answer_is_steered_the_same_and_says_so_at_the_end(client, engine, served):
    chunks = list(ask(client, engine, {"name": "calm", "dose": -6.0}, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == alone(engine, served[1], -6.0).answer
    last = chunks[-1].choices[0].monitor["steering"]
    assert [(each["name"], each["dose"], each["scope"], each["gate"]) for each in last] == [
        ("calm", -6.0, "generation", None)
    ]


def test_several_directions_act_at_once(client, engine, served):
    edits = {each.card.name: [each.to_edit()] for each in served}
    expected = engine.generate(PROMPT, Request(max_new_tokens=12, edits=edits))
    reply = ask(client, engine, *({"name": name, "scope": "both"} for name in edits))
    assert reply.choices[0].message.content == expected.answer
    assert [each["name"] for each in reply.choices[0].monitor["steering"]] == ["cheerful", "calm", "flat"]


def test_dose_0_is_no_steering(client, engine):
    plain = engine.generate(PROMPT, Request(max_new_tokens=12)).answer
    assert ask(client, engine, {"name": "cheerful", "dose": 0, "scope": "both"}).choices[0].message.content == plain


def test_mates_in_one_batch_each_get_what_they_get_alone(client, engine, served, server):
    asked = [(), ({"name": "cheerful", "scope": "both"},), ({"name": "cheerful", "dose": 2.5},), ({"name": "calm"},)]
    sizes = []
    hook = engine.pair.target.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(server.backend._decoding)), with_kwargs=True
    )
    try:
        with ThreadPoolExecutor(len(asked)) as pool:
            with held(server.backend):
                waiting = [pool.submit(ask, client, engine, *steer) for steer in asked]
                until(lambda: server.backend.load[1] == len(asked))
            found = [each.result().choices[0].message.content for each in waiting]
    finally:
        hook.remove()
    assert max(sizes) == len(asked)
    plain = engine.generate(PROMPT, Request(max_new_tokens=12)).answer
    steered = [alone(engine, served[0], 6.0, "both"), alone(engine, served[0], 2.5), alone(engine, served[1], -4.0)]
    assert found == [plain, *(each.answer for each in steered)]


def test_scores_and_ids_of_mates_are_those_that_they_have_alone(pair, engine, served):
    edits = {"cheerful": [served[0].to_edit()]}
    asked = [Request(max_new_tokens=12), Request(max_new_tokens=12, edits=edits)]
    for request, found in zip(asked, generate_together(engine, [PROMPT] * 2, asked), strict=True):
        expected = engine.generate(PROMPT, request)
        assert [token.id for token in found.tokens] == [token.id for token in expected.tokens]
        assert {token.edits for token in found.committed} == {tuple(request.edits)}
        for ours, theirs in zip(found.tokens, expected.tokens, strict=True):
            assert ours.scores["wide"].value == pytest.approx(theirs.scores["wide"].value, abs=2e-5)


def test_the_record_says_which_steering_was_on(client, engine, served, server):
    steered = ask(client, engine, {"name": "cheerful", "dose": 2.5, "scope": "both"})
    stored = server.store.exchange(steered.id)["stats"]["steering"]
    assert stored == [said(steered)]
    assert stored[0]["site"] == "1.resid_post"
    listed = client.get("/steer/directions", cast_to=object)["directions"]
    assert stored[0]["sha256"] == listed[0]["sha256"]
    assert server.store.exchange(ask(client, engine).id)["stats"]["steering"] == []


# Gates.


def test_a_gate_steers_while_its_head_is_at_the_threshold(client, engine, served):
    plain = engine.generate(PROMPT, Request(max_new_tokens=12))
    limit = sorted(token.scores["wide"].running for token in plain.committed)[6]
    policy = Policy(rules=(Rule(metric="wide", action="steer", edit="cheerful", threshold=limit),))
    expected = alone(engine, served[0], 6.0, policy=policy)
    reply = ask(client, engine, {"name": "cheerful", "gate": {"metric": "wide", "threshold": limit}})
    assert reply.choices[0].message.content == expected.answer
    num_on = sum("cheerful" in token.edits for token in expected.committed)
    assert said(reply)["num_tokens"] == num_on
    assert 0 < num_on < len(expected.committed)
    assert said(reply)["gate"] == {"metric": "wide", "threshold": limit}


def test_a_clients_gate_is_no_alert_and_leaves_the_servers_policy_as_it_is(client, engine, server):
    gate = {"metric": "wide", "threshold": 0.0}
    both = [{"name": "cheerful", "gate": gate}, {"name": "calm", "gate": gate | {"threshold": 0.1}}]
    reply = ask(client, engine, *both)
    monitor = reply.choices[0].monitor
    assert {verdict["action"] for verdict in monitor["verdicts"]} == {"steer"}
    assert monitor["heads"]["wide"]["flagged"] is False
    assert monitor["heads"]["wide"]["actions"] == []
    assert not [alert for alert in server.store.alerts(limit=10) if alert["exchange_id"] == reply.id]
    assert server.service.policy == Policy()


def test_rules_of_the_server_hold_beside_a_clients_gate(engine, served, tmp_path):
    backend = EmbeddedBackend(engine, directions=served)
    with serving(backend, tmp_path, ServerSettings(port=0), policy=FLAG_ALL) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            reply = ask(client, engine, {"name": "cheerful", "gate": {"metric": "wide", "threshold": 0.0}})
        assert [alert["action"] for alert in server.store.alerts(limit=10)] == ["flag"]
        assert reply.choices[0].monitor["heads"]["wide"]["flagged"] is True


# `pilotfish steer verify --server`.


def verified(capsys, server, *given) -> tuple[int, str]:
    code = main(["steer", "verify", *map(str, given), "--server", server.url, "--prompt", PROMPT, "--num-tokens", "12"])
    done = capsys.readouterr()
    return code, done.out + done.err


def test_verify_asks_a_server_whether_every_direction_acts_and_on_nobody_else(server, capsys):
    code, said = verified(capsys, server)
    assert (code, said.count("  ok  "), said.count("FAIL")) == (0, 12, 0)
    assert "flat at 1.resid_post, ablate with dose 2, on http://127.0.0.1" in said
    assert "it is on for every token, as asked: 12 of 12 tokens" in said
    assert "requests at the same time are untouched: beside 3 steered ones: the same" in said


def test_verify_holds_a_server_to_the_very_vectors_of_a_folder(pair, served, server, tmp_path, capsys):
    code, said = verified(
        capsys, server, save_directions(tmp_path / "served", {LATE: served[1]}), "--phase", "generation"
    )
    assert (code, said.count("  ok  ")) == (0, 4)
    code, said = verified(capsys, server, save_directions(tmp_path / "other", {MID: direction(pair, seed=9)}))
    assert code == 1
    assert "FAIL  the server has this vector: cheerful at 1.resid_post" in said


def test_verify_notices_a_server_that_steers_nobody_and_one_that_steers_everybody(served, server, capsys, monkeypatch):
    monkeypatch.setattr(AllowList, "edits", lambda _, steering, model: {each.name: () for each in steering})
    code, said = verified(capsys, server)
    assert code == 1
    assert said.count("FAIL  the vector changes the answer: the same") == 3
    monkeypatch.undo()
    target = server.backend._engine.pair.target
    leak = Edit(MID, Add(served[0].vector, 6.0))
    monkeypatch.setattr(
        AllowList, "edits", lambda _, steering, model: leaking.enter_context(edited(target, [leak])) or {}
    )
    with ExitStack() as leaking:
        code, said = verified(capsys, server)
    assert code == 1 and "FAIL  dose 0 changes nothing" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--server", "http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer"),
        (["--server", "http://127.0.0.1:1", "--kind", "add"], "a server does what the card says; leave --kind out"),
        ([], "nothing to verify; give the folder of directions, or a --server"),
    ],
)
def test_verify_says_what_it_cannot_do(given, words, capsys):
    assert main(["steer", "verify", *given]) == 1
    assert words in capsys.readouterr().err


# Refusals.


@pytest.mark.parametrize(
    ("steer", "code", "param", "words"),
    [
        ({"name": "angry"}, "direction_not_served", "steer.0.name", "'angry' is not served here; there are cheerful"),
        ({"name": "cheerful", "dose": 9.1}, "dose_not_allowed", "steer.0.dose", r"9.1 .* outside \[0, 9\]"),
        ({"name": "cheerful", "dose": -1}, "dose_not_allowed", "steer.0.dose", "calibrated at 6"),
        ({"name": "calm", "dose": 1}, "dose_not_allowed", "steer.0.dose", r"outside \[-6, 0\]"),
        (
            {"name": "calm", "gate": {"metric": "none"}},
            "metric_not_scored",
            "steer.0.gate.metric",
            "'none' of a gate has no head; there are wide, narrow",
        ),
        (
            {"name": "calm", "scope": "both", "gate": {"metric": "wide"}},
            "gate_not_allowed",
            "steer.0.scope",
            "use 'generation'",
        ),
        ({"name": "calm", "scope": "all"}, None, "steer.0.scope", "'generation', 'prompt' or 'both'"),
        ({"name": "calm", "layer": 3}, None, "steer.0.layer", "not permitted"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(client, engine, steer, code, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(client, engine, steer)
    assert refused.value.code == code
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_one_direction_is_asked_for_once(client, engine):
    with pytest.raises(openai.BadRequestError, match="asked for twice") as refused:
        ask(client, engine, {"name": "calm"}, {"name": "calm", "scope": "prompt"})
    assert refused.value.param == "steer.1.name"


def test_a_gate_without_a_threshold_needs_a_calibrated_one(server):
    info = server.backend.info
    asked = [SteerIn(name="calm", gate=GateIn(metric="wide"))]
    assert checked(asked, info)[0].metric == "wide"
    info = replace(info, heads=tuple(replace(head, threshold=None) for head in info.heads))
    with pytest.raises(ApiError, match="no calibrated threshold") as refused:
        checked(asked, info)
    assert refused.value.code == "threshold_missing"


def test_what_cannot_be_served_is_refused_at_the_start(pair, engine):
    other = tiny_pair(seed=3)
    with pytest.raises(DirectionMismatch, match="was made for"):
        EmbeddedBackend(engine, directions=[direction(other)])
    with pytest.raises(SettingError, match="'cheerful' has no calibrated dose"):
        EmbeddedBackend(engine, directions=[direction(pair, dose=None)])
    with pytest.raises(SettingError, match=r"two directions to serve are called 'cheerful@1\.resid_post'"):
        EmbeddedBackend(engine, directions=[direction(pair), direction(pair)])
    with pytest.raises(SettingError, match="give a positive number"):
        EmbeddedBackend(engine, directions=[direction(pair)], max_dose=0.0)


def test_a_server_of_no_directions_and_a_proxy_steer_nobody(server):
    info = replace(server.backend.info, directions=())
    with pytest.raises(ApiError, match="none: it was started without --directions"):
        checked([SteerIn(name="calm")], info)
    with pytest.raises(ApiError, match="behind a proxy the model that answers is elsewhere") as refused:
        checked([SteerIn(name="calm")], replace(info, is_taxed=True))
    assert (refused.value.status, refused.value.code) == (400, "steering_unavailable")


def test_the_command_refuses_directions_behind_an_upstream_and_those_of_another_model(pair, tmp_path, capsys):
    folder = save_directions(tmp_path / "directions", {MID: direction(tiny_pair(seed=3))})
    store = ["--store", f"sqlite:///{tmp_path / 'store.db'}", "--directions", str(folder)]
    assert main(["serve", "--upstream", "http://127.0.0.1:1/v1", "--model", "m", *store]) == 1
    assert "--directions cannot be served: behind a proxy" in capsys.readouterr().err
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    seeded_bank(pair, reader="draft").save(tmp_path / "bank")
    models = ["--pair", tmp_path / "target", "--draft", tmp_path / "draft", "--banks", tmp_path / "bank"]
    assert main(["serve", *map(str, models), "--dtype", "float32", *store]) == 1
    assert "was made for" in capsys.readouterr().err


def test_directions_of_one_name_are_told_apart_by_their_sites(pair, engine):
    backend = EmbeddedBackend(engine, directions=[direction(pair), direction(pair, site=LATE)])
    backend.close()
    assert [each.name for each in backend.info.directions] == ["cheerful@1.resid_post", "cheerful@2.resid_post"]
