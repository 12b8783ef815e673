"""Search finds the wanted paper: thirty queries as people write them."""

from __future__ import annotations

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'gallery' is not installed")

from tests.gallery.pages import SAMPLES, needs_samples
from transom.cards import load_cards
from transom.errors import StoreError
from transom.gallery import meaning, search
from transom.gallery.feed import Entry, read
from transom.gallery.store import open_store

QUERIES = {
    "drop patches the class token does not look at": "evit",
    "merge tokens while keeping the spectrum of the graph": "pitome",
    "why do vision language models hallucinate and which heads are to blame": "vhr",
    "attention sinks in multimodal models": "var",
    "routing heads like experts": "moh",
    "mixture of experts for diffusion transformers": "promoe",
    "neighborhood attention cuda kernel": "fna",
    "batch norm instead of layer norm in transformers": "unified-norm",
    "robot arm policy with diffusion action head": "cogact",
    "agents that play minecraft": "omnijarvis",
    "navigate a house by instructions in words": "adapt-vln",
    "audio spectrogram transformer pretraining without labels": "asit",
    "fine-tuning audio models with few parameters": "petl-ast",
    "train ViT on small datasets": "cct",
    "quantization outliers caused by heads that do nothing": "quantizable",
    "survey of forecasting with transformers": "time-series-survey",
    "reinforcement learning survey": "rl-survey",
    "segment an object in a video from a sentence": "mttr",
    "several subjects in one generated image stay consistent": "ir-diffusion",
    "hypernetwork that predicts parameters of large networks": "logah",
    "learning rate transfer across width": "lr-transfer",
    "skip layers per token to lower latency of language models": "first",
    "brain recordings and multimodal networks": "brain-integration",
    "mamba hybrid vlm distillation": "matvlm",
    "head pose of many people": "directmhp",
    "facial expression recognition": "vtff",
    "recommendation with trillion parameters": "hstu",
    "class incremental learning with several labels per picture": "multi-lane",
    "shift equivariance polyphase": "shift-equivariance",
    "which small vision-language models run on an NPU": "autoneural",
}


def test_there_are_thirty_queries_for_papers_that_exist():
    assert len(QUERIES) == 30
    assert set(QUERIES.values()) <= set(load_cards())


def _missed(store, *, meaning):
    found = {
        query: [hit.stored.slug for hit in store.search(query, 3, meaning=meaning)]
        for query in QUERIES
    }
    return {query: slugs for query, slugs in found.items() if QUERIES[query] not in slugs}


@needs_samples
def test_the_wanted_paper_is_in_the_first_three(store):
    store.add([entry for page in SAMPLES for entry in read(page, year=2025)])
    assert _missed(store, meaning=False) == {}


def test_the_wanted_paper_is_in_the_first_three_by_cards_alone(store):
    store.add([Entry(card.title) for card in load_cards().values()])
    assert _missed(store, meaning=False) == {}


@needs_samples
@pytest.mark.slow
def test_the_wanted_paper_is_in_the_first_three_by_meaning_too(tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    if meaning.folder() is None:
        pytest.skip("no model of sentences is on this machine")
    with open_store(f"sqlite:///{tmp_path / 'feed.sqlite'}") as store:
        store.add([entry for page in SAMPLES for entry in read(page, year=2025)])
        assert meaning.index(store) == 89
        assert _missed(store, meaning=True) == {}


@pytest.fixture
def birds(store):
    store.add(
        [
            Entry("Gizzard", abstract="A model of birds that eat grain.", authors=("Ada Owl",)),
            Entry(
                "Feathers", abstract="Counting is hard; birds have many.", organisation="Jay Inc"
            ),
            Entry("Birds", abstract="Nothing else is said here."),
            Entry("Ships", abstract="Boats are counted at sea."),
        ]
    )
    return store


def _titles(store, line, limit=20):
    return [hit.stored.title for hit in store.search(line, limit, meaning=False)]


def test_a_title_counts_more_than_an_abstract(birds):
    assert _titles(birds, "birds")[0] == "Birds"
    assert len(_titles(birds, "birds")) == 3


def test_rare_words_count_more_than_frequent_ones(birds):
    assert _titles(birds, "birds grain")[0] == "Gizzard"


def test_authors_and_organisations_are_found(birds):
    assert _titles(birds, "ada owl") == ["Gizzard"]
    assert _titles(birds, "jay") == ["Feathers"]


def test_forms_of_a_word_are_one_word(birds):
    assert set(_titles(birds, "count")) == {"Feathers", "Ships"}


def test_the_beginning_of_a_word_finds_it(birds):
    assert _titles(birds, "gizz") == ["Gizzard"]


def test_scores_fall_and_the_limit_holds(birds):
    hits = birds.search("birds counting", 2)
    assert len(hits) == 2 and hits[0].score >= hits[1].score


def test_words_nobody_has_do_not_spoil_the_rest(birds):
    assert _titles(birds, "xylophone grain") == ["Gizzard"]
    assert _titles(birds, "xylophone") == []


def test_only_small_words_are_searched_for_all_the_same(birds):
    # PostgreSQL keeps none of them.
    assert set(_titles(birds, "is")) == ({"Birds", "Feathers"} if birds.is_sqlite else set())


def test_candidates_are_bounded_and_the_best_is_among_them(store, monkeypatch):
    monkeypatch.setattr(search, "BUDGET", 20)
    common = [Entry(f"Paper {i}", abstract="attention tokens") for i in range(200)]
    wanted = Entry("Wanted", abstract="attention tokens gizzard")
    store.add([*common[:100], wanted, *common[100:]])
    assert _titles(store, "attention tokens gizzard")[0] == "Wanted"
    frequent = store.search("attention tokens", 50, meaning=False)
    assert len(frequent) == 20  # the newest
    assert min(int(hit.stored.title.split()[1]) for hit in frequent) >= 100


def test_scores_of_related_papers_leave_the_paper_itself_out(birds):
    entry = next(e for e in birds.page() if e.title == "Feathers")
    assert entry.id not in [hit.stored.id for hit in birds.related(entry.id)]


@pytest.fixture
def letters(monkeypatch):
    """A stand-in for the model: two directions, one for birds and one for boats."""
    import numpy as np

    def encode(texts, path):
        kinds = (("bird", "feather", "avian"), ("ship", "boat", "vessel"))
        rows = [[sum(w in t.lower() for w in kind) + 1e-3 for kind in kinds] for t in texts]
        matrix = np.array(rows, dtype=np.float32)
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

    monkeypatch.setattr(meaning, "encode", encode)
    monkeypatch.setattr(meaning, "folder", lambda: meaning.Path("letters"))


def test_other_words_for_the_same_thing_are_found(birds, letters):
    assert _titles(birds, "avian") == []
    steps = []
    assert meaning.index(birds, lambda done, total: steps.append((done, total))) == 4
    assert steps == [(4, 4)]
    assert meaning.index(birds) == 0
    assert [h.stored.title for h in birds.search("vessel", 1)] == ["Ships"]
    assert birds.search("avian", 1)[0].stored.title in ("Gizzard", "Feathers", "Birds")


def test_a_changed_text_gets_a_new_vector(birds, letters):
    meaning.index(birds)
    longer = "Nothing else is said here, but that boats and ships and vessels are no birds."
    birds.add([Entry("Birds", abstract=longer)])
    assert meaning.index(birds) == 1


def test_new_entries_join_the_search_once_they_have_vectors(birds, letters):
    meaning.index(birds)
    assert len(birds.search("vessel", 20)) == 4
    birds.add([Entry("Sloop", abstract="a boat")])
    assert "Sloop" not in [h.stored.title for h in birds.search("vessel")]
    meaning.index(birds)
    assert "Sloop" in [h.stored.title for h in birds.search("vessel")]


def test_the_named_folder_must_hold_a_model(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSOM_SENTENCE_MODEL", str(tmp_path))
    with pytest.raises(StoreError, match=r"TRANSOM_SENTENCE_MODEL is .*; expected a folder of a"):
        meaning.folder()


def test_without_a_model_search_is_by_words(birds, monkeypatch):
    monkeypatch.setattr(meaning, "folder", lambda: None)
    assert meaning.index(birds) == 0
    assert [h.stored.title for h in birds.search("grain")] == ["Gizzard"]
