"""Keys, scopes and rates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.errors import SettingError
from pilotfish.server.keys import KeyRing, RateLimit, digest, new_key


def ring_of(*keys) -> KeyRing:
    rows = [SimpleNamespace(**key.row, revoked_s=None) for key in keys]
    ring = KeyRing(lambda: rows)
    ring.refresh()
    return ring


def test_a_key_is_known_by_its_secret_alone():
    mine, other = new_key("mine", ["use", "read"]), new_key("other", ["admin"])
    ring = ring_of(mine, other)
    assert ring.caller(mine.secret).scopes == {"use", "read"}
    assert ring.caller(other.secret).key_id == other.row["id"]
    swapped = f"pf_{mine.row['id']}_{other.secret.split('_', 2)[2]}"
    for wrong in ("", "pf", "pf__", mine.secret[:-1], mine.secret + "x", swapped, mine.row["digest"], "\ud800"):
        assert ring.caller(wrong) is None


def test_only_the_hash_is_kept():
    key = new_key("mine", ["use"])
    assert key.row["digest"] == digest(key.secret)
    assert key.secret.split("_", 2)[2] not in repr(key.row)


def test_two_keys_are_never_alike():
    keys = [new_key("x", ["use"]) for _ in range(100)]
    assert len({key.secret for key in keys}) == len({key.row["id"] for key in keys}) == 100


def test_a_revoked_key_stops_working_at_the_next_reading():
    key, now = new_key("x", ["use"]), [0.0]
    row = SimpleNamespace(**key.row, revoked_s=None)
    ring = KeyRing(lambda: [row], refresh_s=5.0, clock=lambda: now[0])
    assert ring.is_stale
    ring.refresh()
    row.revoked_s = 1.0
    assert not ring.is_stale
    assert ring.caller(key.secret) is not None
    now[0] = 5.0
    assert ring.is_stale
    ring.refresh()
    assert ring.caller(key.secret) is None


@pytest.mark.parametrize("scopes", [[], ["root"], ["use", "everything"]])
def test_an_unknown_scope_is_refused(scopes):
    with pytest.raises(SettingError, match="one or more of use, read, admin"):
        new_key("x", scopes)


def test_a_rate_lets_a_burst_pass_and_then_says_how_long_to_wait():
    now = [0.0]
    limit = RateLimit(60, clock=lambda: now[0])
    assert [limit.wait_s("a") for _ in range(60)] == [0.0] * 60
    assert limit.wait_s("a") == pytest.approx(1.0)
    assert limit.wait_s("b") == 0.0
    now[0] = 0.5
    assert limit.wait_s("a") == pytest.approx(0.5)
    now[0] = 1.0
    assert limit.wait_s("a") == 0.0


@given(st.lists(st.floats(0.0, 5.0), max_size=60), st.integers(1, 120))
def test_no_pattern_of_requests_gets_past_its_rate(pauses, per_minute):
    now, passed = [0.0], 0
    limit = RateLimit(per_minute, clock=lambda: now[0])
    for pause in pauses:
        now[0] += pause
        passed += limit.wait_s("a") == 0.0
    assert passed <= per_minute + now[0] * per_minute / 60.0 + 1e-6


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(SettingError, match="give at least 1"):
        RateLimit(0)
