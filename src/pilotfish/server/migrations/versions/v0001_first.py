"""Exchanges, tokens, verdicts, alerts, deliveries, keys and policies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "exchanges",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.Column("finished_s", sa.Double()),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("key_id", sa.String(32)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("finish_reason", sa.String(32)),
        sa.Column("is_redacted", sa.Boolean(), nullable=False),
        sa.Column("prompt", sa.Text()),
        sa.Column("answer", sa.Text()),
        sa.Column("num_prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("stats", sa.JSON(), nullable=False),
        sa.Column("rounds", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_exchanges"),
    )
    op.create_index("ix_exchanges_created_s", "exchanges", ["created_s"])
    _create_parts_of_an_exchange()
    _create_alerts()
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(64), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.Column("revoked_s", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_table(
        "policies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.Column("key_id", sa.String(32)),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_policies"),
    )


def _create_parts_of_an_exchange() -> None:
    op.create_table(
        "tokens",
        sa.Column("exchange_id", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("token_id", sa.Integer()),
        sa.Column("text", sa.Text()),
        sa.Column("origin", sa.String(8), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("is_emitted", sa.Boolean(), nullable=False),
        sa.Column("reader", sa.String(8), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("running", sa.JSON(), nullable=False),
        sa.Column("unscored", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("exchange_id", "position", name="pk_tokens"),
        _belongs_to("tokens", "exchange_id", "exchanges"),
    )
    op.create_table(
        "verdicts",
        sa.Column("exchange_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("metric", sa.String(128), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("score", sa.Double()),
        sa.Column("threshold", sa.Double()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("is_early", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("exchange_id", "number", name="pk_verdicts"),
        _belongs_to("verdicts", "exchange_id", "exchanges"),
    )


def _create_alerts() -> None:
    op.create_table(
        "alerts",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("exchange_id", sa.String(64), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.Column("metric", sa.String(128), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("score", sa.Double()),
        sa.Column("threshold", sa.Double()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("is_early", sa.Boolean(), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alerts"),
        sa.UniqueConstraint("exchange_id", "metric", "action", name="uq_alerts_exchange_id_metric_action"),
        _belongs_to("alerts", "exchange_id", "exchanges"),
    )
    op.create_index("ix_alerts_created_s", "alerts", ["created_s"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("alert_id", sa.String(64), nullable=False),
        sa.Column("sink", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_s", sa.Double(), nullable=False),
        sa.Column("lease", sa.String(64)),
        sa.Column("leased_until_s", sa.Double(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("delivered_s", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
        sa.UniqueConstraint("alert_id", "sink", name="uq_deliveries_alert_id_sink"),
        _belongs_to("deliveries", "alert_id", "alerts"),
    )
    op.create_index("ix_deliveries_sink_state_due_s", "deliveries", ["sink", "state", "due_s"])


def _belongs_to(table: str, column: str, parent: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_{column}_{parent}"
    return sa.ForeignKeyConstraint([column], [f"{parent}.id"], name=name, ondelete="CASCADE")


def downgrade() -> None:
    for table in ("policies", "api_keys", "deliveries", "alerts", "verdicts", "tokens", "exchanges"):
        op.drop_table(table)
