"""Alembic migrations of the gallery's database; they run whenever a store is opened."""
