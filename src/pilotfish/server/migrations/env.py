"""What alembic runs: the store hands over its open connection."""

from __future__ import annotations

from alembic import context

from pilotfish.server.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
