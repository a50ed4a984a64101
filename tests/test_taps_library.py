"""The model reads a row once, whatever rows it is asked for with, and whatever it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.core import Site
from pilotfish.errors import SettingError, TextError
from pilotfish.models import tiny_model
from pilotfish.taps import Shelf, TokenRow, gather, tapped

SITES = (Site(0, "resid_post"), Site(-1, "final"))
OTHER = Site(1, "resid_pre")
MODEL = tiny_model("llama", seed=0)
ROWS = [TokenRow(f"row-{i}", tuple(range(i, 2 * i + 3))) for i in range(12)]


def gathered(
    library: Path,
    rows: Sequence[TokenRow],
    sites: Sequence[Site] = SITES,
    model: str = "tiny",
    also: Sequence[Site] = (),
) -> Shelf:
    return gather(MODEL, sites, rows, library, identity_hash=model, also=also)


def num_tokens_read(run: Callable[[], object]) -> int:
    """Tokens that go through the model, padding included."""
    sizes: list[int] = []
    look = MODEL.base_model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    try:
        run()
    finally:
        look.remove()
    return sum(sizes)


def direct_pass(row: TokenRow) -> torch.Tensor:
    with torch.no_grad(), tapped(MODEL, SITES) as taps:
        MODEL(torch.tensor([row.token_ids]))
        return torch.cat([taps[site][0] for site in SITES], dim=-1)


@settings(max_examples=10, deadline=None)
@given(calls=st.lists(st.sets(st.integers(0, len(ROWS) - 1), min_size=1), min_size=1, max_size=4))
def test_every_row_has_the_features_of_a_direct_pass_and_is_read_once(
    calls: list[set[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    library = tmp_path_factory.mktemp("library")
    seen: set[int] = set()
    for call in calls:
        rows = [ROWS[i] for i in call]
        shelves: list[Shelf] = []
        num_read = num_tokens_read(lambda rows=rows, shelves=shelves: shelves.append(gathered(library, rows)))
        assert (num_read == 0) == (call <= seen)
        seen |= call
        assert set(shelves[0].row_ids) == {row.id for row in rows}
        for row in rows:
            torch.testing.assert_close(shelves[0].features(row.id), direct_pass(row))


def test_a_row_is_known_by_its_tokens_and_not_by_its_name(tmp_path: Path) -> None:
    gathered(tmp_path, ROWS)
    renamed = [TokenRow(f"other-{i}", row.token_ids) for i, row in enumerate(ROWS)]
    shelves: list[Shelf] = []
    assert num_tokens_read(lambda: shelves.append(gathered(tmp_path, renamed))) == 0
    torch.testing.assert_close(shelves[0].features("other-3"), direct_pass(ROWS[3]))
    changed = [TokenRow(ROWS[0].id, ROWS[1].token_ids[::-1])]
    assert num_tokens_read(lambda: gathered(tmp_path, changed)) == len(changed[0].token_ids)


def test_two_names_of_the_same_tokens_share_one_reading(tmp_path: Path) -> None:
    twins = [TokenRow("a", (1, 2, 3)), TokenRow("b", (1, 2, 3))]
    shelves: list[Shelf] = []
    assert num_tokens_read(lambda: shelves.append(gathered(tmp_path, twins))) == 3
    assert torch.equal(shelves[0].features("a"), shelves[0].features("b"))


def test_another_model_and_other_sites_are_read_anew(tmp_path: Path) -> None:
    gathered(tmp_path, ROWS)
    assert num_tokens_read(lambda: gathered(tmp_path, ROWS, model="another")) > 0
    other_dtype = tiny_model("llama", seed=0).to(torch.bfloat16)
    found = gather(other_dtype, SITES, ROWS, tmp_path, identity_hash="tiny").features("row-3")
    assert found.dtype == torch.bfloat16
    assert num_tokens_read(lambda: gathered(tmp_path, ROWS, sites=[*SITES, OTHER])) > 0


def test_a_recording_of_more_sites_serves_whoever_asks_for_some(tmp_path: Path) -> None:
    with torch.no_grad(), tapped(MODEL, [OTHER]) as taps:
        MODEL(torch.tensor([ROWS[3].token_ids]))
        expected = taps[OTHER][0]
    shelves = [gathered(tmp_path, ROWS[:8], also=[OTHER])]
    assert num_tokens_read(lambda: shelves.append(gathered(tmp_path, ROWS[:8], sites=[OTHER]))) == 0
    assert num_tokens_read(lambda: shelves.append(gathered(tmp_path, ROWS[:8], sites=SITES[::-1]))) == 0
    torch.testing.assert_close(shelves[0].features("row-3"), direct_pass(ROWS[3]))
    torch.testing.assert_close(shelves[1].features("row-3"), expected)
    final, first = direct_pass(ROWS[3]).chunk(2, dim=-1)[::-1]
    torch.testing.assert_close(shelves[2].features("row-3"), torch.cat([final, first], dim=-1))
    assert num_tokens_read(lambda: gathered(tmp_path, ROWS, sites=[OTHER])) == num_tokens_read(
        lambda: gathered(tmp_path / "alone", ROWS[8:], sites=[OTHER])
    )


def test_an_unfinished_recording_is_gone_on_with_and_a_damaged_one_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gathered(tmp_path, ROWS)
    (sidecar,) = tmp_path.rglob("*.sha256")
    sidecar.unlink()
    assert num_tokens_read(lambda: gathered(tmp_path, ROWS)) > 0
    assert len(list(tmp_path.rglob("index.json"))) == 1
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    shelves: list[Shelf] = []
    assert num_tokens_read(lambda: shelves.append(gathered(tmp_path, ROWS))) > 0
    assert "damaged" in caplog.text
    torch.testing.assert_close(shelves[0].features("row-3"), direct_pass(ROWS[3]))
    assert num_tokens_read(lambda: gathered(tmp_path, ROWS)) == 0
    assert len(list(tmp_path.rglob("index.json"))) == 1


def test_what_is_no_recording_is_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gathered(tmp_path, ROWS)
    for name, content in (("a", "{}"), ("b", "[1]"), ("c", "no json")):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "index.json").write_text(content)
    assert num_tokens_read(lambda: gathered(tmp_path, ROWS)) == 0
    assert caplog.text.count("left aside") == 3


def test_a_name_that_occurs_twice_or_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="1 of 3 row ids occur twice"):
        gathered(tmp_path, [*ROWS[:2], TokenRow(ROWS[0].id, (5, 6))])
    with pytest.raises(SettingError, match="'row-7' is not among the 2 rows"):
        gathered(tmp_path, ROWS[:2]).features("row-7")
