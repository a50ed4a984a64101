"""What the store keeps, as tables; every time is in seconds since 1970, UTC."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, Double, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
_OF_EXCHANGE = "exchanges.id"


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, float: Double}  # noqa: RUF012  # SQLAlchemy reads it


class ExchangeRow(Base):
    """A request and its answer. The texts are null when the store redacts."""

    __tablename__ = "exchanges"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_s: Mapped[float] = mapped_column(index=True)
    finished_s: Mapped[float | None]
    endpoint: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(Text)
    key_id: Mapped[str | None] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16))
    finish_reason: Mapped[str | None] = mapped_column(String(32))
    is_redacted: Mapped[bool] = mapped_column(Boolean)
    prompt: Mapped[str | None] = mapped_column(Text)
    answer: Mapped[str | None] = mapped_column(Text)
    num_prompt_tokens: Mapped[int] = mapped_column(Integer)
    stats: Mapped[dict[str, Any]]
    rounds: Mapped[list[Any]]


class TokenRow(Base):
    """A committed token with what the heads said of it: per metric a probability, or why there is none."""

    __tablename__ = "tokens"

    exchange_id: Mapped[str] = mapped_column(ForeignKey(_OF_EXCHANGE, ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    token_id: Mapped[int | None] = mapped_column(Integer)
    text: Mapped[str | None] = mapped_column(Text)
    origin: Mapped[str] = mapped_column(String(8))
    round: Mapped[int] = mapped_column(Integer)
    is_emitted: Mapped[bool] = mapped_column(Boolean)
    reader: Mapped[str] = mapped_column(String(8))
    scores: Mapped[dict[str, Any]]
    running: Mapped[dict[str, Any]]
    unscored: Mapped[dict[str, Any]]


class VerdictRow(Base):
    """A rule that a token broke."""

    __tablename__ = "verdicts"

    exchange_id: Mapped[str] = mapped_column(ForeignKey(_OF_EXCHANGE, ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(Integer)
    metric: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(32))
    score: Mapped[float | None]
    threshold: Mapped[float | None]
    reason: Mapped[str] = mapped_column(Text)
    is_early: Mapped[bool] = mapped_column(Boolean)


class AlertRow(Base):
    """The first verdict of an exchange for a metric and an action; one row for each such pair, never two."""

    __tablename__ = "alerts"
    __table_args__ = (UniqueConstraint("exchange_id", "metric", "action"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    exchange_id: Mapped[str] = mapped_column(ForeignKey(_OF_EXCHANGE, ondelete="CASCADE"))
    created_s: Mapped[float] = mapped_column(index=True)
    metric: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(32))
    position: Mapped[int] = mapped_column(Integer)
    score: Mapped[float | None]
    threshold: Mapped[float | None]
    reason: Mapped[str] = mapped_column(Text)
    is_early: Mapped[bool] = mapped_column(Boolean)
    payload: Mapped[dict[str, Any]]
    """What the sinks are sent."""


class DeliveryRow(Base):
    """An alert on its way to a sink: pending, delivered, or dead after its last try."""

    __tablename__ = "deliveries"
    __table_args__ = (UniqueConstraint("alert_id", "sink"), Index(None, "sink", "state", "due_s"))

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    alert_id: Mapped[str] = mapped_column(ForeignKey("alerts.id", ondelete="CASCADE"))
    sink: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(Integer)
    due_s: Mapped[float]
    lease: Mapped[str | None] = mapped_column(String(64))
    leased_until_s: Mapped[float]
    error: Mapped[str | None] = mapped_column(Text)
    delivered_s: Mapped[float | None]


class KeyRow(Base):
    """An API key: its hash alone."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[str] = mapped_column(String(64))
    created_s: Mapped[float]
    revoked_s: Mapped[float | None]


class PolicyRow(Base):
    """A policy that was put in force over HTTP; the newest one holds."""

    __tablename__ = "policies"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    created_s: Mapped[float]
    key_id: Mapped[str | None] = mapped_column(String(32))
    document: Mapped[dict[str, Any]]
