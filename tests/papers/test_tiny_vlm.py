"""DPN and DyVTE trained on a tiny model that sees: a LLaVA of three layers and 36 image tokens.

Its image is a map of coloured cells. Three kinds of questions, put in front of the image:

    text   the answer stands in the question; the image is not needed
    easy   all cells have one colour: which?
    hard   each cell has a colour of its own: which one has the cell at this place?

The model is trained once, plainly, to answer all of them; then it is frozen.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import transom
from transom.measure import gflops
from transom.papers.tokens import dpn, dyvte
from transom.papers.tokens.dpn import DPN
from transom.papers.tokens.dyvte import DyVTE

pytestmark = pytest.mark.slow

SIDE, PIXELS = 6, 2
COUNT = SIDE * SIDE
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])
PLACES = torch.tensor([8, 9, 20, 21, 28, 29])  # neighbours, which pooling would mix
IMAGE, ROUTER, ANSWER, ANY, SAYS, AT = 40, 41, 42, 30, 20, 10  # words
COLOUR = 2  # the word of the first colour


class Batch(NamedTuple):
    """Arguments of the model, the word to answer (B,), and the kind of each question (B,)."""

    given: dict[str, Tensor]
    answer: Tensor
    kind: Tensor


def questions(count: int, rng: torch.Generator, kind: int | None = None) -> Batch:
    kinds = torch.randint(0, 4, (count,), generator=rng).clamp(max=2)
    if kind is not None:
        kinds = torch.full((count,), kind)
    cells = torch.randint(0, 4, (count, COUNT), generator=rng)
    one = torch.randint(0, 4, (count,), generator=rng)
    cells = torch.where((kinds == 1)[:, None], one[:, None], cells)
    place = torch.randint(0, len(PLACES), (count,), generator=rng)
    there = cells[torch.arange(count), PLACES[place]]
    pixels = COLOURS[cells].view(count, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, scale_factor=PIXELS)
    pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=rng)
    ids = torch.full((count, COUNT + 4), IMAGE)
    ids[:, 0], ids[:, -2], ids[:, -1] = 0, ROUTER, ANSWER
    ids[:, 1] = torch.where(kinds == 0, SAYS + one, torch.where(kinds == 1, ANY, AT + place))
    answer = COLOUR + torch.where(kinds == 2, there, one)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Batch(given, answer, kinds)


def blind(batch: Batch) -> Batch:
    """The same questions without images."""
    ids = batch.given["input_ids"][:, [0, 1, -2, -1]]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(given, batch.answer, batch.kind)


def untrained(eps: float) -> Any:
    """The model; `eps` is that of its norms."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=SIDE * PIXELS, patch_size=PIXELS,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=64, rms_norm_eps=eps,
            pad_token_id=1, bos_token_id=0, eos_token_id=47,
        ),
        image_token_id=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position_embedding" in name or "embed_tokens" in name:
                weight.normal_()
            elif weight.dim() == 2:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            elif weight.dim() == 4:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return model


def last(model: Any, batch: Batch) -> Tensor:
    """Logits (B, V) of the answer."""
    return model(**batch.given, use_cache=False, logits_to_keep=1).logits[:, -1]


@functools.cache
def trained(eps: float = 0.1, smoothing: float = 0.0, steps: int = 600) -> Any:
    """The plain model, which answers everything; frozen."""
    model, rng = untrained(eps), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    slope = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = questions(32, rng)
        loss = F.cross_entropy(last(model, batch), batch.answer, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slope.step()
    return model.eval().requires_grad_(False)


def unsure() -> Any:
    """The same with norms and answers in which the strength of the image states matters.

    DPN's router learns from nothing else: its probability scales these states. Norms with a small
    eps would take that out again in a model as shallow as this one.
    """
    return trained(eps=3.0, smoothing=0.1, steps=500)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for model in (trained(), unsure()):
        if transom.fittings(model):
            transom.remove(model)
        model.eval()


def asked(kind: int, count: int = 128) -> Batch:
    """Questions of one kind that were in no training."""
    return questions(count, torch.Generator().manual_seed(1000 + kind), kind)


@torch.no_grad()
def right(model: Any, kind: int) -> float:
    """Part of the questions of a kind that are answered right."""
    batch = asked(kind)
    return (last(model, batch).argmax(-1) == batch.answer).float().mean().item()


def test_the_plain_model_answers_and_needs_its_image_for_as_long_as_it_should() -> None:
    model = trained()
    assert all(right(model, kind) > 0.97 for kind in range(3))
    found = {}
    for layer in (0, 1):
        transom.apply(model, DyVTE(exit_layer=layer), check=False)
        found[layer] = [right(model, kind) for kind in range(3)]
        transom.remove(model)
    assert found[0][0] > 0.97 and found[0][1] < 0.9 and found[0][2] < 0.6
    assert found[1][1] > 0.97 and found[1][2] < 0.8


STRIDES = (((1, 1), (1, 2)),)
MARGIN = 0.35


@functools.cache
def routed() -> Any:
    """Weights of DPN's router, trained with the loss of the words and the routing loss."""
    model, method = unsure(), DPN(layers=(1,), strides=STRIDES, router_token=ROUTER)
    torch.manual_seed(1)
    transom.apply(model, method, check=False)
    (router,) = (m for m in model.modules() if isinstance(m, dpn.Router))
    router.requires_grad_(True)
    training = method.training(coefficient=0.4, margin=MARGIN)
    steps, rng = 500, torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(router.parameters(), 0.02, weight_decay=0.0)
    slope = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model.train()
    for step in range(steps):
        training.at_step(model, step, steps)
        batch = questions(32, rng)
        loss = F.cross_entropy(last(model, batch), batch.answer)
        extra = training.extra_loss(model, loss)
        assert extra is not None
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
        slope.step()
    training.at_step(model, steps, steps)
    model.eval()
    assert training.extra_loss(model, loss) is None
    state = {k: v.clone() for k, v in router.state_dict().items()}
    transom.remove(model)
    return state


@torch.no_grad()
def pooled(model: Any, kind: int) -> tuple[Tensor, Tensor]:
    """Probabilities (B, 2) of the strides, and which prompts were pooled (B,)."""
    (router,) = (m for m in model.modules() if isinstance(m, dpn.Router))
    seen: list[Tensor] = []
    hook = router.register_forward_hook(lambda module, given, out: seen.append(out))
    last(model, asked(kind))
    hook.remove()
    probs = (seen[0] / dpn.TEMPERATURE).softmax(-1)
    return probs, probs.argmax(-1) == 1


def test_dpn_spends_less_on_easy_questions_and_meets_its_budget() -> None:
    state, model = routed(), unsure()
    transom.apply(model, DPN(layers=(1,), strides=STRIDES, router_token=ROUTER), check=False)
    (router,) = (m for m in model.modules() if isinstance(m, dpn.Router))
    router.load_state_dict(state)
    shares, probs = [], []
    for kind in range(3):
        p, taken = pooled(model, kind)
        shares.append(taken.float().mean().item())
        # as in the stream of questions, half of which are hard
        probs += [p] * (2 if kind == 2 else 1)
    text, easy, hard = shares
    assert easy > hard + 0.25 and text > hard
    loss = dpn.routing_loss([torch.cat(probs)], margin=MARGIN)
    assert loss < 0.2 * MARGIN, "it begins at the whole margin, with nothing pooled"

    spent = []
    for kind in (1, 2):
        costs = [
            gflops(lambda one=one: model(**one, use_cache=False)) for one in singles(asked(kind))
        ]
        spent.append(sum(costs) / len(costs))
    assert spent[0] < spent[1]

    # as many prompts pooled as the router pools, but any: the hard ones suffer more
    answers = [right(model, kind) for kind in range(3)]
    mean = (text + easy + 2 * hard) / 4
    transom.remove(model)
    static = DPN(layers=(1,), strides=(((1, 2),),), adaptive=False)
    transom.apply(model, static, check=False)
    always = right(model, 2)
    chance = mean * always + (1 - mean)
    assert answers[2] > chance + 0.03 and min(answers[:2]) > 0.95


def singles(batch: Batch) -> list[dict[str, Tensor]]:
    """Prompts one by one, so that each costs what it costs."""
    return [{k: v[i : i + 1] for k, v in batch.given.items()} for i in range(24)]


@functools.cache
def leaving() -> list[dyvte.Router]:
    """Routers of DyVTE, trained as in the paper: one random layer a step, the model frozen."""
    model, rng = trained(), torch.Generator().manual_seed(6)
    torch.manual_seed(2)
    routers = [dyvte.Router(32, 32) for _ in range(2)]
    optimizers = [torch.optim.AdamW(r.parameters(), 5e-3, weight_decay=0.0) for r in routers]
    for _ in range(240):
        layer = int(torch.randint(0, 2, (), generator=rng))
        batch = questions(48, rng)
        words = torch.cat([batch.given["input_ids"], batch.answer[:, None]], 1)
        labels = words.masked_fill(torch.arange(words.shape[1]) < words.shape[1] - 1, -100)
        given = {**batch.given, "input_ids": words, "attention_mask": torch.ones_like(words)}
        end = torch.full((len(words),), words.shape[1] - 2)
        full, without, gate = dyvte.paired_forward(
            model, routers[layer], layer, words == IMAGE, end, **given, use_cache=False
        )
        # losses are thousandths here, of which the 3 % of the paper would be noise
        loss = dyvte.router_loss(gate, full.logits, without.logits, labels, worse=10.0).loss
        optimizers[layer].zero_grad()
        loss.backward()
        optimizers[layer].step()
    assert not any(p.requires_grad for p in model.parameters())
    return routers


def test_dyvte_leaves_later_when_the_text_still_needs_the_image() -> None:
    routers, model = leaving(), trained()
    plain = [last(model, asked(kind)).argmax(-1) for kind in range(3)]
    transom.apply(model, DyVTE(width=32), check=False)
    for own, learnt in zip(dyvte.routers(model), routers, strict=True):
        own.load_state_dict(learnt.state_dict())
    found = [dyvte.exits(model, [asked(kind).given]) for kind in range(3)]
    text, easy, hard = (exits.mean for exits in found)
    assert text < 1.3 and text + 0.3 < easy < hard - 0.3, [exits.counts for exits in found]
    same = [
        (last(model, asked(kind)).argmax(-1) == plain[kind]).float().mean().item()
        for kind in range(3)
    ]
    transom.remove(model)
    transom.apply(model, DyVTE(exit_layer=1), check=False)
    fixed = (last(model, asked(2)).argmax(-1) == plain[2]).float().mean().item()
    assert min(same[:2]) > 0.95 and same[2] > fixed + 0.1, (same, fixed)


def test_what_dyvte_leaves_out_is_not_computed() -> None:
    routers, model = leaving(), trained()
    plain = gflops(lambda: model(**singles(asked(0))[0]))
    transom.apply(model, DyVTE(width=32), check=False)
    for own, learnt in zip(dyvte.routers(model), routers, strict=True):
        own.load_state_dict(learnt.state_dict())
    spent = [
        sum(gflops(lambda one=one: model(**one)) for one in singles(asked(kind))) / 24
        for kind in range(3)
    ]
    assert spent[0] < spent[1] < spent[2] and spent[0] < 0.8 * plain


def test_exit_statistics_need_images() -> None:
    model = trained()
    transom.apply(model, DyVTE(exit_layer=1), check=False)
    batch = asked(1, 4)
    assert dyvte.exits(model, [batch.given]).counts == {1: 4}
    with pytest.raises(transom.errors.SettingsError, match="no prompt holds an image"):
        dyvte.exits(model, [blind(batch).given])
