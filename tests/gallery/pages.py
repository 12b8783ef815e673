"""Pages as they come, about papers that do not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FEED = Path(__file__).parents[3] / "shared" / "data" / "feed"
SAMPLES = [FEED / f"page{number}.txt" for number in range(4)]
needs_samples = pytest.mark.skipif(
    not FEED.is_dir(), reason="the four sample pages (../shared/data/feed) are not here"
)

HEAD = """new

Get trending papers in your email inbox!

Subscribe

Daily Papers

byAK and the research community

Dec 30

"""

TEXT = (
    HEAD
    + """Gizzard: Attention for Birds

We attend to birds. Code: https://github.com/owl/gizzard.git

  • 8 authors
·
Apr 6, 2023

Counting Feathers

We count feathers, one by one.

Owl Labs Owl Labs
·
Mar 26 12

No Byline at All

This entry stands between two others without authors and date.

Wings Without Words

We let wings do without words.

  • 1 author
·
Feb 29, 2024 2
"""
)

ITEMS = [
    {
        "title": "Gizzard: Attention for Birds",
        "publishedAt": "2023-04-06T17:59:59.000Z",
        "numComments": 3,
        "paper": {
            "id": "2304.01234",
            "title": "Gizzard: Attention for Birds",
            "summary": "We attend\nto birds.",
            "authors": [{"name": "Ada Owl", "hidden": False}, {"name": "Ben Jay"}],
            "upvotes": 41,
            "githubRepo": "https://github.com/owl/gizzard",
            "projectPage": "https://owl.example/gizzard",
            "organization": {"name": "owl", "fullname": "Owl Labs"},
        },
    },
    {
        "title": "Counting Feathers",
        "publishedAt": "2025-03-26T00:00:00.000Z",
        "numComments": 0,
        "paper": {"id": "2503.04321", "summary": "We count.", "authors": [], "upvotes": 0},
    },
]
JSON = json.dumps(ITEMS)

ARTICLES = """<!DOCTYPE html>
<html><head><title>Daily Papers</title></head><body><main>
<article>
  <h3><a href="/papers/2304.01234">Gizzard:
      Attention for Birds</a></h3>
  <p>We attend to birds &amp; bees.</p>
  <div class="leading-none">41</div>
  <ul><li title="Ada Owl"></li><li title="Ben Jay"></li></ul>
  <div>· <span>2 authors</span></div>
  <time datetime="2023-04-06T17:59:59">Apr 6, 2023</time>
  <a href="/papers/2304.01234#community">3</a>
</article>
<article><h3><a href="/papers/2503.04321">Counting Feathers</a></h3><p>We count.</p>
  <span>Published on Mar 26</span></article>
</main></body></html>"""

ATOM = """<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom">
  <title>ArXiv Query</title><id>http://arxiv.org/api/x</id><updated>2025-04-01T00:00:00Z</updated>
  <entry>
    <id>http://arxiv.org/abs/2304.01234v2</id>
    <updated>2023-05-01T00:00:00Z</updated><published>2023-04-06T17:59:59Z</published>
    <title>Gizzard:
  Attention for Birds</title>
    <summary>  We attend to birds.
</summary>
    <author><name>Ada Owl</name></author><author><name>Ben Jay</name></author>
    <comment xmlns="http://arxiv.org/schemas/atom">Code at https://github.com/owl/gizzard</comment>
  </entry>
</feed>"""
