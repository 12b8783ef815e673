"""A database for each test: a file of SQLite, or PostgreSQL where a server is given.

`TRANSOM_TEST_POSTGRES=postgresql://USER@HOST/NAME pytest tests/gallery` runs the tests of storage,
search and mail there as well; each test makes a schema of its own and removes it.
"""

from __future__ import annotations

import os
import uuid

import pytest

POSTGRES = os.environ.get("TRANSOM_TEST_POSTGRES")


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param(
            "postgresql",
            marks=pytest.mark.skipif(
                not POSTGRES, reason="no server is given by TRANSOM_TEST_POSTGRES"
            ),
        ),
    ]
)
def url(request, tmp_path):
    """Address of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'gallery.sqlite'}"
        return
    import psycopg

    name = f"transom_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(POSTGRES, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    joint = "&" if "?" in POSTGRES else "?"
    yield f"{POSTGRES}{joint}options=-csearch_path%3D{name}"
    with psycopg.connect(POSTGRES, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def store(url):
    """An open, empty store."""
    from transom.gallery.store import open_store

    with open_store(url) as opened:
        yield opened
