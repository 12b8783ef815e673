"""Subscribers, what they want, and the letters to them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "subscribers",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("address", sa.String(254), nullable=False),
        sa.Column("address_key", sa.String(254), nullable=False, unique=True),
        sa.Column("asks", sa.Integer, nullable=False),
        sa.Column("asked", moment),
        sa.Column("confirmed", moment),
        sa.Column("ended", moment),
    )
    op.create_table(
        "interests",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("subscriber_id", sa.Integer, _of("subscribers"), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("value", sa.String(200), nullable=False),
        sa.Column("ask", sa.Integer, nullable=False),
        sa.Column("confirmed", moment),
    )
    op.create_index("ix_interests_subscriber_id", "interests", ["subscriber_id"])
    op.create_table(
        "letters",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("subscriber_id", sa.Integer, _of("subscribers"), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("created", moment, nullable=False),
        sa.Column("changed", moment, nullable=False),
    )
    op.create_index("ix_letters_subscriber_id", "letters", ["subscriber_id"])
    op.create_index("ix_letters_state", "letters", ["state"])
    op.create_table(
        "letter_entries",
        sa.Column("subscriber_id", sa.Integer, _of("subscribers"), primary_key=True),
        sa.Column("entry_id", sa.Integer, _of("entries"), primary_key=True),
        sa.Column("letter_id", sa.Integer, _of("letters"), nullable=False),
    )
    op.create_table(
        "letter_rooms",
        sa.Column("subscriber_id", sa.Integer, _of("subscribers"), primary_key=True),
        sa.Column("slug", sa.String(80), primary_key=True),
        sa.Column("letter_id", sa.Integer, _of("letters"), nullable=False),
    )


def _of(table: str) -> sa.ForeignKey:
    return sa.ForeignKey(f"{table}.id", ondelete="CASCADE")


def downgrade() -> None:
    for table in ("letter_rooms", "letter_entries", "letters", "interests", "subscribers"):
        op.drop_table(table)
