"""What people say of answers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "feedback",
        sa.Column("id", _ID, autoincrement=True, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("endpoint", sa.String(100), nullable=False),
        sa.Column("against", sa.String(100)),
        sa.Column("model", sa.String(100), nullable=False),
        sa.Column("model_ref", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("answers", sa.JSON(), nullable=False),
        sa.Column("rating", sa.String(16)),
        sa.Column("correction", sa.Text()),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feedback_endpoint_id", "feedback", ["endpoint", "id"])
    op.create_index("ix_feedback_against_id", "feedback", ["against", "id"])
