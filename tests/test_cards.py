"""The cards: complete, consistent, findable."""

from __future__ import annotations

import re

import pytest

from transom.cards import CODE_STATUS, FAMILIES, KINDS, Card, card, load_cards, search
from transom.errors import TransomError


def test_the_list_has_89_papers_and_one_anchor() -> None:
    cards = load_cards().values()
    assert sum(not each.anchor for each in cards) == 89
    assert [each.slug for each in cards if each.anchor] == ["tome"]


def test_every_family_of_the_list_is_there() -> None:
    assert {each.family for each in load_cards().values()} == set(FAMILIES)
    assert len(FAMILIES) == 10


def test_keys_are_slugs_in_order_and_unique() -> None:
    cards = load_cards()
    assert [each.slug for each in cards.values()] == list(cards)
    assert list(cards) == sorted(cards)
    assert len({each.title for each in cards.values()}) == len(cards)
    # A slug becomes a module and a docs page: nothing but this may occur.
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) for slug in cards)


@pytest.mark.parametrize("each", load_cards().values(), ids=lambda each: each.slug)
def test_a_card_uses_the_words_of_the_project(each: Card) -> None:
    assert each.kind in KINDS
    assert each.code_status in CODE_STATUS
    assert 2015 < each.year < 2030
    assert each.title == each.title.strip()
    assert all(link.startswith(("http://", "https://")) for link in each.links)
    if each.code_status in ("available", "partial"):
        assert each.code is not None and each.code.commit
    for code in (each.code, *each.related_code):
        if code is not None:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", code.repository)
            assert code.commit is None or re.fullmatch(r"[0-9a-f]{7,40}", code.commit)


def test_what_a_caller_does_to_the_mapping_stays_with_the_caller() -> None:
    load_cards().clear()
    assert load_cards()


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("tome", "tome"),
        ("ToMe", "tome"),
        ("bipartite matching", "tome"),
        ("PAINT", "imbalanced-attention"),
        ("neighborhood attention", "fna"),
        ("energy score", "pitome"),
        ("ViT-Lite", "cct"),
        ("TransVG++", "transvg-pp"),
    ],
)
def test_search_puts_the_paper_first(words: str, first: str) -> None:
    assert search(words)[0].slug == first


def test_search_wants_every_word() -> None:
    hits = search(["tokens", "pruning"])
    assert {"evit", "dependency-vit"} <= {each.slug for each in hits}
    assert not search("tokens zebra")
    assert len(search("")) == len(load_cards())
    assert {each.family for each in search("vision_language 2019")} == {"vision_language"}


def test_a_wrong_slug_names_near_ones() -> None:
    assert card("evit").title.startswith("Not All Patches")
    with pytest.raises(TransomError, match=r"no paper has the slug 'pito'; did you mean: pitome"):
        card("pito")
    with pytest.raises(TransomError, match=r"'zzz'; `transom papers` lists all slugs"):
        card("zzz")
