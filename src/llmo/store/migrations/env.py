"""Runs the migrations on the connection that `llmo.store.migrate` hands over."""

from alembic import context

from llmo.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite undoes DDL too: all revisions are applied, or none.
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
