"""What Alembic runs: the connection is handed over by `transom.gallery.store`."""

from __future__ import annotations

from alembic import context

from transom.gallery.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
